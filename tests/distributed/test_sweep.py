"""A sweep on the feature cache: members that train together end with the bits of runs that train alone."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
from pathlib import Path

import pytest
from commands import Train, train, train_ranks
from test_cache import OWN, START
from tiny_runs import events, log_lines, make_workplace, sets

from sfa_dist.checkpoint import file_sha256

ENGINE = "engine.zero=0"
SWEEP = "sweep={adapter.hidden: [0.25, 0.5], model.temporal_depth: [1, 2], seed: [0, 1, 2]}"
MEMBERS = 12
STEPS = 9


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, stage 1's weights and a finished cache in the folder `cache`."""
    place = make_workplace(tmp_path_factory.mktemp("sweep"), OWN.replace("phases: 2", "phases: 2, dir: cache"))
    own = sets("stage1.weights=null", "stage1.schedule.epochs=1", "model.drop_path=0.2")
    assert train(place, *START, "first", *own, "--stage", "stage1").code == 0
    shutil.copy(place / "first" / "stage1" / "weights.safetensors", place / "given.safetensors")
    assert train(place, *START, "first", "--stage", "cache").code == 0
    return place


def start(run: str, *more: str) -> tuple[str, ...]:
    return (*START, run, *sets("model.drop_path=0.2", *more))


@pytest.fixture(scope="module")
def swept(place: Path) -> Path:
    finished = train(place, *start("swept", ENGINE, SWEEP, "checkpoint.every_steps=2", "test.shuffled_frames=true"))
    assert finished.code == 0, finished.err
    return place / "swept"


def weights(run: Path, member: str) -> str:
    return file_sha256(run / "stage2" / "members" / member / "weights.safetensors")


@pytest.mark.parametrize(
    ("member", "own"),
    [("m000", ["adapter.hidden=0.25", "seed=0"]), ("m011", ["adapter.hidden=0.5", "model.temporal_depth=2", "seed=2"])],
)
def test_a_member_is_bit_for_bit_the_run_alone(place: Path, swept: Path, member: str, own: list[str]) -> None:
    run = place / f"alone {member}"
    finished = train(place, *start(run.name, ENGINE, *(f"stage2.{setting}" for setting in own)))
    assert finished.code == 0, finished.err
    assert file_sha256(run / "stage2" / "weights.safetensors") == weights(swept, member)
    alone = json.loads((run / "result.json").read_text())
    [line] = [line for line in json.loads((swept / "result.json").read_text())["sweep"] if line["member"] == member]
    assert all(line[key] == alone[key] for key in ("acc1", "acc5", "loss"))
    lines = {line["step"]: line["loss"] for line in log_lines(run) if line["kind"] == "train"}
    theirs = {
        line["step"]: line["loss"]
        for line in log_lines(swept)
        if line["kind"] == "train" and line.get("member") == member
    }
    assert theirs == lines
    assert len(lines) == STEPS


def test_the_recipe_beside_the_weights_is_that_of_the_run_alone(place: Path, swept: Path) -> None:
    recipe = swept / "stage2" / "members" / "m005" / "recipe.yaml"
    shutil.copy(recipe, place / "m005.yaml")
    finished = train(place, "--recipe", "m005.yaml", "--run-dir", "from recipe", "--stage", "stage2")
    assert finished.code == 0, finished.err
    assert file_sha256(place / "from recipe" / "stage2" / "weights.safetensors") == weights(swept, "m005")


def test_the_result_has_a_line_for_each_and_means_over_seeds(swept: Path) -> None:
    result = json.loads((swept / "result.json").read_text())
    assert [line["member"] for line in result["sweep"]] == [f"m{n:03d}" for n in range(MEMBERS)]
    assert len({weights(swept, line["member"]) for line in result["sweep"]}) == MEMBERS
    assert [mean["settings"] for mean in result["sweep_means"]] == [
        {"adapter.hidden": hidden, "model.temporal_depth": depth} for hidden in (0.25, 0.5) for depth in (1, 2)
    ]
    first = [line["loss"] for line in result["sweep"][:3]]
    assert result["sweep_means"][0]["loss"] == pytest.approx(statistics.fmean(first))
    assert result["sweep_means"][0]["loss_deviation"] == pytest.approx(statistics.stdev(first))
    [best] = [line for line in result["sweep"] if line["member"] == result["best"]]
    assert best["val_acc1"] == max(line["val_acc1"] for line in result["sweep"])
    assert result["acc1"] == best["acc1"]
    assert result["acc1_shuffled_frames"] is not None
    assert result["stages"]["stage2"]["members"] == MEMBERS
    page = (swept / "report.md").read_text()
    assert page.count("| m0") == MEMBERS
    assert "±" in page


def test_members_of_any_depth_take_the_first_blocks_of_stage_1(swept: Path) -> None:
    sizes = {
        json.dumps(line["settings"]): line["trainable_parameters"]
        for line in json.loads((swept / "result.json").read_text())["sweep"]
    }
    assert len(set(sizes.values())) == 4
    said = (swept / "console.log").read_text()
    assert "m003: stage2: model.temporal_depth is 2 and was 1 in stage 1: the first 1 blocks are taken from it" in said
    assert "m000: stage2: model.temporal_depth" not in said


def test_kill_9_and_a_stop_request_change_nothing(place: Path, swept: Path) -> None:
    run = place / "disturbed"
    words = start("disturbed", ENGINE, SWEEP, "checkpoint.every_steps=2")
    members = run / "stage2" / "members"
    started = Train(place, *words)
    started.signal_when((members / "m004" / "checkpoints" / "step-00000004").exists, signal.SIGKILL)
    assert started.wait().code == -signal.SIGKILL
    started = Train(place, *words)
    started.signal_when((members / "m009" / "checkpoints" / "step-00000006").exists, signal.SIGTERM)
    assert started.wait().code == 75
    [preempted] = events(run, "preempted")
    stands = [max(path.name for path in (members / f"m{n:03d}" / "checkpoints").iterdir()) for n in range(MEMBERS)]
    assert min(stands) >= f"step-{preempted['step'] - 1:08d}"
    finished = train(place, *words)
    assert finished.code == 0, finished.err
    for number in range(MEMBERS):
        assert weights(run, f"m{number:03d}") == weights(swept, f"m{number:03d}")
    again = train(place, *words)
    assert again.code == 0
    assert "stage2: done before, skipped" in again.out


def test_two_ranks_under_zero(place: Path, swept: Path) -> None:
    """Several DeepSpeed engines in one process; the losses are those of one rank, within 1e-3."""
    words = start("two", "engine.zero=2", "sweep={optimizer.lr: [0.3, 0.1]}", "model.drop_path=0.0")
    for rank in train_ranks(2, place, *words):
        finished = rank.wait()
        assert finished.code == 0, finished.err
    finished = train(place, *start("one", "engine.zero=2", "model.drop_path=0.0", "optimizer.lr=0.1"))
    assert finished.code == 0, finished.err
    alone = {line["step"]: line["loss"] for line in log_lines(place / "one") if line["kind"] == "train"}
    second = {
        line["step"]: line["loss"]
        for line in log_lines(place / "two")
        if line["kind"] == "train" and line["member"] == "m001"
    }
    assert second == {step: pytest.approx(loss, rel=1e-3) for step, loss in alone.items()}


REFUSED = {
    "a key that changes the features": ("sweep={frames: [4, 8]}", "cannot vary 'frames'"),
    "a nested key": ("sweep={optimizer: {lr: [1]}}", "expected a list"),
    "a value that is none": ("sweep={adapter.hidden: [0.5, -1]}", "adapter.hidden -1: "),
    "an unknown key": ("sweep={optimizer.learning_rate: [0.5, 1.0]}", "optimizer.learning_rate"),
    "a value twice": ("sweep={seed: [1, 1]}", "different values"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_sweep_that_makes_no_sense_is_refused(place: Path, what: str) -> None:
    override, said = REFUSED[what]
    finished = train(place, *start("refused", override))
    assert finished.code == 78
    assert said in finished.err


def test_a_sweep_needs_a_cache(place: Path) -> None:
    for own in ("stage2.cache=null", "stage2.cache.live_fraction=0.5"):
        finished = train(place, *start("refused", SWEEP, own))
        assert finished.code == 78
        assert "needs a stage2.cache without live clips" in finished.err


def test_a_head_that_diverges_ends_alone(place: Path) -> None:
    """The first of three, in the first epochs; what is left is what it would be alone, and a second start is over."""
    rates = "sweep={optimizer.lr: [1.0e+38, 0.3, 0.1]}"
    words = start("diverging", ENGINE, rates, "optimizer.clip_norm=0.0", "schedule.epochs=4")
    finished = train(place, *words)
    assert finished.code == 0, finished.err
    run = place / "diverging"
    result = json.loads((run / "result.json").read_text())
    assert [line["member"] for line in result["sweep"]] == ["m001", "m002"]
    [lost] = result["sweep_diverged"]
    assert (lost["member"], lost["settings"]) == ("m000", {"optimizer.lr": 1e38})
    assert "not finite" in lost["reason"] or "nan" in lost["reason"]
    [event] = events(run, "diverged")
    assert event["member"] == "m000"
    assert result["stages"]["stage2"]["members"] == 3
    assert "members that diverged" in (run / "report.md").read_text()
    again = train(place, *words)
    assert again.code == 0, again.err
    assert "stage2: done before, skipped" in again.out
    alone = train(place, *start("steady", ENGINE, "optimizer.lr=0.3", "optimizer.clip_norm=0.0", "schedule.epochs=4"))
    assert alone.code == 0, alone.err
    assert file_sha256(place / "steady" / "stage2" / "weights.safetensors") == weights(run, "m001")


def test_without_validation_the_first_head_stands_for_all_and_is_said_to(place: Path) -> None:
    finished = train(place, *start("no val", ENGINE, "sweep={seed: [3, 1]}", "data.val=[]", "data.test=['val/*.tar']"))
    assert finished.code == 0, finished.err
    assert "no member has a validation score (data.val), so m000 stands for the sweep" in finished.out
    assert json.loads((place / "no val" / "result.json").read_text())["best"] == "m000"
    assert "best on validation" not in (place / "no val" / "report.md").read_text()


def test_a_sweep_of_which_nothing_is_left_says_so(place: Path) -> None:
    own = ("optimizer.clip_norm=0.0", "schedule.epochs=4")
    finished = train(place, *start("all lost", ENGINE, "sweep={optimizer.lr: [1.0e+38, 1.0e+37]}", *own))
    assert finished.code == 70
    assert "all 2 members of the sweep have diverged" in finished.err
    assert finished.err.count("\n") == 1
