"""A run that was stopped anywhere goes on as if it had not been: the same losses to the last bit, the same weights."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Train, train, train_ranks
from tiny_runs import RECIPE, START, events, log_lines, losses, make_workplace, scores, sets

from sfa_dist.checkpoint import file_sha256

# AdamW has two moments and a step count, drop-path draws random numbers in every forward pass: what a resume could
# forget. No image stage, and enough steps that a signal meets the run while it runs.
STEPS = 12
LONG = (
    RECIPE[: RECIPE.index("image:\n")]
    .replace("{name: sgd, lr: 0.3}", "{name: adamw, lr: 0.003}")
    .replace("schedule: {epochs: 2,", "checkpoint: {every_steps: 2, keep: 3}\nschedule: {epochs: 4,")
    + """\
stage1: {frames: 4}
stage2: {frames: 8, chunk_frames: 4}
log: {every: 1, wandb: "off"}
"""
)
DROP_PATH = sets("model.drop_path=0.2")
STAGES = ("stage1", "stage2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("resume"), LONG)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The run that nobody stopped."""
    finished = train(place, *START, "whole", *DROP_PATH)
    assert finished.code == 0, finished.err
    return place / "whole"


@pytest.fixture(scope="module")
def whole_on_two(place: Path) -> Path:
    """The same on two ranks, without drop-path, whose masks depend on the rank."""
    for rank in train_ranks(2, place, *START, "whole on two"):
        finished = rank.wait()
        assert finished.code == 0, finished.err
    return place / "whole on two"


def has(run: Path, stage: str, step: int) -> Callable[[], bool]:
    return (run / stage / "checkpoints" / f"step-{step:08d}").exists


def saw_step(run: Path, stage: str, step: int) -> Callable[[], bool]:
    log, mark = run / "log.jsonl", f'"stage": "{stage}", "step": {step}, "epoch"'
    return lambda: log.is_file() and mark in log.read_text()


def assert_the_same(run: Path, whole: Path) -> None:
    """Every loss, gradient norm and score, of steps that were run twice too, and the bytes of all weights."""
    assert losses(run) == losses(whole)
    assert scores(run) == scores(whole)
    for stage in STAGES:
        assert file_sha256(run / stage / "weights.safetensors") == file_sha256(whole / stage / "weights.safetensors")


def test_the_whole_run_has_all_steps(whole: Path) -> None:
    assert [step for stage, step in losses(whole) if stage == "stage1"] == list(range(1, STEPS + 1))


@pytest.mark.fault(2)
def test_kill_9_in_both_stages(place: Path, whole: Path) -> None:
    """Invariant 4."""
    run = place / "killed"
    for stage, step in (("stage1", 6), ("stage2", 4)):
        started = Train(place, *START, "killed", *DROP_PATH)
        started.signal_when(has(run, stage, step), signal.SIGKILL)
        assert started.wait().code == -signal.SIGKILL
        assert not (run / stage / "done.json").exists()
    finished = train(place, *START, "killed", *DROP_PATH)
    assert finished.code == 0, finished.err
    assert "resumed from" in finished.out
    assert [event["stage"] for event in events(run, "resume")] == ["stage1", "stage2"]
    assert_the_same(run, whole)


@pytest.mark.fault(2)
def test_kill_9_before_the_first_checkpoint(place: Path, whole: Path) -> None:
    run = place / "killed at once"
    started = Train(place, *START, "killed at once", *DROP_PATH)
    started.signal_when(saw_step(run, "stage1", 1), signal.SIGKILL)
    assert started.wait().code == -signal.SIGKILL
    finished = train(place, *START, "killed at once", *DROP_PATH)
    assert finished.code == 0, finished.err
    assert_the_same(run, whole)


@pytest.mark.fault(2, 9)
def test_a_trunk_that_runs_ahead_repeats_and_skips_nothing(place: Path, whole: Path) -> None:
    """A micro-batch whose trunk has run and whose tail has not is not counted, killed or stopped; without it the run
    goes on with the same bits."""
    run, own = place / "ahead", (*START, "ahead", *DROP_PATH)
    on = sets("stage2.overlap=on")
    started = Train(place, *own, *on)
    started.signal_when(has(run, "stage2", 4), signal.SIGKILL)
    assert started.wait().code == -signal.SIGKILL
    started = Train(place, *own, *on)
    started.signal_when(saw_step(run, "stage2", 7), signal.SIGTERM)
    stopped = started.wait()
    assert stopped.code == 75, stopped.err
    assert "stage2: the trunk runs one micro-batch ahead of the tail" in stopped.out
    finished = train(place, *own)
    assert finished.code == 0, finished.err
    assert_the_same(run, whole)
    seen = {line["step"]: line["samples_seen"] for line in log_lines(run) if line.get("samples_seen")}
    assert seen == {line["step"]: line["samples_seen"] for line in log_lines(whole) if line.get("samples_seen")}


@pytest.mark.fault(1, 2)
def test_kill_9_of_two_ranks(place: Path, whole_on_two: Path) -> None:
    run = place / "killed on two"
    ranks = train_ranks(2, place, *START, "killed on two")
    ranks[0].signal_when(has(run, "stage1", 4), signal.SIGKILL)
    ranks[1].send(signal.SIGKILL)
    assert [rank.wait().code for rank in ranks] == [-signal.SIGKILL] * 2
    for rank in train_ranks(2, place, *START, "killed on two"):
        finished = rank.wait()
        assert finished.code == 0, finished.err
    assert events(run, "resume")
    assert_the_same(run, whole_on_two)


@pytest.mark.fault(27)
def test_what_two_ranks_began_one_goes_on_with(place: Path, whole_on_two: Path) -> None:
    """Invariant 4, second half: other ranks and another ZeRO stage, within a tolerance. One rank runs ZeRO 2 as 0."""
    run = place / "other ranks"
    until = {steps: (*sets(f"stage1.schedule.max_steps={steps}"), "--stage", "stage1") for steps in (5, 7)}
    for ranks, own in ((2, until[5]), (1, until[7]), (2, sets("engine.zero=3"))):
        for rank in train_ranks(ranks, place, *START, "other ranks", *own):
            finished = rank.wait()
            assert finished.code == 0, finished.err
    assert [event["step"] for event in events(run, "resume")] == [5, 7]
    said = (run / "console.log").read_text()
    assert "ranks was 2 and is 1" in said
    assert "ranks was 1 and is 2" in said
    expected = losses(whole_on_two)
    for key, (loss, norm) in losses(run).items():
        assert expected[key] == (pytest.approx(loss, rel=1e-3), pytest.approx(norm, rel=1e-2)), key


@pytest.mark.fault(9)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_stop_request_saves_and_says_so(place: Path, whole: Path, number: signal.Signals) -> None:
    run = place / number.name
    started = Train(place, *START, number.name, *DROP_PATH)
    started.signal_when(saw_step(run, "stage1", 3), number)
    stopped = started.wait()
    assert stopped.code == 75, stopped.err
    assert stopped.err.startswith("stopped: stage stage1 stopped at step ")
    assert stopped.err.endswith(f"of {STEPS}; state is saved, run the same command again to go on\n")
    [preempted] = events(run, "preempted")
    assert has(run, "stage1", preempted["step"])()
    finished = train(place, *START, number.name, *DROP_PATH)
    assert finished.code == 0, finished.err
    assert [event["step"] for event in events(run, "resume")] == [preempted["step"]]
    steps = [line["step"] for line in log_lines(run) if line["kind"] == "train" and line["stage"] == "stage1"]
    assert steps == list(range(1, STEPS + 1))
    assert_the_same(run, whole)


@pytest.mark.fault(7)
def test_a_stop_request_to_one_rank_stops_all(place: Path, whole_on_two: Path) -> None:
    run = place / "one rank asked"
    ranks = train_ranks(2, place, *START, "one rank asked")
    ranks[1].signal_when(saw_step(run, "stage1", 3), signal.SIGTERM)
    ended = [rank.wait() for rank in ranks]
    assert [end.code for end in ended] == [75, 75]
    assert ended[0].err.count("\n") == 1
    assert ended[1].err == ""
    for rank in train_ranks(2, place, *START, "one rank asked"):
        finished = rank.wait()
        assert finished.code == 0, finished.err
    assert_the_same(run, whole_on_two)


@pytest.mark.fault(1)
def test_a_lost_rank_ends_the_others_with_70(place: Path) -> None:
    """Invariant 8."""
    run = place / "lost"
    ranks = train_ranks(2, place, *START, "lost")
    ranks[1].signal_when(saw_step(run, "stage1", 3), signal.SIGKILL)
    left = ranks[0].wait(60)
    assert left.code == 70
    assert left.err.count("\n") == 1
    assert left.err.startswith("error: ")
    ranks[1].wait()


# ------------------------------------------------------------------------------------------------ damaged checkpoints


@pytest.fixture(scope="module")
def stopped(place: Path) -> Path:
    """A run that stands at step 7 of stage 1, with the checkpoints 4, 6 and 7."""
    run = place / "stopped"
    own = sets("model.drop_path=0.2", "stage1.schedule.max_steps=7")
    assert train(place, *START, "stopped", *own, "--stage", "stage1").code == 0
    assert sorted(path.name[-1] for path in (run / "stage1" / "checkpoints").iterdir()) == ["4", "6", "7"]
    return run


def damage(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 0x10
    file.write_bytes(data)


@pytest.mark.fault(21, 22)
def test_a_corrupt_newest_checkpoint_falls_back_and_says_so(place: Path, stopped: Path, whole: Path) -> None:
    run = place / "fallback"
    shutil.copytree(stopped, run)
    damage(run / "stage1" / "checkpoints" / "step-00000007")
    finished = train(place, *START, "fallback", *DROP_PATH)
    assert finished.code == 0, finished.err
    [fallback] = events(run, "fallback")
    assert fallback["stage"] == "stage1"
    assert "step-00000007" in fallback["reason"]
    assert "model.safetensors" in fallback["reason"]
    assert [event["step"] for event in events(run, "resume")] == [6]
    assert_the_same_scores_but_step_7(run, whole)


def assert_the_same_scores_but_step_7(run: Path, whole: Path) -> None:
    """The run that was cut at step 7 has an evaluation there."""
    assert losses(run) == losses(whole)
    assert [score for score in scores(run) if score[1] != 7] == scores(whole)
    for stage in STAGES:
        assert file_sha256(run / stage / "weights.safetensors") == file_sha256(whole / stage / "weights.safetensors")


def test_resume_from_a_given_checkpoint(place: Path, stopped: Path, whole: Path) -> None:
    run = place / "given"
    shutil.copytree(stopped, run)
    path = run / "stage1" / "checkpoints" / "step-00000004"
    refused = train(place, *START, "given", *DROP_PATH, "--resume", str(path))
    assert refused.code == 78  # A done stage is not undone by the way.
    assert "remove its done.json" in refused.err
    (run / "stage1" / "done.json").unlink()
    finished = train(place, *START, "given", *DROP_PATH, "--resume", str(path))
    assert finished.code == 0, finished.err
    assert [event["step"] for event in events(run, "resume")] == [4]
    assert_the_same_scores_but_step_7(run, whole)


@pytest.mark.fault(28)
def test_other_loader_processes_go_on_with_the_same_bits(place: Path, stopped: Path, whole: Path) -> None:
    run = place / "other workers"
    shutil.copytree(stopped, run)
    finished = train(place, *START, "other workers", *DROP_PATH, *sets("data.workers=2"))
    assert finished.code == 0, finished.err
    assert [event["step"] for event in events(run, "resume")] == [7]
    assert_the_same_scores_but_step_7(run, whole)


@pytest.mark.fault(22)
def test_where_all_checkpoints_are_damaged_the_run_is_not_started_over(place: Path, stopped: Path) -> None:
    run = place / "all damaged"
    shutil.copytree(stopped, run)
    for checkpoint in (run / "stage1" / "checkpoints").iterdir():
        damage(checkpoint)
    finished = train(place, *START, "all damaged", *DROP_PATH)
    assert finished.code == 74
    assert "is intact" in finished.err
    assert finished.err.count("\n") == 1
    assert (run / "stage1" / "checkpoints" / "step-00000004").is_dir()


@pytest.mark.fault(22)
def test_a_stage_that_ended_early_and_lost_its_checkpoints_is_not_started_over(place: Path, stopped: Path) -> None:
    run = place / "none left"
    shutil.copytree(stopped, run)
    shutil.rmtree(run / "stage1" / "checkpoints")
    finished = train(place, *START, "none left", *DROP_PATH)
    assert finished.code == 74
    assert "stage1 ended early" in finished.err
    assert (run / "stage1" / "weights.safetensors").is_file()


def test_a_kill_between_the_last_checkpoint_and_done_loses_nothing(place: Path, whole: Path) -> None:
    """The weights are the same file, and the last evaluation is still known."""
    run = place / "late kill"
    shutil.copytree(whole / "stage1", run / "stage1")
    (run / "stage1" / "done.json").unlink()
    finished = train(place, *START, "late kill", *DROP_PATH, "--stage", "stage1")
    assert finished.code == 0, finished.err
    weights = Path("stage1") / "weights.safetensors"
    assert file_sha256(run / weights) == file_sha256(whole / weights)
    done, expected = (json.loads((folder / "stage1" / "done.json").read_text()) for folder in (run, whole))
    assert done["inputs"] == expected["inputs"]
    assert done["result"]["val"] == expected["result"]["val"] != {}
    reasons = [one["result"]["energy_reason"] for one in (done, expected)]
    assert reasons == ["the stage took several starts", "it ran on CPUs, whose energy is not read"]
