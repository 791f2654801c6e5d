"""A run that learns nothing says so, on the console, in its files and in its report; one that is finished says that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import Finished, sfa, train
from tiny_runs import SHORT, START, VAL_CLIPS, events, log_lines, make_workplace, read_json, sets

NO_STEP = ("optimizer.lr=0.0", "model.classes=4")  # The head begins at zero: all clips are taken for class 0.
GUESSED = {"chance_acc1": 0.25, "majority_acc1": 1 / 3, "predicted_classes": 1, "better_than_chance": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("guessing"), SHORT)


@pytest.fixture(scope="module")
def guessing(place: Path) -> Finished:
    finished = train(place, *START, "run", *sets(*NO_STEP))
    assert finished.code == 0, finished.err
    return finished


def test_each_stage_and_the_test_say_it_once(guessing: Finished) -> None:
    for name, when in (("stage1", " after 1 epoch"), ("stage2", " after 1 epoch"), ("test", "")):
        assert guessing.out.count(f"{name}: one class predicted, the same for all {VAL_CLIPS} clips") == 1
        words = f"{name}: no better than chance{when}: top-1 33.33% on {VAL_CLIPS} clips, guessing 33.33%"
        assert guessing.out.count(words) == 1
        assert guessing.out.count(f"{name}: what to do: docs/learning.md") == 1
    assert "acc5" not in guessing.out  # Of four classes the right one is always among five.


def test_log_result_and_report_hold_it(guessing: Finished, place: Path) -> None:
    lines = [line for line in log_lines(place / "run") if line["kind"] == "eval"]
    assert [line["stage"] for line in lines] == ["stage1", "stage2", "test"]
    for line in (*lines, read_json(place / "run" / "result.json")):
        assert GUESSED.items() <= line.items()
        assert line["acc5"] == 1.0  # The key stays.
    report = (place / "run" / "report.md").read_text()
    assert "- No better than chance: top-1 33.33%" in report
    assert "- stage1: model.classes is 4, and the labels of the training clips end at 2: set model.classes=3" in report


def test_videos_shorter_than_a_clip_are_counted_while_they_are_read(place: Path) -> None:
    """Shards that others made tell no lengths."""
    finished = train(place, *START, "loops", "--stage", "stage1", *sets("data.stride=4", "data.workers=1"))
    assert finished.code == 0, finished.err
    told = "24 of the 24 clips of the first epoch come from videos shorter than the 13 frames that a clip spans"
    assert finished.out.count(f"stage1: {told}, and are looped") == 1
    assert [event["text"] for event in events(place / "loops", "notice")] == [f"{told}, and are looped"]


def test_classes_that_no_clip_has_are_told_at_the_start(guessing: Finished, place: Path) -> None:
    for stage in ("stage1", "stage2"):
        assert f"{stage}: model.classes is 4, and the labels of the training clips end at 2" in guessing.out
    assert [event["stage"] for event in events(place / "run", "notice")] == ["stage1", "stage2"]


def test_an_evaluation_says_it_too(guessing: Finished, place: Path) -> None:
    finished = sfa(place, "evaluate", "run", "--json")
    assert finished.code == 0, finished.err
    assert GUESSED.items() <= json.loads(finished.out).items()
    assert "test: no better than chance: top-1 33.33%" in finished.err
    table = sfa(place, "evaluate", "run").out
    assert "no better than chance" in table
    assert "top-5" not in table


def test_a_finished_run_says_its_result_again_and_does_not_test(guessing: Finished, place: Path) -> None:
    before = (place / "run" / "result.json").read_bytes()
    tested = len([line for line in log_lines(place / "run") if line["kind"] == "eval"])
    again = train(place, *START, "run", *sets(*NO_STEP))
    assert again.code == 0, again.err
    assert "finished: the test was done before; --stage test makes it again" in again.out
    said = [
        line for line in guessing.out.splitlines() if line.startswith("test: ") and "scores of each clip" not in line
    ]
    assert [line for line in again.out.splitlines() if line.startswith("test: ")] == said
    assert len([line for line in log_lines(place / "run") if line["kind"] == "eval"]) == tested
    assert (place / "run" / "result.json").read_bytes() == before


def test_other_weights_are_not_what_was_tested(guessing: Finished, place: Path) -> None:
    shutil.copytree(place / "run", place / "damaged")
    weights = place / "damaged" / "stage2" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "finished: " not in train(place, *START, "damaged", *sets(*NO_STEP)).out


@pytest.mark.parametrize(
    "words",
    [("--stage", "test"), sets("test.temporal_views=2"), "changed"],
    ids=["asked", "another test", "result.json was changed"],
)
def test_another_test_or_one_that_is_asked_for_is_made(guessing: Finished, place: Path, words: tuple[str, ...]) -> None:
    if words == "changed":
        result = place / "run" / "result.json"
        result.write_text(result.read_text().replace('"acc5"', '"acc6"'))
        words = ()
    again = train(place, *START, "run", *sets(*NO_STEP), *words)
    assert again.code == 0, again.err
    assert "finished: " not in again.out
    assert "acc5" in read_json(place / "run" / "result.json")
