"""What happens where end-to-end steps cannot be timed: the run goes on, and says why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_stages import recipe

from sfa_dist.errors import PreemptedError, RecipeError
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.recipe.schema import Stage2
from sfa_dist.run.context import Run
from sfa_dist.run.tracking import Tracker
from sfa_dist.stages import calibrate as module
from sfa_dist.stages.calibrate import STOPPED, calibrate, end_to_end_stage


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run after its stage 2, whose steps are to be timed."""
    loaded = recipe("demo", "log.calibrate_steps=3", "log.wandb=off")
    runtime = parallel_runtime.start({})
    (tmp_path / "stage2").mkdir()
    tracker = Tracker(tmp_path, loaded.log, {}, {})
    try:
        yield Run(loaded, tmp_path, runtime, tracker, StopFlag(), dry_run=False)
    finally:
        tracker.close()
        parallel_runtime.stop()


def stage_of(run: Run) -> Stage2:
    assert run.recipe.stage2 is not None
    return run.recipe.stage2


def recorded(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.directory / "stage2" / "calibration.json").read_text())
    return found


def times(monkeypatch: pytest.MonkeyPatch, outcome: float | Exception | None) -> list[int]:
    """Lets the timing have this outcome; returns the list of its calls."""
    calls: list[int] = []

    def timed(run: Run, stage: object, steps: int) -> float | None:
        calls.append(steps)
        assert recorded(run)["reason"] == STOPPED  # What a start finds that comes after a killed one.
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(module, "_too_large", lambda run, stage: None)
    monkeypatch.setattr(module, "_seconds_of_a_step", timed)
    return calls


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory on rank 0"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory on rank 0"),
        (RecipeError("compile: ZeRO-3 gathers"), "compile: ZeRO-3 gathers"),
    ],
)
def test_a_timing_that_fails_is_recorded_and_not_tried_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    calls = times(monkeypatch, error)
    for _ in range(2):
        calibrate(run, stage_of(run))
    assert calls == [3]
    assert words in recorded(run)["reason"]
    assert recorded(run)["step_seconds"] is None
    said = (run.directory / "console.log").read_text()
    assert said.count("\n") == 1
    assert "cost_ratio needs log.baseline" in said


def test_another_error_is_not_swallowed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, RuntimeError("a mistake"))
    with pytest.raises(RuntimeError, match="a mistake"):
        calibrate(run, stage_of(run))
    calls = times(monkeypatch, 1.0)
    calibrate(run, stage_of(run))
    assert (calls, recorded(run)["reason"]) == ([], STOPPED)


def test_more_than_the_free_memory_is_not_begun(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda device: 2**20)
    calibrate(run, stage_of(run))
    assert recorded(run)["reason"].endswith("GiB planned, and 0.0 GiB are free")


def test_a_stop_request_is_obeyed_and_the_steps_are_timed_by_the_next_start(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    times(monkeypatch, None)
    monkeypatch.setattr(StopFlag, "__bool__", lambda self: True)
    with pytest.raises(PreemptedError, match="run the same command again"):
        calibrate(run, stage_of(run))
    monkeypatch.undo()
    calls = times(monkeypatch, 0.5)
    calibrate(run, stage_of(run))
    assert (calls, recorded(run)["step_seconds"]) == ([3], 0.5)


def test_the_end_to_end_stage_has_the_settings_of_stage_2(run: Run) -> None:
    stage = stage_of(run)
    whole = end_to_end_stage(stage)
    assert not whole.freezes_trunk
    assert (whole.frames, whole.batch, whole.engine, whole.data) == (
        stage.frames,
        stage.batch,
        stage.engine,
        stage.data,
    )
