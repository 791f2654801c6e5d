"""The paper's Table 4, "frames accessible", continued to 1,024 frames: this project's plan beside the paper's ticks.

The paper trains on 64 TPUv3 cores of 16 GB with one clip each, and ViViT-B on RTX 2080 Ti cards. Here the same number
of ranks runs the project's own way: ZeRO-2, one clip a rank, SGD with momentum; bf16 on the 16 GB card, fp32
on the 2080 Ti, which has no bf16 units.

No single recipe reproduces all out-of-memory cells of the paper: end to end on 16 GB, ViViT-H needs recomputation for
96 frames, and with it ViViT-g, 1.6 times as large, fits more than the paper's 8 frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from sfa_dist.plan.cards import Card, card_of_size, find_card, largest_peak
from sfa_dist.plan.memory import predict
from sfa_dist.plan.search import largest_frames, with_frames
from sfa_dist.recipe.schema import Stage1, Stage2, StageBlock

PAPER_FRAMES = (4, 8, 16, 32, 48, 64, 96, 128)
FRAMES = (*PAPER_FRAMES, 256, 512, 1024)
# The most frames that the paper has a tick for; ViViT-B from section 4.7, where the card is called a 12 GB one.
PAPER = {"ViViT-H": 96, "SFA-ViViT-H": 128, "ViViT-g": 8, "SFA-ViViT-g": 64, "ViViT-B": 16, "SFA-ViViT-B": 80}


@dataclass(frozen=True)
class Row:
    """A model and how it is trained; `largest` is the most frames, up to 1,024, that fit `card` on `ranks` ranks.

    `paper` is the paper's number, None where it has no such row.
    """

    model: str
    temporal_depth: int
    activation: str
    card: Card
    ranks: int
    largest: int
    paper: int | None

    def as_json(self) -> dict[str, Any]:
        """Plain values, with a tick (true or false) for each number of frames."""
        ticks = {str(frames): frames <= self.largest for frames in FRAMES}
        card = {"name": self.card.name, "gib": self.card.gib}
        return {**vars(self), "card": card, "ticks": ticks}


def table4(ranks: int = 64) -> list[Row]:
    """All rows. This takes one to two minutes: each row needs several traces."""
    rows = []
    for size, card, precision, depths in (
        ("H", card_of_size(16), "bf16", (4,)),
        ("g", card_of_size(16), "bf16", (4, 20)),
        ("B", find_card("2080Ti"), "fp32", (4,)),
    ):
        for depth in depths:
            for sfa in (False, True):
                for activation in ("keep", "checkpoint"):
                    rows.append(_row(size, depth, sfa, activation, card, precision, ranks))
    return rows


def _row(size: str, depth: int, sfa: bool, activation: str, card: Card, precision: str, ranks: int) -> Row:
    stage = table4_stage(size, depth, sfa, precision, ranks)
    stage = stage.model_copy(update={"activation": activation})
    known = predict(stage, ranks).peak_bytes
    largest = largest_frames([stage], ranks, largest_peak(card), known, ceiling=FRAMES[-1])
    name = f"{'SFA-' if sfa else ''}ViViT-{size}"
    return Row(name, depth, activation, card, ranks, largest, PAPER[name] if depth == 4 else None)


def table4_stage(size: str, depth: int, sfa: bool, precision: str, ranks: int, frames: int = 8) -> StageBlock:
    """The stage of a row: one clip a rank on Kinetics-400, 224 pixels; stage 2 with `sfa`, else end to end."""
    kind = Stage2 if sfa else Stage1
    stage = kind.model_validate(
        {
            "frames": 8,
            "model": {"size": size, "classes": 400, "temporal_depth": depth},
            "data": {},
            "batch": {"size": ranks, "micro": 1},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "schedule": {"epochs": 30},
            "engine": {"zero": 2, "precision": precision},
        }
    )
    return with_frames(stage, frames)


def print_table4(rows: Sequence[Row]) -> None:
    """Prints each row, and below it the paper's, where it has one. + fits, - does not, blank is not in the paper."""
    table = Table(box=None, header_style="", pad_edge=False)
    for heading in ("model", "Lt", "activations", "card"):
        table.add_column(heading)
    for frames in (*FRAMES, "largest"):
        table.add_column(str(frames), justify="right")
    for row in rows:
        ticks = ["+" if frames <= row.largest else "-" for frames in FRAMES]
        largest = f"{row.largest}{' or more' if row.largest == FRAMES[-1] else ''}"
        table.add_row(row.model, str(row.temporal_depth), row.activation, row.card.name, *ticks, largest)
        if row.paper is not None:
            ticks = ["+" if frames <= row.paper else "-" for frames in PAPER_FRAMES]
            blank = [""] * (len(FRAMES) - len(PAPER_FRAMES))
            table.add_row("  the paper", "", "", "", *ticks, *blank, str(row.paper))
    console = Console(width=130)
    console.print(
        f"frames that fit: one clip a rank, {rows[0].ranks} ranks, ZeRO-2, SGD; reserve kept", highlight=False
    )
    console.print(table, highlight=False)
