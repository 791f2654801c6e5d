"""Checkpoints that are gone from the folder but recorded in log.jsonl.

A purged scratch disk, an unmounted one and a dangling link all look like a stage that has not begun.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfa_dist.boundary.disk import parse_json

MAX_LINE = 2**20  # Bytes; no relevant line is as long.


@dataclass(frozen=True)
class LoggedSteps:
    """How far a stage has come since it began last: its last step, and that of its last checkpoint (0: none)."""

    step: int = 0
    saved: int = 0


def logged_steps(log: Path, stage: str, member: str | None = None) -> LoggedSteps:
    """What log.jsonl records of a stage, or of a member of its sweep. Unreadable lines are skipped."""
    told, mark = LoggedSteps(), f'"stage": "{stage}"'.encode()
    try:
        with log.open("rb") as file:
            while line := file.readline(MAX_LINE):
                if mark in line:
                    told = _after(told, line, stage, member)
    except OSError:
        pass  # Without a log there is nothing to compare with.
    return told


def _after(told: LoggedSteps, line: bytes, stage: str, member: str | None) -> LoggedSteps:
    try:
        record = parse_json(line)
    except ValueError:
        return told
    if not isinstance(record, dict) or record.get("stage") != stage or record.get("member") != member:
        return told
    step, event = record.get("step"), record.get("event")
    if type(step) is not int:
        return told
    if event in ("start", "resume"):
        return LoggedSteps(step, step)
    if event == "checkpoint":
        return LoggedSteps(max(told.step, step), step)
    return LoggedSteps(step, told.saved) if record.get("kind") == "train" else told


def missing(told: LoggedSteps, root: Path, newest: int) -> tuple[str, bool]:
    """(what is gone, in words; whether the run must stop for it), where the newest checkpoint under `root` is of step
    `newest` (0: none). The words are empty when nothing is gone.

    A stage whose folder exists but whose checkpoints are all gone does not start over by itself: they may be on a
    disk that is not mounted, and new ones would replace them. Removing the folder asks for a new start.
    """
    if newest >= told.saved:
        if newest or not told.step:
            return "", False
        return f"was at step {told.step} and had no checkpoint yet: starts over from step 0", False
    if newest:
        lost = told.step - newest
        return f"the checkpoint of step {told.saved} is gone: goes on from step {newest}, {lost} steps again", False
    gone = f"was at step {told.step}, and its checkpoints (the last of step {told.saved}) are gone from {root}"
    if root.parent.exists() or root.parent.is_symlink():
        return gone, True
    return f"{gone}, with the stage's folder: starts over from step 0", False
