"""Contact sheets: one PNG with a row for each of some frames and a column for each clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sfa_dist.boundary.plain import for_figure
from sfa_dist.data.sampling.clip_sampling import spread_frames

CELL_INCHES = 1.5
TITLE_INCHES = 0.75


@dataclass(frozen=True)
class Column:
    """A clip, uint8 (T, H, W, 3), with its title; `notes` has a text to show below each of the T frames."""

    title: str
    frames: torch.Tensor
    notes: Sequence[str] = ()


def draw_sheet(path: Path, title: str, columns: Sequence[Column], rows: int) -> Path:
    """Writes at most `rows` frames of each column, evenly spaced from first to last; returns `path`."""
    from matplotlib.figure import Figure

    chosen = spread_frames(len(columns[0].frames), rows)
    width, height = CELL_INCHES * len(columns), CELL_INCHES * len(chosen) + TITLE_INCHES
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(for_figure(title), fontsize=9)
    axes = figure.subplots(len(chosen), len(columns), squeeze=False)
    for cells, frame in zip(axes, chosen, strict=True):
        for cell, column in zip(cells, columns, strict=True):
            cell.imshow(column.frames[frame].numpy(), interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            if frame == 0:
                cell.set_title(for_figure(column.title), fontsize=8)
            if column.notes:
                cell.set_xlabel(column.notes[frame], fontsize=7)
        cells[0].set_ylabel(f"frame {frame}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path
