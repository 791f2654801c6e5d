"""A save goes on while training does, in turns, and can be called off."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import OneRankEngine, names
from whole_save import save_checkpoint

from sfa_dist import checkpoint as ckpt
from sfa_dist.checkpoint import writing
from sfa_dist.errors import CheckpointError
from sfa_dist.parallel.runtime import Runtime


def test_what_is_saved_is_what_was_there_at_the_boundary(
    runtime: Runtime, engine: OneRankEngine, root: Path, tmp_path: Path
) -> None:
    """And the same bytes as a save that is waited for."""
    state = {"progress": {"step": 1}}
    waited_for = save_checkpoint(tmp_path / "twin", 1, engine, state, runtime, keep=1)
    saver = ckpt.Saver(root, runtime, keep=1)
    saver.begin(1, engine, state)
    state["progress"]["step"] = 2
    for tensor in engine.state():
        tensor.fill_(7.0)
    outcome = saver.finish()
    assert outcome is not None
    assert names(outcome.path) == names(waited_for)
    for name in names(waited_for):
        assert (outcome.path / name).read_bytes() == (waited_for / name).read_bytes(), name


def test_a_save_takes_its_turns_at_the_boundaries(runtime: Runtime, engine: OneRankEngine, root: Path) -> None:
    saver = ckpt.Saver(root, runtime, keep=1)
    assert saver.status() == (False, False)
    assert saver.advance(0, 0) is None
    saver.begin(1, engine, {})
    with pytest.raises(RuntimeError, match="in flight"):
        saver.begin(2, engine, {})
    outcome = None
    end = time.monotonic() + 60
    while outcome is None and time.monotonic() < end:
        outcome = saver.advance(*saver.status())
    assert outcome is not None
    assert (outcome.step, outcome.refused) == (1, None)
    assert 0 < outcome.blocked_seconds < outcome.seconds
    assert ckpt.verify(outcome.path) is None
    assert saver.status() == (False, False)
    assert saver.finish() is None


def test_a_rank_that_is_still_busy_holds_the_turn(runtime: Runtime, engine: OneRankEngine, root: Path) -> None:
    saver = ckpt.Saver(root, runtime, keep=1)
    saver.begin(1, engine, {})
    for _ in range(100):
        assert saver.advance(1, 0) is None  # As if another rank had not ended.
    assert ckpt.list_checkpoints(root) == []
    assert saver.finish() is not None


def test_a_failure_of_another_rank_calls_this_one_off(
    runtime: Runtime, engine: OneRankEngine, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = ckpt.Saver(root, runtime, keep=1)
    gathered: list[Any] = []

    def gather(self: Runtime, value: Any) -> list[Any]:
        gathered.append(value)
        return [value, ("disk", "rank 1 on b could not write c: d")]

    saver.begin(1, engine, {})
    monkeypatch.setattr(Runtime, "gather", gather)
    with pytest.raises(CheckpointError, match="rank 1 on b could not write c: d; older checkpoints are untouched"):
        saver.advance(1, 1)
    assert gathered == [None]
    assert names(root) == []


def test_a_save_that_is_abandoned_ends_soon_and_leaves_no_checkpoint(
    runtime: Runtime, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "CHUNK", 4)
    written: list[int] = []

    def slow(descriptor: int, data: memoryview, place: int) -> None:
        written.append(len(data))
        time.sleep(0.01)

    monkeypatch.setattr(writing, "_write_all", slow)
    engine = OneRankEngine(size=(500, 500))
    saver = ckpt.Saver(root, runtime, keep=1)
    saver.begin(1, engine, {})
    saver.abandon()
    end = time.monotonic() + 30
    while saver.status()[0]:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert len(written) < 1000  # Of 250 000.
    assert ckpt.list_checkpoints(root) == []
