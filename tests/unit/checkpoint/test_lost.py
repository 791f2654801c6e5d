"""Checkpoints that are gone are missed: log.jsonl tells of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfa_dist.checkpoint.missing import LoggedSteps, logged_steps, missing

START = {"kind": "event", "event": "start", "stage": "stage1", "step": 0}


def train(step: int, **more: object) -> dict[str, object]:
    return {"kind": "train", "stage": "stage1", "step": step, **more}


def saved(step: int, **more: object) -> dict[str, object]:
    return {"kind": "event", "event": "checkpoint", "stage": "stage1", "step": step, **more}


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], LoggedSteps(0, 0)),
        ([START], LoggedSteps(0, 0)),
        ([START, train(1), train(2), saved(2), train(3)], LoggedSteps(3, 2)),
        ([START, train(1), train(2), saved(2), START], LoggedSteps(0, 0)),
        ([START, train(1), train(2), saved(2), START, train(1)], LoggedSteps(1, 0)),
        ([START, train(6), saved(6), {**START, "event": "resume", "step": 2}, train(3)], LoggedSteps(3, 2)),
        ([START, train(2, stage="stage2"), saved(2, member="m1")], LoggedSteps(0, 0)),
        ([START, train(2), ["stage1"], {"stage": "stage1"}, saved("2")], LoggedSteps(2, 0)),  # type: ignore[arg-type]
    ],
)
def test_how_far_a_stage_has_come(tmp_path: Path, lines: list[object], told: LoggedSteps) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "stage1", "st')
    assert logged_steps(log, "stage1") == told


def test_a_member_of_a_sweep_has_its_own(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps(line) for line in (saved(2, member="m0"), saved(4, member="m1"))))
    assert logged_steps(log, "stage1", "m0").saved == 2
    assert logged_steps(log, "stage1", "m1").saved == 4
    assert logged_steps(tmp_path / "none", "stage1") == LoggedSteps()


def test_what_is_missed(tmp_path: Path) -> None:
    root = tmp_path / "stage1" / "checkpoints"
    assert missing(LoggedSteps(7, 6), root, 6) == ("", False)
    assert missing(LoggedSteps(7, 4), root, 6) == ("", False)  # Killed before it could say so.
    assert missing(LoggedSteps(0, 0), root, 0) == ("", False)
    words, forbids = missing(LoggedSteps(7, 6), root, 4)
    assert "step 6 is gone: goes on from step 4, 3 steps again" in words
    assert not forbids
    words, forbids = missing(LoggedSteps(3, 0), root, 0)
    assert "was at step 3 and had no checkpoint yet: starts over" in words
    assert not forbids
    words, forbids = missing(LoggedSteps(7, 6), root, 0)  # The whole folder is gone: somebody wants it anew.
    assert "was at step 7" in words
    assert "starts over from step 0" in words
    assert not forbids
    root.parent.symlink_to(tmp_path / "a disk that is away")
    assert missing(LoggedSteps(7, 6), root, 0)[1]
    root.parent.unlink()
    root.parent.mkdir()
    words, forbids = missing(LoggedSteps(7, 6), root, 0)
    assert "(the last of step 6) are gone" in words
    assert forbids
