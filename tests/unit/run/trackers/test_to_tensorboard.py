"""Event files, read back by TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tracked_lines import evaluation, train

from sfa_dist.run.trackers.to_tensorboard import TensorBoardSink


def write(folder: Path, *lines: dict[str, Any]) -> None:
    """One start of a run that writes these lines."""
    sink = TensorBoardSink(folder)
    sink.load()
    sink.open()
    for line in lines:
        sink.write(line)
    sink.close()


def points(folder: Path, curve: str) -> list[tuple[int, float]]:
    read = EventAccumulator(str(folder))
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars(curve)]


def test_each_stage_and_member_has_its_folder(tmp_path: Path) -> None:
    write(tmp_path, train(1, 0.5), train(2, 0.25), evaluation(2, 0.75), train(1, 2.0, "stage2", member="m000"))
    root = tmp_path / "tensorboard"
    assert points(root / "stage1", "train/loss") == [(1, 0.5), (2, 0.25)]
    assert points(root / "stage1", "perf/step_time") == [(1, 0.25), (2, 0.25)]
    assert points(root / "stage1", "val/acc1") == [(2, 0.75)]
    assert points(root / "stage2-m000", "train/m000/loss") == [(1, 2.0)]


def test_a_resume_from_an_earlier_step_replaces_what_it_computes_again(tmp_path: Path) -> None:
    write(tmp_path, *(train(step, step) for step in range(1, 8)))
    write(tmp_path, train(5, 50.0), train(6, 60.0))
    found = points(tmp_path / "tensorboard" / "stage1", "train/loss")
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0)]


def test_an_evaluation_that_is_repeated_leaves_the_step_before_it(tmp_path: Path) -> None:
    write(tmp_path, train(3, 3.0), train(4, 4.0))
    write(tmp_path, evaluation(4, 0.5), train(5, 5.0))
    assert points(tmp_path / "tensorboard" / "stage1", "train/loss") == [(3, 3.0), (4, 4.0), (5, 5.0)]
