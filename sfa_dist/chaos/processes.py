"""Training runs as real processes, one for each rank, forked from a server that has imported torch and deepspeed.

A fresh start spends seconds on imports, a forked one a tenth of a second; from there on both run the same `main`.
Each rank leads a session of its own: a signal can reach it together with its loader workers, as from a batch system,
and nothing of it outlives `Job.kill`. A rank ends with the server, and the server with the process that started it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfa_dist.parallel.environment import environment, replace_environment
from sfa_dist.parallel.process_state import end_with_parent, parent_of, state_of

PRELOADED = (
    "sfa_dist.stages.pipeline",
    "sfa_dist.data.video.decode_pyav",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.pyplot",
    "torch._dynamo",
    "torch._inductor.compile_fx",
)
# One thread a rank and no GPU: the faults concern processes and files, and the CPU repeats results to the last bit.
CPU_ONLY = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_", "SFA_")
POLL_S = 0.002
_forks = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class End:
    """How a rank ended: its exit code (negative: the signal that killed it) and what it printed."""

    code: int
    out: str
    err: str


class StuckError(Exception):
    """A job that did not end, or did not reach an awaited condition, within the limit."""


class Job:
    """`train.py ARGUMENTS` on `world_size` ranks in the folder `cwd`; they find each other as under torchrun.

    Stdout and stderr of each rank go to files in `outputs`. `prepare` runs in each rank first; it may return a
    function, which runs when the rank ends.
    """

    def __init__(
        self,
        cwd: Path,
        outputs: Path,
        arguments: Sequence[str],
        world_size: int = 1,
        environ: Mapping[str, str] | None = None,
        prepare: Callable[[], Callable[[], object] | None] | None = None,
    ) -> None:
        _start_server()
        outputs.mkdir(parents=True, exist_ok=True)
        self.arguments = tuple(arguments)
        self._files = [
            tuple(str(outputs / f"rank-{rank}.{name}") for name in ("out", "err")) for rank in range(world_size)
        ]
        common = {key: value for key, value in environment().items() if not key.startswith(LAUNCHERS)}
        common |= CPU_ONLY | dict(environ or {})
        self._processes = []
        for rank, own in enumerate(_rank_variables(world_size)):
            task = (self.arguments, str(cwd), {**common, **own}, self._files[rank], prepare)
            self._processes.append(_forks.Process(target=_main, args=task))
            self._processes[-1].start()

    @property
    def pids(self) -> list[int]:
        """The process ids in order of rank."""
        return [process.pid or 0 for process in self._processes]

    @property
    def over(self) -> bool:
        """Whether any rank has ended."""
        return not all(process.is_alive() for process in self._processes)

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Sends a signal to these ranks (None: all), but not to their loader workers."""
        for rank in range(len(self._processes)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def kill_worker(self, rank: int) -> bool:
        """Kills a loader worker of a rank, and suspends the rank meanwhile; False if it has no worker at the moment."""
        self.send(signal.SIGSTOP, [rank])
        try:
            workers = self.workers(rank)
            for worker in workers[:1]:
                os.kill(worker, signal.SIGKILL)
        finally:
            self.send(signal.SIGCONT, [rank])
        return bool(workers)

    def send_to_groups(self, number: signal.Signals) -> None:
        """Sends a signal to all ranks and their loader workers."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)

    def wait_until(self, condition: Callable[[], bool], limit: float) -> bool:
        """True once the condition holds, False if a rank ends first. Raises StuckError after `limit` seconds."""
        end = time.monotonic() + limit
        while not condition():
            if self.over:
                return False
            if time.monotonic() > end:
                raise StuckError(f"the awaited condition did not hold within {limit:.0f} s: {self._last_lines()}")
            time.sleep(POLL_S)
        return True

    def ends(self, limit: float, ranks: Sequence[int] | None = None) -> list[End]:
        """Waits until these ranks (None: all) have ended. After `limit` seconds kills the job and raises StuckError."""
        until = time.monotonic() + limit
        chosen = list(range(len(self._processes)) if ranks is None else ranks)
        ended = {}
        for rank in chosen:
            process = self._processes[rank]
            process.join(max(0.0, until - time.monotonic()))
            if process.exitcode is None:
                self.kill()
                raise StuckError(f"rank {rank} had not ended after {limit:.0f} s: {self._last_lines()}")
            out, err = map(_text, self._files[rank])
            ended[rank] = End(process.exitcode, out, err)
        return [ended[rank] for rank in chosen]

    def workers(self, rank: int) -> list[int]:
        """The process ids of a rank's loader workers."""
        return loader_workers(self.pids[rank])

    def kill(self) -> None:
        """Ends all remaining processes of the job."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):  # A new process leads no group in its first instant.
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()

    def _last_lines(self) -> str:
        texts = [Path(file).read_text(errors="replace") for pair in self._files for file in pair if Path(file).exists()]
        return " | ".join(text.strip().splitlines()[-1] for text in texts if text.strip()) or "there is no output"


def _text(file: str) -> str:
    """The text of an output file; empty if the rank was killed before it made the file."""
    path = Path(file)
    return path.read_text(errors="replace") if path.is_file() else ""


def loader_workers(pid: int) -> list[int]:
    """The live processes that a rank has forked, without its watch and other programs that it has started."""
    everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    children = [other for other in everyone if parent_of(other) == pid and state_of(other) is not None]
    return [child for child in children if _session(child) == pid and _program(child) == _program(pid)]


def _program(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _start_server() -> None:
    _forks.set_forkserver_preload(list(PRELOADED))
    before = environment()
    replace_environment({**before, **CPU_ONLY})  # Read when the server imports torch.
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        replace_environment(before)


def _rank_variables(world_size: int) -> list[dict[str, str]]:
    """Each rank's environment variables as torchrun sets them; none for a single process, as under plain `python`."""
    if world_size == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = str(world_size)
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"TORCHELASTIC_RUN_ID": "chaos"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def _main(
    arguments: Sequence[str],
    cwd: str,
    environ: Mapping[str, str],
    files: Sequence[str],
    prepare: Callable[[], Callable[[], object] | None] | None,
) -> None:
    os.setsid()
    end_with_parent()
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    replace_environment(environ)
    os.chdir(cwd)
    tempfile.tempdir = None  # Forgets the server's choice: this rank's folder is in its environment.
    at_end: Any = prepare() if prepare else None
    import torch

    from sfa_dist.train import main

    multiprocessing.set_start_method("fork", force=True)  # The default of a process that was not forked itself.
    torch.set_num_threads(1)
    sys.argv = ["train.py", *arguments]
    try:
        code = main()
    finally:
        if at_end:
            at_end()
    sys.exit(code)
