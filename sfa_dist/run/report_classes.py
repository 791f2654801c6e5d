"""What a report shows of single classes: the share of right clips, the confusions, and the confusion matrix.

The matrix is drawn only if it is small enough to be readable.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sfa_dist.boundary.disk import read_object
from sfa_dist.boundary.file_names import CLASSES
from sfa_dist.boundary.plain import for_figure
from sfa_dist.recipe.stage_names import TEST

MATRIX_CLASSES = 50  # The most classes drawn as a matrix; with more there is only the table of confusions.
SHOWN_CONFUSIONS = 50
NAME_LENGTH = 40


class Table(NamedTuple):
    """A titled table of texts. Of a `long` table a page shows the first rows, and the others on demand."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    long: bool = False


def read_class_tables(run_dir: Path) -> dict[str, Any]:
    """The content of `test/classes.json` by head; empty without the file."""
    try:
        heads: dict[str, Any] = read_object(run_dir / TEST / CLASSES, heads=dict)["heads"]
    except FileNotFoundError:
        return {}
    return heads


def class_reports(heads: dict[str, Any]) -> list[Table]:
    """For each head a table of its confusions and one of its classes, the worst first."""
    tables = []
    for head, table in heads.items():
        of_head = "" if len(heads) == 1 else f" ({head})"
        confused = [pair for pair in table["confusion"] if pair[0] != pair[1]][:SHOWN_CONFUSIONS]
        clips = {number: count for number, _, count in table["classes"]}
        rows = [
            [name_of(table, label), name_of(table, taken_for), f"{count:,} of {clips[label]:,}"]
            for label, taken_for, count in confused
        ]
        if rows:
            tables.append(Table(f"Confused most{of_head}", ["class", "taken for", "clips"], rows, long=True))
        worst = sorted(table["classes"], key=lambda row: (row[1] / row[2], -row[2], row[0]))
        lines = [
            [name_of(table, number), f"{right / all:.2%}", f"{right:,} of {all:,}"] for number, right, all in worst
        ]
        tables.append(Table(f"Top-1 of each class{of_head}", ["class", "top-1", "clips"], lines, long=True))
    return tables


def name_of(table: dict[str, Any], number: int) -> str:
    """A class's name, or its number if it has none."""
    return (table["names"] or {}).get(str(number), str(number))


def draw_confusions(heads: dict[str, Any], folder: Path) -> list[Path]:
    """Draws confusion.png (confusion_noun.png, ...) of each head with at most MATRIX_CLASSES classes; returns paths."""
    folder.mkdir(exist_ok=True)
    figures = []
    for head, table in heads.items():
        numbers = sorted({number for pair in table["confusion"] for number in pair[:2]})
        if 2 <= len(numbers) <= MATRIX_CLASSES:
            path = folder / ("confusion.png" if len(heads) == 1 else f"confusion_{_word(head)}.png")
            _draw(table, numbers, "" if len(heads) == 1 else head, path)
            figures.append(path)
    return figures


def _draw(table: dict[str, Any], numbers: list[int], head: str, path: Path) -> None:
    """Rows are the classes, columns the predicted classes; the colour is the share of the class's clips."""
    from matplotlib import pyplot

    index = {number: row for row, number in enumerate(numbers)}
    counts = np.zeros((len(numbers), len(numbers)), dtype=np.int64)
    for label, taken_for, clips in table["confusion"]:
        counts[index[label], index[taken_for]] = clips
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 3.4 + 0.24 * len(numbers)
    figure, axis = pyplot.subplots(figsize=(side + 0.8, side), layout="constrained")
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = _short([name_of(table, number) for number in numbers])
    axis.set_xticks(range(len(numbers)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(numbers)), names, fontsize=7)
    axis.set(xlabel="taken for", ylabel=for_figure(head) or "class")
    edges = np.arange(len(numbers) - 1) + 0.5  # Lines between cells.
    axis.set_xticks(edges, minor=True)
    axis.set_yticks(edges, minor=True)
    axis.grid(which="minor", color="white", linewidth=0.6)
    axis.tick_params(which="minor", length=0)
    if len(numbers) <= MATRIX_CLASSES // 2:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.55 else "black"
            text = f"{counts[row, column]}"
            axis.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, ax=axis, label="share of its clips", shrink=0.7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _word(head: str) -> str:
    """A head's name, made safe for a file name: it comes from a file."""
    return re.sub(r"\W", "_", head)[:NAME_LENGTH]


def _short(names: list[str]) -> list[str]:
    """The names, cut to NAME_LENGTH characters, with a number in front if two would be the same."""
    cut = [name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…" for name in names]
    counts = Counter(cut)
    return [for_figure(f"{index} {name}" if counts[name] > 1 else name) for index, name in enumerate(cut)]
