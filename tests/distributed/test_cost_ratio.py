"""The cost ratio in whole runs: timing end-to-end steps changes nothing of the run, and a baseline may come later."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import train, train_ranks
from tiny_runs import SHORT, START, events, losses, make_workplace, read_json, scores, sets

CALIBRATED = sets("log.calibrate_steps=2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, a recipe, and two runs of it: `plain`, and `timed` with its end-to-end steps."""
    place = make_workplace(tmp_path_factory.mktemp("cost"), SHORT)
    for name, more in (("plain", []), ("timed", CALIBRATED)):
        finished = train(place, *START, name, *more)
        assert finished.code == 0, finished.err
    return place


def test_timing_changes_no_bit_of_the_run(place: Path) -> None:
    plain, timed = place / "plain", place / "timed"
    assert losses(plain) == losses(timed)
    assert scores(plain) == scores(timed)
    files = [
        {str(path.relative_to(run)) for path in run.rglob("*") if "figures" not in path.parts} for run in (plain, timed)
    ]
    assert files[1] - files[0] == {"stage2/calibration.json"}
    for name in ("stage1", "stage2"):
        weights = [(run / name / "weights.safetensors").read_bytes() for run in (plain, timed)]
        assert weights[0] == weights[1]


def test_the_result_says_where_the_ratio_comes_from(place: Path) -> None:
    unknown, known = (read_json(place / name / "result.json") for name in ("plain", "timed"))
    assert (unknown["cost_ratio"], unknown["cost_ratio_source"]) == (None, None)
    assert unknown["cost_ratio_reason"] == "neither log.baseline nor log.calibrate_steps is set"
    terms, step = known["cost_ratio_terms"], read_json(place / "timed" / "stage2" / "calibration.json")["step_seconds"]
    stages = known["stages"]
    assert terms["seconds"] == stages["stage1"]["seconds"] + stages["stage2"]["seconds"]
    assert terms["baseline_seconds"] == step * stages["stage2"]["steps"]
    assert (known["cost_ratio_source"], terms["timed_steps"]) == ("calibrated", 2)
    assert known["cost_ratio"] == terms["seconds"] / terms["baseline_seconds"]
    assert "(calibrated: 2 timed steps)" in (place / "timed" / "report.md").read_text()


def test_a_baseline_may_come_after_the_run(place: Path) -> None:
    """Nothing is trained or tested again, and the steps that were timed are not timed again."""
    baseline = train(place, *START, "baseline", *sets("stage2=null", "stage1.frames=8"))
    assert baseline.code == 0, baseline.err
    assert read_json(place / "baseline" / "result.json")["cost_ratio"] is None
    before = (place / "timed" / "stage2" / "calibration.json").read_bytes()
    again = train(place, *START, "timed", *CALIBRATED, *sets("log.baseline=baseline"))
    assert again.code == 0, again.err
    result = read_json(place / "timed" / "result.json")
    assert (result["cost_ratio_source"], result["cost_ratio_terms"]["baseline"]) == ("measured", "baseline")
    assert f"cost ratio {result['cost_ratio']:.2f} (measured: baseline)" in again.out
    assert "the test was done before" in again.out
    assert (place / "timed" / "stage2" / "calibration.json").read_bytes() == before
    assert len(events(place / "timed", "start")) == 2  # Of both stages, in the first start.


def test_the_ranks_time_their_steps_together(place: Path) -> None:
    for process in train_ranks(2, place, *START, "ranks", *sets("engine.name=fsdp"), *CALIBRATED):
        finished = process.wait()
        assert finished.code == 0, finished.err
    timed = read_json(place / "ranks" / "stage2" / "calibration.json")
    assert (timed["ranks"], timed["reason"]) == (2, None)
    assert read_json(place / "ranks" / "result.json")["cost_ratio"] > 0
