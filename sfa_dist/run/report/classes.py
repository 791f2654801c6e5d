"""What a report says of single classes: how many of their clips are right, what they are taken for, and the confusion
matrix as a picture where it is small enough to be looked at."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sfa_dist.boundary.plain import for_figure
from sfa_dist.run.intervals import wilson
from sfa_dist.run.report.document import Block, Matrix, Table
from sfa_dist.run.report.png import file_word

MATRIX_CLASSES = 50  # In a picture; with more there is a table of what is confused most.
WHOLE_MATRIX = 20  # As a table, with every number.
SHOWN_CONFUSIONS = 50
NAME_LENGTH = 40


def class_blocks(heads: dict[str, Any]) -> list[Block]:
    """For each head its confusions, in whole where there are few classes, and its classes, the worst first."""
    blocks: list[Block] = []
    for head, table in heads.items():
        of_head = "" if len(heads) == 1 else f" ({head})"
        blocks += [*_matrix(table, of_head), *_confused(table, of_head), _each_class(table, of_head)]
    return blocks


def _matrix(table: dict[str, Any], of_head: str) -> list[Block]:
    numbers, counts = confusion_counts(table)
    if not 2 <= len(numbers) <= WHOLE_MATRIX:
        return []
    names = shortened([name_of(table, number) for number in numbers])
    title = f"Confusion{of_head}: rows are taken for columns"
    return [Matrix(title, names, counts.tolist())]


def _confused(table: dict[str, Any], of_head: str) -> list[Block]:
    confused = [pair for pair in table["confusion"] if pair[0] != pair[1]][:SHOWN_CONFUSIONS]
    clips = {number: count for number, _, count in table["classes"]}
    rows = [
        [name_of(table, label), name_of(table, taken_for), f"{count:,} of {clips[label]:,}"]
        for label, taken_for, count in confused
    ]
    return [Table(f"Confused most{of_head}", ["class", "taken for", "clips"], rows, long=True)] if rows else []


def _each_class(table: dict[str, Any], of_head: str) -> Table:
    worst = sorted(table["classes"], key=lambda row: (row[1] / row[2], -row[2], row[0]))
    rows = []
    for number, right, clips in worst:
        low, high = wilson(right, clips)
        score = [f"{right / clips:.2%}", f"{low:.0%} to {high:.0%}"]
        rows.append([name_of(table, number), *score, f"{right:,} of {clips:,}"])
    heads = ["class", "top-1", "95 % interval", "clips"]
    return Table(f"Top-1 of each class{of_head}", heads, rows, long=True)


def confusion_counts(table: dict[str, Any]) -> tuple[list[int], npt.NDArray[np.int64]]:
    """(class numbers, clips by class and what it is taken for)."""
    numbers = sorted({number for pair in table["confusion"] for number in pair[:2]})
    if len(numbers) > MATRIX_CLASSES:
        return numbers, np.zeros((0, 0), dtype=np.int64)
    position = {number: row for row, number in enumerate(numbers)}
    counts = np.zeros((len(numbers), len(numbers)), dtype=np.int64)
    for label, taken_for, clips in table["confusion"]:
        counts[position[label], position[taken_for]] = clips
    return numbers, counts


def name_of(table: dict[str, Any], number: int) -> str:
    """A class's name, or its number where it has none."""
    return (table["names"] or {}).get(str(number), str(number))


def draw_confusions(heads: dict[str, Any], folder: Path) -> list[Path]:
    """confusion.png (confusion_noun.png, ...) of each head with at most MATRIX_CLASSES classes; others have none."""
    folder.mkdir(exist_ok=True)
    figures = []
    for head, table in heads.items():
        numbers, counts = confusion_counts(table)
        if 2 <= len(numbers) <= MATRIX_CLASSES:
            path = folder / ("confusion.png" if len(heads) == 1 else f"confusion_{file_word(head)}.png")
            _draw(table, numbers, counts, "" if len(heads) == 1 else head, path)
            figures.append(path)
    return figures


def _draw(table: dict[str, Any], numbers: list[int], counts: npt.NDArray[np.int64], head: str, path: Path) -> None:
    """Rows are classes, columns what they are taken for; the colour is the share of the class's clips."""
    from matplotlib.figure import Figure

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 3.4 + 0.24 * len(numbers)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [for_figure(name) for name in shortened([name_of(table, number) for number in numbers])]
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


def shortened(names: list[str]) -> list[str]:
    """Cut where they are long; with a number where that makes two the same."""
    cut = [name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…" for name in names]
    counts = Counter(cut)
    return [f"{number} {name}" if counts[name] > 1 else name for number, name in enumerate(cut)]
