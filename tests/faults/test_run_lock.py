"""One job at a time in a run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sfa_dist.boundary.file_names import LOCK
from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.run.lock import held

HOLD = """
import os, sys, time
from pathlib import Path
from sfa_dist.run.lock import held
with held(Path(sys.argv[1]), {"SLURM_JOB_ID": "77"}):
    if os.fork() == 0:  # As a loader process does.
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    input()
"""


@contextmanager
def holder(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run directory, with a forked child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.mark.fault(29)
def test_a_second_job_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with (
        holder(tmp_path) as other,
        pytest.raises(RecipeError, match=rf"in use by process {other.pid} on {socket.gethostname()}, Slurm job 77"),
        held(tmp_path, {}),
    ):
        pass


@pytest.mark.fault(29)
def test_the_lock_of_a_killed_job_is_free_at_once(tmp_path: Path) -> None:
    """Also while a process that it had forked lives on."""
    with holder(tmp_path) as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert (tmp_path / LOCK).exists()
        with held(tmp_path, {}):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_job_that_ends_leaves_no_lock(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        assert other.stdin
        other.stdin.write("\n")
        other.stdin.close()
        assert other.wait() == 0  # Not `communicate`: its forked child holds the pipe for as long as it lives.
        assert not (tmp_path / LOCK).exists()


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot lock"), held(tmp_path / "file" / "run", {}):
        pass


class TestWithoutLocks:
    """On a file system that has none, what the file says decides."""

    @pytest.fixture(autouse=True)
    def no_locks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", refuse)

    def test_says_so(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        with held(tmp_path, {}):
            assert "the file system has no locks" in capfd.readouterr().err

    def test_a_living_holder_is_respected(self, tmp_path: Path) -> None:
        with (
            holder(tmp_path) as other,
            pytest.raises(RecipeError, match=rf"process {other.pid} .* if that job is dead, remove "),
            held(tmp_path, {}),
        ):
            pass

    def test_a_dead_one_is_not(self, tmp_path: Path) -> None:
        with holder(tmp_path) as other:
            os.kill(other.pid, signal.SIGKILL)
            other.wait()
            with held(tmp_path, {}):
                pass

    @pytest.mark.parametrize(
        ("environ", "mine"),
        [
            ({}, False),
            ({"SLURM_JOB_ID": "78"}, False),
            ({"SLURM_JOB_ID": "77"}, False),
            ({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, True),
        ],
    )
    def test_of_another_host_only_this_jobs_own_past_is_over(
        self, tmp_path: Path, environ: dict[str, str], mine: bool
    ) -> None:
        with held(tmp_path, {"SLURM_JOB_ID": "77"}):
            elsewhere = {**json.loads((tmp_path / LOCK).read_text()), "host": "elsewhere"}
        (tmp_path / LOCK).write_text(json.dumps(elsewhere))
        if mine:
            with held(tmp_path, environ):
                return
        with pytest.raises(RecipeError, match="on elsewhere"), held(tmp_path, environ):
            pass

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}'])
    def test_a_file_that_says_nothing_holds_nobody_off(self, tmp_path: Path, text: str) -> None:
        (tmp_path / LOCK).write_text(text)
        with held(tmp_path, {}):
            pass
