"""A process ends with the code of its work, whatever the interpreter's own end would make of it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from sfa_dist.run.command_line import patience

ROOT = Path(__file__).resolve().parents[3]
WORK = """\
import atexit, os, sys, threading, time
from sfa_dist.parallel.process_exit import exit_process

class Held:
    def __del__(self):
        os.abort()  # As a thread of torch that the interpreter takes an object away from.

held = Held()
atexit.register(lambda: print("handler"))
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
sys.stdout.write("work\\n")
END(CODE)
"""


def run(end: str, stdout: int | IO[str] = subprocess.PIPE, code: int = 3) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WORK.replace("END", end).replace("CODE", str(code))]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(command, cwd=ROOT, env=environ, stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_what_waits_for_the_end_is_done_and_the_code_stays() -> None:
    done = run("exit_process")
    assert (done.returncode, done.stdout, done.stderr) == (3, "work\nthread\nhandler\n", "")


def test_the_interpreters_own_end_would_have_aborted() -> None:
    assert run("sys.exit").returncode == -signal.SIGABRT


def test_a_reader_that_left_changes_nothing() -> None:
    read, write = os.pipe()
    os.close(read)
    done = run("exit_process", write)
    os.close(write)
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_74_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = run("exit_process", full, code=0)
    assert done.returncode == 74
    assert done.stderr == "error: disk: <stdout>: [Errno 28] No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_does_not_hide_the_code_of_the_work() -> None:
    with open("/dev/full", "w") as full:
        assert run("exit_process", full, code=75).returncode == 75


def test_a_process_without_a_console_ends_as_any_other() -> None:
    program = "from sfa_dist.parallel.process_exit import exit_process; exit_process(3)"
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    assert subprocess.run(["sh", "-c", f"{command} >&- 2>&-"], cwd=ROOT).returncode == 3


RANKS = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("rank", "code", "stays"), [(0, 70, False), (1, 70, True), (1, 78, True), (1, 0, False), (1, 75, False)]
)
def test_a_rank_that_does_not_tell_lets_the_one_that_does_leave_first(
    monkeypatch: pytest.MonkeyPatch, rank: int, code: int, stays: bool
) -> None:
    for key, value in {**RANKS, "RANK": str(rank), "LOCAL_RANK": str(rank)}.items():
        monkeypatch.setenv(key, value)
    assert (patience(code) > 0) == stays


def test_a_process_alone_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(key, raising=False)
    assert patience(70) == 0
