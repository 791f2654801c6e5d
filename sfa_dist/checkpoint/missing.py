"""Checkpoints that log.jsonl records but that are gone from the folder.

Without this check a purged scratch disk, an unmounted disk or a dangling link would look like a stage that has not
begun.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfa_dist.boundary.disk import parse_json

MAX_LINE = 2**20  # Bytes; no relevant line is as long.


@dataclass(frozen=True)
class LoggedSteps:
    """How far a stage has come since it last began: its last step, and the step of its last checkpoint (0: none)."""

    step: int = 0
    saved: int = 0


def logged_steps(log: Path, stage: str, member: str | None = None) -> LoggedSteps:
    """What log.jsonl records of a stage, or of a member of its sweep. Unreadable lines are skipped."""
    logged, mark = LoggedSteps(), f'"stage": "{stage}"'.encode()
    try:
        with log.open("rb") as file:
            while line := file.readline(MAX_LINE):
                if mark in line:
                    logged = _after(logged, line, stage, member)
    except OSError:
        pass  # Without a log there is nothing to compare with.
    return logged


def _after(logged: LoggedSteps, line: bytes, stage: str, member: str | None) -> LoggedSteps:
    try:
        record = parse_json(line)
    except ValueError:
        return logged
    if not isinstance(record, dict) or record.get("stage") != stage or record.get("member") != member:
        return logged
    step, event = record.get("step"), record.get("event")
    if type(step) is not int:
        return logged
    if event in ("start", "resume"):
        return LoggedSteps(step, step)
    if event == "checkpoint":
        return LoggedSteps(max(logged.step, step), step)
    return LoggedSteps(step, logged.saved) if record.get("kind") == "train" else logged


def missing(logged: LoggedSteps, root: Path, newest: int) -> tuple[str, bool]:
    """(a message about what is gone, whether the run must stop for it). The message is empty if nothing is gone.

    `newest` is the step of the newest checkpoint under `root` (0: none).

    A stage whose folder exists but whose checkpoints are all gone does not start over by itself: they may be on a
    disk that is not mounted, and new ones would replace them. To start over, the user removes the folder.
    """
    if newest >= logged.saved:
        if newest or not logged.step:
            return "", False
        return f"was at step {logged.step} and had no checkpoint yet: starts over from step 0", False
    if newest:
        lost = logged.step - newest
        return f"the checkpoint of step {logged.saved} is gone: goes on from step {newest}, {lost} steps again", False
    gone = f"was at step {logged.step}, and its checkpoints (the last of step {logged.saved}) are gone from {root}"
    if root.parent.exists() or root.parent.is_symlink():
        return gone, True
    return f"{gone}, with the stage's folder: starts over from step 0", False
