"""The judge: compares a run directory with that of an undisturbed run.

Bit for bit: the loss and gradient norm of every step, every evaluation, and the sha256 of all final weights. A step
that ran twice, before and after a kill, must have the same values both times.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfa_dist.boundary.file_names import LOG, WEIGHTS
from sfa_dist.checkpoint import file_sha256
from sfa_dist.recipe.schema import STAGE_NAMES

Step = tuple[str, int]
# The keys that identify an evaluation, and its results.
EVALUATION_KEYS = ("stage", "step", "views", "frame_order")
FINDINGS = ("acc1", "acc5", "loss", "samples")


@dataclass
class Evidence:
    """The evidence in a run directory; `contradictions` are steps that ran twice and differ.

    `steps` are (loss, grad_norm) by (stage, step), `evaluations` the values of FINDINGS by those of EVALUATION_KEYS,
    `weights` the sha256 by stage.
    """

    steps: dict[Step, tuple[Any, Any]] = field(default_factory=dict)
    evaluations: dict[tuple[Any, ...], tuple[Any, ...]] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    contradictions: list[str] = field(default_factory=list)


def log_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl, except for those that a kill cut short. Empty if there is no log yet."""
    try:
        text = (run / LOG).read_text(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in map(_parse, text.splitlines()) if line is not None]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """The events of this name in log.jsonl."""
    return [line for line in log_lines(run) if line.get("event") == name]


def read_run(run: Path, stages: tuple[str, ...] = STAGE_NAMES) -> Evidence:
    """The evidence of these stages; that of all stages includes the final test."""
    wanted = {*stages, "test"} if stages == STAGE_NAMES else set(stages)
    found = Evidence()
    for line in log_lines(run):
        if line.get("stage") not in wanted:
            continue
        if line["kind"] == "train":
            key: tuple[Any, ...] = (line["stage"], line["step"])
            _note(found, found.steps, key, (line["loss"], line["grad_norm"]))
        elif line["kind"] == "eval":
            key = tuple(line.get(name) for name in EVALUATION_KEYS)
            _note(found, found.evaluations, key, tuple(line[name] for name in FINDINGS))
    for stage in stages:
        file = run / stage / WEIGHTS
        if file.is_file():
            found.weights[stage] = file_sha256(file)
    return found


def compare(run: Path, reference: Path, stages: tuple[str, ...] = STAGE_NAMES) -> list[str]:
    """The differences, one a line; none if both runs are the same to the last bit."""
    ours, theirs = read_run(run, stages), read_run(reference, stages)
    lines = list(ours.contradictions)
    lines += _differences("", ours.steps, theirs.steps, "(loss, grad_norm)")
    lines += _differences("evaluation ", ours.evaluations, theirs.evaluations, str(FINDINGS))
    lines += _differences("weights of ", ours.weights, theirs.weights, "sha256")
    if not theirs.steps or not theirs.weights:
        lines.append(f"the reference {reference} holds no finished stage to compare with")
    return lines


def compare_closely(run: Path, reference: Path, first: float, later: float) -> tuple[list[str], float]:
    """The losses that differ by more than a relative tolerance, one a line, and the largest relative difference.

    For one state that is trained on with sums in another order (other ranks, another engine). `first` is the tolerance
    of the first step after the run's last resume, which still shows the resumed state; `later` is that of all others.
    """
    ours, theirs = read_run(run), read_run(reference)
    resumed = next(((e["stage"], e["step"] + 1) for e in reversed(events(run, "resume"))), None)
    lines, largest = [], 0.0
    for key in sorted(ours.steps.keys() | theirs.steps.keys()):
        values = [side.steps.get(key, (math.nan, 0))[0] for side in (ours, theirs)]
        gap = _relative(*values)
        largest = max(largest, gap) if gap < math.inf else math.inf
        if not gap <= (first if key == resumed else later):
            lines.append(f"{_name(key)}: loss {values[0]!r}, undisturbed {values[1]!r} (relative {gap:.1e})")
    if resumed is None:
        lines.append("the run was never resumed")
    return lines, largest


def _relative(ours: Any, theirs: Any) -> float:
    """|ours - theirs| / |theirs|; infinite if one is missing or not finite (such a loss is logged as a word)."""
    if not all(isinstance(value, float) and math.isfinite(value) for value in (ours, theirs)):
        return math.inf
    return abs(ours - theirs) / max(abs(theirs), 1e-12)


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "kind" in line else None


def _note(found: Evidence, table: dict[Any, Any], key: tuple[Any, ...], value: tuple[Any, ...]) -> None:
    before = table.setdefault(key, value)
    if before != value:
        found.contradictions.append(f"{_name(key)}: {before!r} the first time, {value!r} when it was run again")


def _differences(what: str, ours: dict[Any, Any], theirs: dict[Any, Any], values: str) -> list[str]:
    lines = []
    for key in sorted(ours.keys() | theirs.keys(), key=str):
        if ours.get(key) != theirs.get(key):
            shown = [repr(side[key]) if key in side else "missing" for side in (ours, theirs)]
            lines.append(f"{what}{_name(key)}: {values} {shown[0]}, undisturbed {shown[1]}")
    return lines


def _name(key: Any) -> str:
    return key if isinstance(key, str) else " ".join(str(part) for part in key if part is not None)
