"""What a tracker is, and how it names its curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

Line = Mapping[str, Any]  # A line of log.jsonl, of kind `train` or `eval`.

PERFORMANCE_KEYS = ("step_time", "data_time", "samples_per_second", "memory_gib", "mfu")


class Sink(Protocol):
    """A tracker. Whatever it raises switches it off.

    `load` is called in the run's thread, since imports beside others and beside a fork may lock; the rest in the
    trackers' own.
    """

    name: str

    def load(self) -> None:
        """Imports what the tracker needs."""

    def open(self) -> None:
        """Begins, or goes on with the run that is there already."""

    def write(self, line: Line) -> None:
        """Takes a line."""

    def close(self) -> None:
        """Writes what is left; also called where the tracker was switched off."""

    def abandon(self) -> None:
        """Ends what would hold up the end of the process. Called from another thread when `close` takes too long."""


def curves(line: Line) -> Iterator[tuple[str, float]]:
    """(name, value) of each number of a line: `train/loss`, `val/acc1`, `perf/step_time`, ...

    What is not a number, such as a loss that is not finite, is left out. The members of a sweep have curves of their
    own, and so has the test with shuffled frames.
    """
    group = "train" if line["kind"] == "train" else "test" if line.get("stage") == "test" else "val"
    if "member" in line:
        group = f"{group}/{line['member']}"
    if "frame_order" in line:
        group = f"{group}/{line['frame_order']}_frames"
    for key, value in line.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{'perf' if key in PERFORMANCE_KEYS else group}/{key}", value
