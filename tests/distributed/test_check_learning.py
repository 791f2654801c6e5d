"""`sfa check-learning` on clips that can be learned, and on a recipe that cannot learn. What depends on the machine's
speed, how far a training comes, is not asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import assert_refused, sfa
from tiny_runs import SHORT, TRAIN_CLIPS, VAL_CLIPS, make_workplace, sets

TOLD = (
    *("classes", "same clips", "loops", "reading", "mean frame", "small frames", "differences of frames", "baselines"),
    *("overfit", "learn", "shuffled labels", "shuffled frames"),
)
CALL = ("check-learning", "--recipe", "t.yaml", "--seconds", "10")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("checking"), SHORT)


def by_name(told: dict[str, Any]) -> dict[str, Any]:
    return {check["name"]: check for check in told["checks"]}


def test_a_recipe_that_can_learn(place: Path) -> None:
    before = {path.name for path in place.iterdir()}
    finished = sfa(place, *CALL, "--json", *sets("optimizer={name: adamw, lr: 0.003}"))
    told = json.loads(finished.out)
    assert finished.code == (0 if told["passed"] else 3)
    assert tuple(by_name(told)) == TOLD
    assert told["failed"] == []  # Without time something may be undecided.
    checks = by_name(told)
    assert checks["classes"]["values"] == {
        "train": TRAIN_CLIPS,
        "test": VAL_CLIPS,
        "chance_acc1": 1 / 3,
        "majority_acc1": 1 / 3,
    }
    assert checks["same clips"]["values"] == {"same_clips": 0}
    assert checks["loops"]["values"] == {"median_frames": 10.0, "looped": {"stage1": 0.0, "stage2": 0.0}}
    assert checks["mean frame"]["values"]["nearest"] == 1.0  # A class is a level of grey.
    assert checks["baselines"]["verdict"] == "ok"
    assert checks["overfit"]["verdict"] in ("ok", "undecided")
    assert checks["learn"]["values"]["steps"] > 0
    assert {path.name for path in place.iterdir()} <= {*before, "outputs"}  # Which is the tests' own.


def test_a_recipe_that_cannot(place: Path) -> None:
    """A learning rate of zero, test clips that are training clips, a class too many, and a span that no video has."""
    wrong = sets("optimizer.lr=0.0", "data.val=['train/*.tar']", "data.stride=4", "model.classes=4")
    finished = sfa(place, *CALL, *wrong)
    assert finished.code == 3, finished.err
    lines = {line[:21].strip(): line for line in finished.out.splitlines()}
    assert lines["same clips"].split()[2] == "fail"
    assert "24 of 24 test clips are training clips" in " ".join(finished.out.split())
    assert lines["loops"].split()[1] == "note"
    assert lines["classes"].split()[1] == "note"
    assert lines["overfit"].split()[1] in ("fail", "undecided")
    assert lines["learn"].split()[1] == "note"
    assert "Do not train yet: same clips" in finished.out


def test_it_is_refused_like_a_run(place: Path) -> None:
    assert_refused(sfa(place, *CALL, *sets("data.train=['none/*.tar']")), 65, "no shard matches")
    assert_refused(sfa(place, *CALL, *sets("model.classes=2")), 65, "does not fit model.classes = 2")
