"""A rank that is killed, stopped, hung or wrong ends the others in seconds, by name; and nothing else does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from watched_ranks import Ranks

LIMIT = 30.0  # Seconds: the promise.


@contextmanager
def running(folder: Path, world_size: int, work: str, system: str = "whole") -> Iterator[Ranks]:
    """Ranks that are in their steps; what is left of them is killed."""
    ranks = Ranks(folder, world_size, work, system=system)
    try:
        ranks.wait_for_steps()
        yield ranks
    finally:
        ranks.ends(0)


def watches_end(pids: list[int]) -> bool:
    """No watch process outlives its rank for long."""
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.fault(1)
@pytest.mark.parametrize(("lost", "speaker"), [(1, 0), (0, 1), (2, 0)])
def test_a_killed_rank_is_named_at_once(tmp_path: Path, lost: int, speaker: int) -> None:
    with running(tmp_path, 3, "forever") as ranks:
        watches = [ranks.watch_of(rank) for rank in range(3)]
        ranks.kill(lost)
        codes, seconds = ranks.ends()
    assert codes == [-9 if rank == lost else 70 for rank in range(3)]
    assert seconds < 5
    said = ranks.errors()
    assert [bool(text) for text in said] == [rank == speaker for rank in range(3)]  # One line in all.
    assert said[speaker].count("\n") == 1
    assert said[speaker].startswith(f"error: rank {lost} on ")
    assert "was lost in phase " in said[speaker]
    assert " at step " in said[speaker]
    assert ranks.stacks() == [f"rank-{rank:05d}.stacks" for rank in range(3) if rank != lost]
    assert "in forever" in (tmp_path / "logs" / f"rank-{speaker:05d}.stacks").read_text()
    assert watches_end(watches)


def test_an_error_of_one_rank_ends_the_others(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3, "bug_on_rank_1")
    codes, _ = ranks.ends()
    assert codes == [70, 70, 70]
    said = ranks.errors()
    assert "rank 1 on " in said[0]
    assert "ended with code 70 in phase forward at step 5: ZeroDivisionError: a bug; the stacks" in said[0]
    assert said[1] == "error: internal: ZeroDivisionError: a bug\n"
    assert said[2] == ""


def test_the_others_end_with_the_code_of_an_orderly_error(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3, "bad_data_on_rank_1")
    codes, _ = ranks.ends()
    assert codes == [65, 65, 65]
    said = ranks.errors()
    assert "ended with code 65 in phase forward at step 5: a clip is bad; the stacks" in said[0]
    assert said[1:] == ["error: a clip is bad\n", ""]


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        ("for_a_while", 0, ["", "", ""]),
        ("preempted", 75, ["error: stopped\n", "", ""]),
        ("bug_on_all_ranks", 70, ["error: internal: ZeroDivisionError: a bug\n"] * 3),
    ],
)
def test_an_end_of_all_ranks_is_no_loss(tmp_path: Path, work: str, code: int, said: list[str]) -> None:
    ranks = Ranks(tmp_path, 3, work)
    codes, _ = ranks.ends()
    assert codes == [code] * 3
    assert ranks.errors() == said
    assert ranks.stacks() == []


def test_a_watch_process_does_not_mind_the_signals_of_a_job(tmp_path: Path) -> None:
    """Slurm sends them to each process of a step, and the deepspeed launcher to all children."""
    with running(tmp_path, 2, "forever") as ranks:
        watch = ranks.watch_of(1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(watch, number)
        ranks.kill(0)
        assert ranks.ends()[0] == [-9, 70]
    assert ranks.errors()[1].startswith("error: rank 0 on ")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed_with_its_watch_process_is_lost(tmp_path: Path, lost: int) -> None:
    """All that the others see of a node that goes down."""
    with running(tmp_path, 3, "forever") as ranks:
        os.kill(ranks.watch_of(lost), signal.SIGKILL)
        ranks.kill(lost)
        codes, seconds = ranks.ends()
    assert codes == [-9 if rank == lost else 70 for rank in range(3)]
    assert seconds < LIMIT
    assert f"error: rank {lost} on " in ranks.errors()[1 if lost == 0 else 0]


@pytest.mark.fault(16)
def test_slow_ways_to_be_lost_and_not_to_be(tmp_path: Path) -> None:
    """Side by side, as each takes its time to be told from a rank that is only slow."""
    with (
        running(tmp_path / "stopped", 3, "forever") as stopped,
        running(tmp_path / "silent", 2, "forever") as silent,
        running(tmp_path / "locked", 2, "rank_0_holds_the_lock") as locked,
        running(tmp_path / "all stopped", 2, "forever") as all_stopped,
        running(tmp_path / "loading", 2, "rank_0_loads_for_long") as loading,
        running(tmp_path / "no hub", 2, "for_long") as no_hub,
        running(tmp_path / "no child", 2, "for_long") as no_child,
    ):
        stopped.kill(1, signal.SIGSTOP)
        silent.stop_node(1)
        locked.kill(1)
        for rank in range(2):
            all_stopped.kill(rank, signal.SIGSTOP)
        watches = [no_hub.watch_of(0), no_hub.watch_of(1), no_child.watch_of(0), no_child.watch_of(1)]
        os.kill(watches[0], signal.SIGKILL)
        os.kill(watches[3], signal.SIGKILL)
        started = time.monotonic()

        # Its interpreter cannot take the verdict, so its watch process ends it, and speaks for it.
        assert locked.ends(LIMIT)[0] == [-9, -9]
        assert locked.errors()[0].startswith("error: rank 1 on ")

        assert stopped.ends(LIMIT)[0] == [70, 70, 70]
        assert "its process has been stopped for 10 s" in stopped.errors()[0]
        assert len(stopped.stacks()) == 3  # Of the stopped one too: it is continued so that it can leave.

        for rank in range(2):
            all_stopped.kill(rank, signal.SIGCONT)
        silent.processes[0].join(LIMIT)
        assert silent.processes[0].exitcode == 70
        assert "no report for 15 s" in silent.errors()[0]
        assert time.monotonic() - started < LIMIT

        assert loading.ends(LIMIT)[0] == [0, 0]
        assert loading.errors() == ["", ""]

        assert [process.exitcode for process in all_stopped.processes] == [None, None]
        assert all_stopped.errors() == ["", ""]

        # The watch is no reason to end: whose child is lost says so, and goes on.
        assert no_hub.ends(LIMIT)[0] == no_child.ends(LIMIT)[0] == [0, 0]
        for who, said, quiet in ((0, *no_hub.errors()), (1, *reversed(no_child.errors()))):
            assert quiet == ""
            assert said.startswith(f"rank {who} on ")
            assert said.count("\n") == 1
            assert "the run goes on" in said
        assert watches_end(watches)


def test_one_rank_alone_has_no_watch(tmp_path: Path) -> None:
    with running(tmp_path, 1, "for_a_while") as ranks:
        assert children(ranks.processes[0].pid) == []
        assert ranks.ends()[0] == [0]


@pytest.mark.fault(1)
def test_the_watch_works_without_memfd_pidfd_and_proc(tmp_path: Path) -> None:
    with running(tmp_path, 2, "forever", system="old") as ranks:
        watches = [int(pid) for rank in ranks.processes for pid in children(rank.pid)]
        assert len(watches) == 2
        ranks.kill(1)
        codes, seconds = ranks.ends()
    assert codes == [70, -9]
    assert seconds < LIMIT
    assert ranks.errors()[0].startswith("error: rank 1 on ")
    assert watches_end(watches)


def children(pid: int | None) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_a_rank_0_that_may_open_no_port_goes_on_without_the_watch(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, "for_a_while", system="no port")
    assert ranks.ends()[0] == [0, 0]
    said, quiet = ranks.errors()
    assert said.startswith("the watch for lost ranks is off: rank 0 on ")
    assert "Permission denied" in said
    assert (said.count("\n"), quiet) == (1, "")


def test_rank_0_may_work_for_longer_than_a_collective_waits(tmp_path: Path) -> None:
    """As when it hashes a large data set."""
    ranks = Ranks(tmp_path, 3, "rank_0_works_for_long", system="impatient")
    assert ranks.ends()[0] == [0, 0, 0], ranks.errors()


@pytest.mark.fault(12)
@pytest.mark.parametrize("asked", [0, 2])
def test_a_request_to_one_rank_is_heard_by_those_that_wait(tmp_path: Path, asked: int) -> None:
    """Rank 0, whose child is the hub, and another one. It waits in a collective meanwhile."""
    with running(tmp_path, 3, "rank_1_waits_for_long") as ranks:
        ranks.kill(asked, signal.SIGTERM)
        codes, seconds = ranks.ends()
    assert codes == [75, 75, 75]
    assert seconds < 20
    reasons = ["another rank, which was asked to stop"] * 3
    reasons[asked] = "SIGTERM"
    assert ranks.errors() == [f"error: stopped; {reasons}\n", "", ""]
