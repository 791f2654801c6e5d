"""train.py from the command line: as a real process, or forked from one that has torch and deepspeed imported already.

Both run the same `main` in a process of its own with an exit code, stdout and stderr. A real one costs six seconds of
imports, a forked one a tenth of a second, so a real one is taken only where the start itself is the point.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import faults
from ranks import free_port
from stuck import fail_stuck, threads_of

from sfa_dist.chaos.processes import PRELOADED

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "sfa_dist" / "train.py")
LIMIT = 120.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True)
class Finished:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


def assert_refused(finished: Finished, code: int, *words: str, who: str = "error: ") -> None:
    """The exit code, and one line on stderr that begins with `who` and has these words."""
    assert finished.code == code, (finished.code, finished.err)
    assert finished.err.startswith(who), finished.err
    assert finished.err.count("\n") == 1, finished.err
    assert finished.err.endswith("\n")
    for word in words:
        assert word in finished.err


def until(condition: Callable[[], bool], limit: float = LIMIT) -> None:
    """Waits for the condition."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def program(name: str) -> str:
    """A launcher that is installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


def run_command(command: Sequence[str], cwd: Path, limit: float = LIMIT) -> Finished:
    """A real process; it and its children are gone when this returns."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ONE_THREAD
    process = subprocess.Popen(
        command, cwd=cwd, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        try:
            out, err = process.communicate(timeout=10)
        except subprocess.TimeoutExpired as held:  # By a child in a session of its own, as torchrun's are.
            out, err = ((said or b"").decode(errors="replace") for said in (held.stdout, held.stderr))
        fail_stuck(f"{' '.join(command)} did not end in {limit} s:\n{out[-2000:]}\n{err[-2000:]}")
    return Finished(process.returncode, out, err)


_forks = multiprocessing.get_context("forkserver")
_numbers = count()


class Train:
    """`train.py ARGUMENTS`, or `sfa ARGUMENTS`, that runs in the folder `cwd`, forked."""

    def __init__(self, cwd: Path, *arguments: str, command: str = "train.py", **environ: str) -> None:
        os.environ.update(ONE_THREAD)  # Read when torch is imported, so before the first fork.
        _forks.set_forkserver_preload(list(PRELOADED))
        logs = cwd / "outputs"
        logs.mkdir(exist_ok=True)
        self._files = [logs / f"{next(_numbers)}.{name}" for name in ("out", "err")]
        self.arguments, self.environ = arguments, environ
        self._process = _forks.Process(
            target=_main, args=(command, arguments, str(cwd), environ, list(map(str, self._files)))
        )
        self._process.start()

    @property
    def over(self) -> bool:
        """Whether the process has ended."""
        return not self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """A signal to the process."""
        assert self._process.pid
        os.kill(self._process.pid, number)

    def wait(self, limit: float = LIMIT) -> Finished:
        """Waits for the end."""
        self._process.join(limit)
        if not self.over:
            assert self._process.pid
            threads = threads_of([self._process.pid])
            self._process.kill()
            self._process.join()
            said = "\n".join(self._said())
            fail_stuck(f"train.py {' '.join(self.arguments)} did not end in {limit} s:\n{threads}\n{said}")
        assert self._process.exitcode is not None
        return Finished(self._process.exitcode, *self._said())

    def signal_when(self, condition: Callable[[], bool], number: signal.Signals, limit: float = LIMIT) -> None:
        """A signal as soon as the condition holds."""
        end = time.monotonic() + limit
        while not condition():
            assert not self.over, f"it was over before the signal: {self._said()}"
            assert time.monotonic() < end, f"the condition did not come true: {self._said()}"
            time.sleep(0.002)
        assert not self.over, "it was over before the signal"
        self.send(number)

    def _said(self) -> tuple[str, str]:
        out, err = (file.read_text(errors="replace") for file in self._files)
        return out, err


def _main(command: str, arguments: Sequence[str], cwd: str, environ: dict[str, str], files: list[str]) -> None:
    import torch

    from sfa_dist import train
    from sfa_dist.tools import cli

    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    multiprocessing.set_start_method("fork", force=True)  # As in a process that was not forked itself.
    torch.set_num_threads(1)
    os.environ.update(environ)
    os.chdir(cwd)
    for fault in filter(None, environ.get(faults.VARIABLE, "").split(";")):
        faults.install(fault)
    sys.argv = [command, *arguments]
    sys.exit(train.main() if command == "train.py" else cli.main())


def train(cwd: Path, *arguments: str, **environ: str) -> Finished:
    """One forked run, from start to end."""
    return Train(cwd, *arguments, **environ).wait()


def sfa(cwd: Path, *arguments: str, **environ: str) -> Finished:
    """One forked `sfa ARGUMENTS`, from start to end."""
    return Train(cwd, *arguments, command="sfa", **environ).wait()


def train_ranks(
    world_size: int,
    cwd: Path,
    *arguments: str,
    command: str = "train.py",
    faults: Mapping[int, str] = {},
    ranks: Sequence[int] | None = None,
    **environ: str,
) -> list[Train]:
    """Forked runs that find each other by the variables that torchrun sets, with the faults of faults.py by rank; or
    only those of `ranks`."""
    common = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "test", **environ}
    return [
        Train(
            cwd,
            *arguments,
            command=command,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            TEST_FAULTS=faults.get(rank, ""),
            **common,
        )
        for rank in (range(world_size) if ranks is None else ranks)
    ]
