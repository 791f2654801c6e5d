"""Stopped, crashed or out of memory at the awkward moments: one line, the right code, nothing lost, nothing doubled."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from commands import Train, assert_refused, train, train_ranks, until
from tiny_runs import RECIPE, events, log_lines, losses, make_workplace, scores, sets

from sfa_dist.data.shards.shard_index import load_index

RUN = (
    RECIPE[: RECIPE.index("image:\n")].replace("epochs: 2", "epochs: 3")
    + 'stage1: {frames: 4}\nlog: {every: 1, wandb: "off"}\n'
)
STEPS = 9
START = ("--recipe", "t.yaml", "--stage", "stage1", "--run-dir")
LIMIT = 60.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("stop"), RUN)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    finished = train(place, *START, "whole")
    assert finished.code == 0, finished.err
    return place / "whole"


def crc32(place: Path, shard: str, number: int) -> int:
    return int(load_index([place / shard]).crc32[number])


def steps(run: Path) -> list[int]:
    return [line["step"] for line in log_lines(run) if line["kind"] == "train"]


def in_phase(run: Path, mark: str) -> Callable[[], bool]:
    log = run / "log.jsonl"
    return lambda: log.is_file() and mark in log.read_text()


@pytest.mark.fault(7, 12)
def test_a_rank_that_waits_in_a_collective_passes_the_request_on(place: Path) -> None:
    """Rank 0 waits for a clip that does not come, rank 1 for rank 0; only rank 1 is asked."""
    run = place / "blocked"
    slow = f"decoder slow 1000@{crc32(place, 'train/part-000000.tar', 5)}"
    ranks = train_ranks(2, place, *START, "blocked", *sets("checkpoint.every_steps=1"), faults={0: slow, 1: slow})
    until(in_phase(run, '"event": "start"'))
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < 3.0:  # Steps are made in a tenth of that.
        if (now := len(steps(run))) != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.05)
    ranks[1].send(signal.SIGTERM)
    ended = [rank.wait(LIMIT) for rank in ranks]
    assert [end.code for end in ended] == [75, 75], ended
    assert ended[0].err.count("\n") == 1
    [preempted] = events(run, "preempted")
    assert preempted["step"] == seen
    for rank in train_ranks(2, place, *START, "blocked"):
        assert rank.wait().code == 0
    assert steps(run) == list(range(1, STEPS + 1))


@pytest.mark.fault(10)
def test_who_asks_again_and_again_gets_one_save(place: Path, whole: Path) -> None:
    run = place / "again and again"
    started = Train(place, *START, "again and again")
    started.signal_when(in_phase(run, '"step": 4, "epoch"'), signal.SIGTERM)
    while not started.over:
        started.send(signal.SIGTERM)
        time.sleep(0.005)
    assert_refused(started.wait(), 75, "state is saved", who="stopped: ")
    [preempted] = events(run, "preempted")
    assert [event["step"] for event in events(run, "checkpoint")].count(preempted["step"]) == 1
    finished = train(place, *START, "again and again")
    assert finished.code == 0, finished.err
    assert losses(run) == losses(whole)


@pytest.mark.fault(13)
@pytest.mark.parametrize("grace", [0.0, 0.02, 0.1], ids=str)
def test_too_short_a_grace_loses_no_checkpoint(place: Path, whole: Path, grace: float) -> None:
    name = f"grace {grace}"
    run = place / name
    started = Train(place, *START, name)
    started.signal_when(in_phase(run, '"step": 5, "epoch"'), signal.SIGTERM)
    time.sleep(grace)
    if not started.over:
        started.send(signal.SIGKILL)
    assert started.wait().code in (75, -signal.SIGKILL)
    finished = train(place, *START, name)
    assert finished.code == 0, finished.err
    assert events(run, "resume")[0]["step"] >= 3
    assert not events(run, "fallback")
    assert losses(run) == losses(whole)


@pytest.mark.fault(11)
def test_a_request_during_an_evaluation(place: Path, whole: Path) -> None:
    run = place / "evaluating"
    slow = f"decoder slow 1000@{crc32(place, 'val/part-000000.tar', 0)}"
    started = Train(place, *START, "evaluating", TEST_FAULTS=slow)
    started.signal_when(in_phase(run, '"step": 3, "epoch"'), signal.SIGTERM)
    assert_refused(started.wait(LIMIT), 75, "stopped at step 3 of 9; state is saved", who="stopped: ")
    finished = train(place, *START, "evaluating")
    assert finished.code == 0, finished.err
    assert steps(run) == list(range(1, STEPS + 1))
    assert losses(run) == losses(whole)
    assert [line["step"] for line in log_lines(run) if line["kind"] == "eval"] == [3, 6, 9]
    assert scores(run) == scores(whole)
    names = [path.name for path in (run / "stage1" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000006", "step-00000009"]


@pytest.mark.fault(11)
def test_a_request_before_the_first_step_saves_nothing(place: Path, whole: Path) -> None:
    run = place / "early"
    started = Train(place, *START, "early", TEST_FAULTS="decoder slow 1000")
    started.signal_when(in_phase(run, '"event": "start"'), signal.SIGTERM)
    assert_refused(started.wait(LIMIT), 75, "stopped at step 0 of 9; nothing to save yet", who="stopped: ")
    assert not (run / "stage1" / "checkpoints").exists()
    finished = train(place, *START, "early")
    assert finished.code == 0, finished.err
    assert losses(run) == losses(whole)


@pytest.mark.fault(11)
def test_a_request_to_one_of_the_ranks_that_meet(place: Path) -> None:
    """The third never comes."""
    ranks = train_ranks(3, place, *START, "meeting", ranks=(0, 1))
    port = int(ranks[0].environ["MASTER_PORT"])
    store: list[dist.Store] = []

    def both_wait() -> bool:
        if not store:
            try:
                store.append(dist.PrefixStore("sfa_dist//0", dist.TCPStore("127.0.0.1", port, is_master=False)))
            except dist.DistError:
                return False
        return store[0].check(["here/0", "here/1"])

    until(both_wait)
    ranks[1].send(signal.SIGTERM)
    ended = [rank.wait(LIMIT) for rank in ranks]
    assert [end.code for end in ended] == [75, 75]
    assert_refused(ended[1], 75, "before there was anything to save", who="stopped: ")
    assert ended[0].err == ""
    assert not (place / "meeting" / "stage1").exists()


@pytest.mark.fault(6)
def test_a_clip_that_crashes_the_decoder_does_so_once(place: Path) -> None:
    run = place / "crash"
    crash = f"decoder SIGSEGV@{crc32(place, 'train/part-000001.tar', 2)}"
    own = sets("data.workers=1", "data.max_bad_fraction=0.1")
    first = train(place, *START, "crash", *own, TEST_FAULTS=crash)
    assert_refused(first, 70, "ended by SIGSEGV at clip part-000001.tar/clip014", "quarantine.jsonl", "run the same")
    again = train(place, *START, "crash", *own, TEST_FAULTS=crash)
    assert again.code == 0, again.err
    bad = {(event["key"], event["reason"]) for event in events(run, "bad_sample")}
    assert bad == {("part-000001.tar/clip014", "quarantined: its decoder was ended by SIGSEGV")}
    assert "faulty_decoder.py" in (run / "logs" / "rank-00000.loader").read_text()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("report SIGSEGV", "The decoder ended by SIGSEGV at part-000000.tar/clip"),
        ("bug stages.pipeline.write_report", "warning: the report is not written: AttributeError: a bug"),
    ],
)
def test_a_report_that_fails_leaves_a_finished_run_its_result(place: Path, whole: Path, fault: str, said: str) -> None:
    run = place / fault.split()[0]
    shutil.copytree(whole, run)
    finished = train(place, "--recipe", "t.yaml", "--run-dir", run.name, TEST_FAULTS=fault)
    assert finished.code == 0, finished.err
    assert (run / "result.json").is_file()
    page = run / "report.md"
    assert said in finished.err + (page.read_text() if page.is_file() else "")


@pytest.mark.fault(5, 14)
def test_a_run_that_always_fails_at_the_same_place_is_not_started_for_ever(place: Path, whole: Path) -> None:
    run = place / "again"
    kill = f"decoder SIGKILL@{crc32(place, 'train/part-000000.tar', 7)}"
    own = sets("data.workers=1", "checkpoint.every_steps=1")
    for _ in range(3):
        failed = train(place, *START, "again", *own, TEST_FAULTS=kill)
        assert_refused(failed, 70, "ended by SIGKILL at clip part-000000.tar/clip007")
    refused = train(place, *START, "again", *own)
    assert_refused(refused, 70, "3 starts in a row ended in stage stage1", "clip007", "stop.same_failures=0")
    entries = json.loads((run / "attempts.json").read_text())
    assert [entry["code"] for entry in entries] == [70, 70, 70]
    finished = train(place, *START, "again", *own, *sets("stop.same_failures=0"))
    assert finished.code == 0, finished.err
    assert losses(run) == losses(whole)


@pytest.mark.fault(15)
def test_a_rank_without_memory_says_what_takes_less_and_ends_the_others(place: Path) -> None:
    started = time.monotonic()
    fault = f"decoder no_memory@{crc32(place, 'train/part-000000.tar', 3)}"
    ranks = train_ranks(2, place, *START, "no memory", faults={0: fault, 1: fault})
    ended = [rank.wait(LIMIT) for rank in ranks]
    assert [end.code for end in ended] == [70, 70]
    told, other = sorted((end.err for end in ended), key=lambda err: "GiB resident" not in err)
    assert "out of memory" in other or not other  # It repeats why the first one ended, if it says anything.
    for word in ("in phase stage1 data at step", "cannot allocate 12 GiB", "GiB resident", "lower batch.micro"):
        assert word in told
    assert sum(end.err.count("\n") for end in ended) <= 2
    assert time.monotonic() - started < LIMIT


@pytest.mark.fault(63)
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(place: Path) -> None:
    run = place / "spoilt"
    for rank in train_ranks(2, place, *START, "spoilt", faults={1: "nan_loss 1"}):
        assert rank.wait().code == 0
    [event] = events(run, "non_finite")
    assert event["step"] == 1
    assert len(event["clips"]) == 2  # Rank 1's first micro-batch, of 8 clips in all.
    state = json.loads((run / "stage1" / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())
    assert (state["progress"]["skipped_steps"], state["progress"]["non_finite_steps"]) == (1, 0)


@pytest.mark.fault(63)
def test_losses_that_stay_not_finite_on_one_rank_end_the_run(place: Path) -> None:
    run = place / "lost"
    ranks = train_ranks(2, place, *START, "lost", *sets("checkpoint.every_steps=1"), faults={1: "nan_loss 1000"})
    ended = [rank.wait() for rank in ranks]
    assert [end.code for end in ended] == [70, 70]
    assert_refused(ended[0], 70, "gradients were not finite 5 steps in a row", "clips: part-00000", "log.jsonl names")
    assert len(events(run, "non_finite")) == 5
    assert not (run / "stage1" / "checkpoints").exists()  # Nothing was stepped, so nothing pushes out what was good.
