"""The cost ratio of a run directory: which seconds it is made of, and when there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plan_stages import recipe as recipe_of

from sfa_dist.recipe.schema import Recipe
from sfa_dist.run.cost import cost_of, cost_words, with_present_cost
from sfa_dist.run.record import RESULT_NUMBERS

INPUTS = {
    "frames": 128,
    "batch.size": 64,
    "schedule.epochs": 30,
    "data.stride": 1,
    "model.size": "L",
    "train clips (sha256)": "c" * 64,
    "starting weights (sha256)": "w" * 64,
}


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def done(folder: Path, seconds: float, ranks: int = 8, inputs: dict[str, Any] | None = None, steps: int = 100) -> None:
    """The `done.json` of a stage."""
    result = {**dict.fromkeys(RESULT_NUMBERS, 0), "seconds": seconds, "gpu_seconds": seconds * ranks, "steps": steps}
    files = {"weights.safetensors": {"sha256": "w" * 64}}
    write(folder / "done.json", {"inputs": {**INPUTS, **(inputs or {})}, "result": result, "files": files})


def machine(folder: Path, device: str = "H100", ranks: int = 8) -> None:
    write(folder / "env.json", {"ranks": [{"host": f"node{rank}", "device": device} for rank in range(ranks)]})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`run`, which took 200 s and 420 s, and `baseline`, which took 1,000 s."""
    monkeypatch.chdir(tmp_path)
    done(tmp_path / "run" / "stage1", 200, inputs={"frames": 8})
    done(tmp_path / "run" / "stage2", 420)
    done(tmp_path / "baseline" / "stage1", 1000)
    for name in ("run", "baseline"):
        machine(tmp_path / name)
    return tmp_path


def recipe(*overrides: str) -> Recipe:
    return recipe_of("l_128f", *overrides)


def reason(*overrides: str) -> str:
    found = cost_of(Path("run"), recipe(*overrides))
    assert (found["cost_ratio"], found["cost_ratio_source"]) == (None, None)
    return str(found["cost_ratio_reason"])


MEASURED = "log.baseline=baseline"
CALIBRATED = "log.calibrate_steps=5"


def test_a_measured_ratio_names_its_baseline(place: Path) -> None:
    found = cost_of(Path("run"), recipe(MEASURED))
    assert found == {
        "cost_ratio": 0.62,
        "cost_ratio_source": "measured",
        "cost_ratio_terms": {"seconds": 620, "baseline_seconds": 1000, "baseline": "baseline"},
    }
    assert cost_words(found) == "measured: baseline"


def test_a_calibrated_ratio_says_how_many_steps_were_timed(place: Path) -> None:
    write(place / "run" / "stage2" / "calibration.json", {"steps": 5, "ranks": 8, "step_seconds": 12.4})
    found = cost_of(Path("run"), recipe(CALIBRATED))
    assert found == {
        "cost_ratio": 0.5,
        "cost_ratio_source": "calibrated",
        "cost_ratio_terms": {"seconds": 620, "baseline_seconds": 1240.0, "timed_steps": 5},
    }
    assert cost_words(found) == "calibrated: 5 timed steps"
    assert cost_of(Path("run"), recipe(CALIBRATED, "log.baseline=nowhere")) == {
        **found,
        "cost_ratio_reason": "log.baseline nowhere has no finished stage 1, in which everything is trained",
    }


def test_a_ratio_that_nobody_asked_for_is_null(place: Path) -> None:
    assert reason() == "neither log.baseline nor log.calibrate_steps is set"
    before = {"acc1": 0.5, "cost_ratio": None}
    assert with_present_cost(before, Path("run"), recipe()) is before


def test_a_baseline_that_comes_later_replaces_what_is_known(place: Path) -> None:
    old = {"acc1": 0.5, "cost_ratio": None, "cost_ratio_reason": "stage 2 is not finished"}
    found = with_present_cost(old, Path("run"), recipe(MEASURED))
    assert (found["acc1"], found["cost_ratio"], "cost_ratio_reason" in found) == (0.5, 0.62, False)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"frames": 64}, "frames 64, in stage 2 128"),
        ({"batch.size": 32}, "batch.size 32, in stage 2 64"),
        ({"schedule.epochs": 10}, "schedule.epochs 10, in stage 2 30"),
        ({"train clips (sha256)": "d"}, "other training clips"),
        ({"model.size": "B"}, "model.size 'B', in stage 2 'L'"),
    ],
)
def test_a_baseline_of_another_training_is_not_compared(place: Path, inputs: dict[str, Any], words: str) -> None:
    done(place / "baseline" / "stage1", 1000, inputs=inputs)
    assert reason(MEASURED) == f"log.baseline baseline cannot be compared: {words}"


def test_a_known_ratio_stays_where_a_start_on_other_devices_cannot_find_it(place: Path) -> None:
    known = cost_of(Path("run"), recipe(MEASURED))
    machine(place / "run", "A100")
    assert cost_of(Path("run"), recipe(MEASURED))["cost_ratio"] is None
    assert with_present_cost(known, Path("run"), recipe(MEASURED)) is known
    assert with_present_cost(known, Path("run"), recipe("log.baseline=baseline/")) is known
    other = recipe("log.baseline=elsewhere")
    assert with_present_cost(known, Path("run"), other)["cost_ratio"] is None


def test_a_stage_without_a_step_was_on_no_ranks(place: Path) -> None:
    done(place / "run" / "stage1", 0, inputs={"frames": 8}, steps=0)
    assert cost_of(Path("run"), recipe(MEASURED))["cost_ratio"] == pytest.approx(0.42)


def test_regularisation_costs_nothing_and_is_not_compared(place: Path) -> None:
    done(place / "baseline" / "stage1", 1000, inputs={"model.drop_path": 0.3, "augment.flip": 0.0, "optimizer.lr": 1.0})
    assert cost_of(Path("run"), recipe(MEASURED))["cost_ratio"] == 0.62


def test_other_machines_ranks_and_lengths_are_not_compared(place: Path) -> None:
    done(place / "baseline" / "stage1", 1000, steps=50)
    assert "50 steps, in stage 2 100" in reason(MEASURED)
    done(place / "baseline" / "stage1", 1000)
    machine(place / "baseline", "A100")
    assert "on 8 x A100, this run on 8 x H100" in reason(MEASURED)
    (place / "baseline" / "env.json").unlink()
    assert "the machine of baseline is not known" in reason(MEASURED)
    machine(place / "baseline")
    done(place / "run" / "stage1", 200, ranks=4)
    assert "different numbers of ranks cannot be compared (stage1 on 4, stage2 on 8, baseline on 8)" in reason(MEASURED)


def test_what_is_not_finished_or_not_end_to_end_is_said(place: Path) -> None:
    assert reason(CALIBRATED) == "end-to-end steps were not timed: run stage 2 with log.calibrate_steps"
    done(place / "baseline" / "stage2", 1)
    assert "is no end-to-end run: it has a stage 2" in reason(MEASURED)
    assert "the recipe has no stage 2" in reason(MEASURED, "stage2=null")
    (place / "run" / "stage2" / "done.json").unlink()
    assert "stage 2 is not finished" in reason(MEASURED)


def test_a_timing_that_failed_or_was_on_other_ranks_is_said(place: Path) -> None:
    file = place / "run" / "stage2" / "calibration.json"
    write(file, {"steps": 5, "ranks": 8, "step_seconds": None, "reason": "90.0 GiB planned, and 70.0 GiB are free"})
    assert reason(CALIBRATED) == "end-to-end steps could not be timed: 90.0 GiB planned, and 70.0 GiB are free"
    write(file, {"steps": 5, "ranks": 4, "step_seconds": 1.0})
    assert "timed on 4 ranks, stage 2 was trained on 8" in reason(CALIBRATED)
    file.write_text("{")
    assert "calibration.json cannot be read" in reason(CALIBRATED)


def test_given_weights_cost_what_their_own_stage_says(place: Path) -> None:
    given = f"stage1.weights={place / 'other' / 'stage1' / 'weights.safetensors'}"
    assert "there is no done.json beside" in reason(MEASURED, given)
    done(place / "other" / "stage1", 80)
    assert cost_of(Path("run"), recipe(MEASURED, given))["cost_ratio"] == 0.5
    done(place / "run" / "stage2", 420, inputs={"starting weights (sha256)": "x"})
    assert "is of other weights" in reason(MEASURED, given)


def test_a_feature_cache_counts(place: Path) -> None:
    cache = "stage2.cache={views: 2}"
    assert "another run built it" in reason(MEASURED, cache)
    done(place / "run" / "cache", 80)
    assert cost_of(Path("run"), recipe(MEASURED, cache))["cost_ratio"] == 0.7
    done(place / "run" / "cache", 0)  # It was in a shared folder.
    assert "another run built it" in reason(MEASURED, cache)
