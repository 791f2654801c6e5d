"""The judge of `sfa chaos` is not blind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfa_dist.chaos.oracle import compare, compare_closely


def write_log(run: Path, *steps: tuple[int, float], more: str = "") -> Path:
    run.mkdir()
    (run / "stage1").mkdir()
    (run / "stage1" / "weights.safetensors").write_bytes(b"weights")
    lines = [{"kind": "train", "stage": "stage1", "step": step, "loss": loss, "grad_norm": 1.0} for step, loss in steps]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + more)
    return run


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_log(tmp_path / "reference", (1, 0.5), (2, 0.25))


def test_the_same_run_has_no_difference(tmp_path: Path, reference: Path) -> None:
    run = write_log(tmp_path / "run", (1, 0.5), (2, 0.25), (2, 0.25), more='{"kind": "train", "sta')
    assert compare(run, reference) == []


def test_the_last_bit_of_a_loss_counts(tmp_path: Path, reference: Path) -> None:
    run = write_log(tmp_path / "run", (1, 0.5), (2, 0.25000000000000006))
    [line] = compare(run, reference)
    assert line.startswith("stage1 2: ")
    assert "0.25000000000000006" in line


def test_a_missing_step_and_other_weights_count(tmp_path: Path, reference: Path) -> None:
    run = write_log(tmp_path / "run", (1, 0.5))
    (run / "stage1" / "weights.safetensors").write_bytes(b"other")
    lines = compare(run, reference)
    assert ["missing" in lines[0], lines[1].startswith("weights of stage1")] == [True, True]


def test_a_step_that_contradicts_itself_counts(tmp_path: Path, reference: Path) -> None:
    run = write_log(tmp_path / "run", (1, 0.5), (2, 0.25), (2, 0.26))
    [line] = compare(run, reference)
    assert "when it was run again" in line


def test_an_empty_reference_proves_nothing(tmp_path: Path) -> None:
    empty = [tmp_path / "one", tmp_path / "other"]
    for folder in empty:
        folder.mkdir()
    assert "holds no finished stage" in compare(*empty)[0]


def test_closeness_is_tight_where_the_run_went_on(tmp_path: Path, reference: Path) -> None:
    resumed = json.dumps({"kind": "event", "event": "resume", "stage": "stage1", "step": 1}) + "\n"
    run = write_log(tmp_path / "run", (1, 0.5001), (2, 0.2501), more=resumed)
    assert compare_closely(run, reference, first=1e-2, later=1e-2)[0] == []
    [line] = compare_closely(run, reference, first=1e-5, later=1e-2)[0]
    assert line.startswith("stage1 2: ")
    assert compare_closely(reference, reference, 1.0, 1.0)[0] == ["the run was never resumed"]
    nothing = write_log(tmp_path / "nothing", (1, 0.5), more=resumed)
    assert "stage1 2: loss nan" in compare_closely(nothing, reference, 1.0, 1.0)[0][0]
