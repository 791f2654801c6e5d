"""TensorBoard: event files in `tensorboard/<stage>` of the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfa_dist.run.trackers.sink import Line, curves

FOLDER = "tensorboard"


class TensorBoardSink:
    """A folder for each stage, and for each member of a sweep, so that their steps lie over one another.

    After a resume from an earlier step TensorBoard hides what the run before had written from there on (`purge_step`).
    """

    name = "tensorboard"

    def __init__(self, run_dir: Path) -> None:
        self._root = run_dir / FOLDER
        self._make: Any = None
        self._writers: dict[str, Any] = {}

    def load(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # It takes seconds, and few runs use it.

        self._make = SummaryWriter

    def open(self) -> None:
        """Does nothing: a folder is made by its first line."""

    def write(self, line: Line) -> None:
        name = "-".join(str(line[key]) for key in ("stage", "member") if key in line)
        writer = self._writers.get(name)
        if writer is None:
            # An evaluation that is repeated after a resume belongs to a step whose training line stays.
            first = line["step"] + (line["kind"] == "eval")
            writer = self._writers[name] = self._make(str(self._root / name), purge_step=first)
        for curve, value in curves(line):
            writer.add_scalar(curve, value, line["step"])
        if line["kind"] == "eval":
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def abandon(self) -> None:
        """Does nothing: its threads end with the process."""
