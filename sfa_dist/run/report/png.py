"""Plots as PNG, for what shows no SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from sfa_dist.boundary.plain import for_figure
from sfa_dist.run.report.document import Plot

MARKED_POINTS = 40  # Up to so many each has a mark.
LONGEST_WORD = 40  # Characters.


def file_word(name: str) -> str:
    """Part of a file's name, for what a file calls a stage or a head, which may be anything."""
    return re.sub(r"\W", "_", name)[:LONGEST_WORD]


def draw_png(plots: Sequence[Plot], path: Path, columns: int = 4) -> Path:
    """Writes the plots in rows of at most `columns`. Raises OSError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    across = min(columns, len(plots))
    down = math.ceil(len(plots) / across)
    figure = Figure(figsize=(4.2 * across, 3 * down), layout="tight")
    axes = figure.subplots(down, across, squeeze=False).flat
    for axis, plot in zip(axes, plots, strict=False):
        for each in plot.series:
            xs, ys = [x for x, _ in each.points], [float("nan") if y is None else y for _, y in each.points]
            mark = "o" if len(xs) < MARKED_POINTS else None
            axis.plot(xs, ys, marker=mark, markersize=3, linewidth=1.4, label=for_figure(each.name))
        places = {x for each in plot.series for x, _ in each.points}
        if len(places) == 1:  # Of a single step there is no range.
            axis.set_xlim(min(places) - 1, min(places) + 1)
        axis.set(title=for_figure(plot.title), xlabel=plot.across)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.grid(alpha=0.3)
        if plot.series:
            axis.legend(fontsize=8)
        if plot.top is not None:
            axis.set_ylim(0, plot.top)
    for axis in axes:
        axis.remove()  # Of the last row, without a plot.
    figure.savefig(path, dpi=110)
    return path
