"""The files of a timeline: JSON that grows window by window, and a figure of the likeliest classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from torch import Tensor

from sfa_dist.boundary.plain import for_figure
from sfa_dist.inference.class_scores import ClassScores

MOST_BINS = 1024
SHOWN_CLASSES = 8
# Those of Okabe and Ito, which colour-blind readers can tell apart; a brown replaces their pale yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
OTHERS = "#d0d7de"


class TimelineFile:
    """One JSON object: the keys of `head`, then the list `windows` with one window a line.

    The file is complete even if the timeline ends by an error or by Ctrl-C. Raises OSError.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path, self._head = path, head
        self._separator = "\n"
        self._file: TextIO

    def __enter__(self) -> TimelineFile:
        self._file = self._path.open("w")
        self._file.write(json.dumps(self._head, indent=1)[:-2] + ',\n "windows": [')
        return self

    def add(self, window: dict[str, Any]) -> None:
        """Appends a window on a line of its own."""
        self._file.write(f"{self._separator}  {json.dumps(window)}")
        self._file.flush()
        self._separator = ",\n"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.write("\n ]\n}\n")
        self._file.close()


class Curve:
    """Mean probabilities over time in at most MOST_BINS bins; when these are full, neighbours are merged in pairs."""

    def __init__(self, classes: int) -> None:
        self._sums = torch.zeros(MOST_BINS, classes)
        self._counts = torch.zeros(MOST_BINS)
        self._starts = torch.zeros(MOST_BINS, dtype=torch.float64)
        self._bins, self._width = 0, 1

    def add(self, seconds: float, probabilities: Tensor) -> None:
        """Adds a window's probabilities (classes,). `seconds` is its middle, which must not decrease."""
        if self._bins == 0 or self._counts[self._bins - 1] == self._width:
            if self._bins == MOST_BINS:
                self._halve()
            self._bins += 1
        here = self._bins - 1
        self._sums[here] += probabilities
        self._starts[here] += seconds
        self._counts[here] += 1

    def _halve(self) -> None:
        for values in (self._sums, self._counts, self._starts):
            half = values.unflatten(0, (-1, 2)).sum(dim=1)
            values.zero_()
            values[: len(half)] = half
        self._bins //= 2
        self._width *= 2

    @property
    def empty(self) -> bool:
        """Whether no window was added."""
        return self._bins == 0

    def points(self) -> tuple[Tensor, Tensor]:
        """(seconds (N,), probabilities (N, classes)): the means of each bin."""
        counts = self._counts[: self._bins]
        return self._starts[: self._bins] / counts, self._sums[: self._bins] / counts.unsqueeze(1)


def draw_timeline(curve: Curve, classes: ClassScores, title: str, path: Path) -> None:
    """Draws the probabilities of the likeliest classes over time and, below, a band with the likeliest at each time.

    Several heads have one such panel each, one above the other: their bands together show the likeliest action.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds, probabilities = curve.points()
    heads = classes.split(probabilities)
    figure = pyplot.figure(figsize=(11, 4.6 * len(heads)), layout="constrained")
    panels = figure.subfigures(len(heads), 1, squeeze=False)[:, 0]
    for panel, (head, part) in zip(panels, heads.items(), strict=True):
        _draw_head(panel, seconds, part, classes.names[head], title if len(heads) == 1 else f"{title}: {head}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_head(panel: Any, seconds: Tensor, probabilities: Tensor, names: Sequence[str], title: str) -> None:
    """Draws probabilities (N, classes) at `seconds` (N,) into a subfigure."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    lines, band = panel.subplots(2, 1, sharex=True, height_ratios=(12, 1))
    shown = shown_classes(probabilities)
    colours = dict(zip(shown, COLOURS, strict=False))
    marker = "o" if len(seconds) < 40 else None
    for label in shown:
        lines.plot(
            seconds, probabilities[:, label], color=colours[label], label=_short(names[label]), marker=marker,
            markersize=3.5, linewidth=1.6,
        )  # fmt: skip
    lines.set(ylim=(-0.02, 1.02), ylabel="probability")
    lines.set_title(for_figure(title), loc="left", fontsize=11)
    lines.grid(alpha=0.3)
    likeliest = probabilities.argmax(dim=1).tolist()
    if not colours.keys() >= set(likeliest):
        lines.plot([], [], color=OTHERS, linewidth=5, label="others")
    panel.legend(loc="outside right upper", frameon=False, title="likeliest classes", alignment="left")
    edges = _edges(seconds)
    for left, right, label in zip(edges[:-1], edges[1:], likeliest, strict=True):
        band.axvspan(left, right, color=colours.get(label, OTHERS), linewidth=0)
    band.set(yticks=[], xlabel="middle of the window", xlim=(edges[0], edges[-1]))
    band.set_ylabel("likeliest", rotation=0, ha="right", va="center", fontsize=9)
    band.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 3, 5, 6, 10]))
    digits = 0 if edges[-1] - edges[0] > 10 else 1
    band.xaxis.set_major_formatter(FuncFormatter(lambda value, _: clock(value, digits)))
    for spine in ("top", "right"):
        lines.spines[spine].set_visible(False)
        band.spines[spine].set_visible(False)


def shown_classes(probabilities: Tensor) -> list[int]:
    """At most SHOWN_CLASSES labels: by the time for which each is the likeliest, then by mean probability."""
    classes = probabilities.shape[1]
    wins = torch.bincount(probabilities.argmax(dim=1), minlength=classes)
    means = probabilities.mean(dim=0)
    ranked = sorted(range(classes), key=lambda label: (-int(wins[label]), -float(means[label])))
    return [label for label in ranked[:SHOWN_CLASSES] if wins[label] or means[label] >= 0.01] or ranked[:1]


def clock(seconds: float, digits: int = 0) -> str:
    """`0:07`, `12:30.25` or `1:02:03`, with `digits` decimals of the seconds."""
    unit = 10**digits
    minutes, rest = divmod(round(seconds * unit), 60 * unit)
    hours, minutes = divmod(minutes, 60)
    whole, part = divmod(rest, unit)
    text = f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes}:{whole:02d}"
    return f"{text}.{part:0{digits}d}" if digits else text


def _edges(seconds: Tensor) -> list[float]:
    """Where the band's colour may change: half-way between the points, and as far beyond the first and the last."""
    if len(seconds) == 1:
        return [float(seconds[0]) - 0.5, float(seconds[0]) + 0.5]
    between = (seconds[1:] + seconds[:-1]) / 2
    first, last = 2 * seconds[0] - between[0], 2 * seconds[-1] - between[-1]
    return [float(first), *between.tolist(), float(last)]


def _short(name: str, most: int = 32) -> str:
    return for_figure(name if len(name) <= most else name[: most - 1] + "…")
