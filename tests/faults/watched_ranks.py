"""Ranks that watch over each other, as real processes without a launcher, which would clean up after a loss itself."""

from __future__ import annotations

import ctypes
import datetime
import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ranks import free_port

from sfa_dist.errors import DataError, PreemptedError, SfaError
from sfa_dist.parallel.stop_flag import StopFlag

STOP = StopFlag()  # Of the rank's process.

_forks = multiprocessing.get_context("forkserver")


class Ranks:
    """`world_size` processes that run the function `work` of this module under the watch; or only those of `ranks`.

    `system` makes their system one that lacks something: a key of `_SYSTEMS`.
    """

    def __init__(
        self,
        folder: Path,
        world_size: int,
        work: str,
        ranks: Sequence[int] | None = None,
        port: int | None = None,
        system: str = "whole",
        **environ: str,
    ) -> None:
        _forks.set_forkserver_preload(["torch", "sfa_dist.parallel.watch.guard"])
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._stopped: list[int] = []
        common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
        self.processes = []
        for rank in range(world_size) if ranks is None else ranks:
            place = {**common, **environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(_forks.Process(target=_main, args=(place, str(folder), work, system)))
            self.processes[-1].start()

    def wait_for_steps(self, limit: float = 30.0) -> None:
        """Until every rank is in its steps."""
        end = time.monotonic() + limit
        while not all((self.folder / f"running-{rank}").exists() for rank in range(len(self.processes))):
            assert time.monotonic() < end, self.errors()
            time.sleep(0.02)

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """A signal to a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def watch_of(self, rank: int) -> int:
        """The pid of a rank's watch process."""
        command = ["pgrep", "-f", "-P", str(self.processes[rank].pid), "watch_process.py"]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def stop_node(self, rank: int) -> None:
        """Makes a rank's node fall silent, with its connections left open; `ends` clears up."""
        self._stopped.append(self.watch_of(rank))
        os.kill(self._stopped[-1], signal.SIGSTOP)
        self.kill(rank, signal.SIGSTOP)

    def ends(self, limit: float = 30.0) -> tuple[list[int | None], float]:
        """Exit codes of all ranks, and the seconds until the last one was out. Kills what is left after `limit`."""
        started = time.monotonic()
        for process in self.processes:
            process.join(max(0.0, started + limit - time.monotonic()))
        seconds = time.monotonic() - started
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        while self._stopped:
            os.kill(self._stopped.pop(), signal.SIGKILL)
        return codes, seconds

    def errors(self) -> list[str]:
        """What each rank wrote to stderr, without torch's own chatter."""
        return [
            "".join(line for line in file.read_text().splitlines(keepends=True) if not line.startswith(("[", "frame")))
            for file in sorted(self.folder.glob("stderr-*"))
        ]

    def stacks(self) -> list[str]:
        """Names of the files that hold stacks."""
        return sorted(file.name for file in (self.folder / "logs").glob("*"))


def _main(environ: dict[str, str], folder: str, work: str, system: str) -> None:
    os.dup2(os.open(f"{folder}/stderr-{environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    import torch

    from sfa_dist.parallel import runtime as parallel_runtime
    from sfa_dist.parallel.watch.guard import watched

    torch.set_num_threads(1)
    _SYSTEMS[system]()
    code = 0
    try:
        runtime = parallel_runtime.start(environ)
        STOP.install()
        with watched(runtime, "127.0.0.1", Path(folder) / "logs", STOP) as watch:
            _WORKS[work](runtime, watch, Path(folder))
        parallel_runtime.stop()
    except SfaError as error:
        if not error.print_suppressed:
            print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except Exception as error:  # noqa: BLE001 (as train.py does)
        print(f"error: internal: {type(error).__name__}: {error}", file=sys.stderr)
        code = 70
    sys.exit(code)


def _step(runtime, watch, folder, step):
    watch.phase("data", step)
    time.sleep(0.05)
    watch.phase("forward", step)
    runtime.sum(1.0)
    if step == 3:
        (folder / f"running-{runtime.rank}").touch()


def forever(runtime, watch, folder):
    """Steps without end."""
    for step in range(1_000_000):
        _step(runtime, watch, folder, step)


def for_a_while(runtime, watch, folder):
    """Steps for a second or more."""
    for step in range(30):
        _step(runtime, watch, folder, step)


def for_long(runtime, watch, folder):
    """Steps for longer than a silent rank is waited for."""
    for step in range(360):
        _step(runtime, watch, folder, step)


def bug_on_rank_1(runtime, watch, folder):
    """An error that is nobody's but rank 1's."""
    for step in range(1_000_000):
        _step(runtime, watch, folder, step)
        if step == 5 and runtime.rank == 1:
            raise ZeroDivisionError("a bug")


def bad_data_on_rank_1(runtime, watch, folder):
    """An orderly error of rank 1 alone."""
    for step in range(1_000_000):
        _step(runtime, watch, folder, step)
        if step == 5 and runtime.rank == 1:
            raise DataError("a clip is bad")


def preempted(runtime, watch, folder):
    """All ranks end together, with their state saved."""
    for step in range(5):
        _step(runtime, watch, folder, step)
    raise runtime.for_all(PreemptedError("stopped"))


def bug_on_all_ranks(runtime, watch, folder):
    """The same error everywhere."""
    for step in range(5):
        _step(runtime, watch, folder, step)
    raise ZeroDivisionError("a bug")


def rank_0_holds_the_lock(runtime, watch, folder):
    """Rank 0 is in C with the interpreter's lock held, where no thread of Python runs."""
    for step in range(5):
        _step(runtime, watch, folder, step)
    watch.phase("load", 5)
    if runtime.rank == 0:
        ctypes.PyDLL(None).sleep(20)
    forever(runtime, watch, folder)


def rank_0_loads_for_long(runtime, watch, folder):
    """As above, for longer than a silent rank is waited for, and then all is well."""
    for step in range(5):
        _step(runtime, watch, folder, step)
    if runtime.rank == 0:
        ctypes.PyDLL(None).sleep(18)
    runtime.barrier()


def _no_port() -> None:
    """Rank 0 may open no port for the watch."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    socket.create_server = refuse  # type: ignore[assignment]


def _old() -> None:
    """A kernel or a C library without memfd and pidfd, and a system without /proc, as macOS is."""
    from sfa_dist.parallel.watch import watch_process

    del os.memfd_create
    sys.platform = "darwin"
    watch_process.__file__ = str(Path(__file__).with_name("old_watch_process.py"))


def _impatient() -> None:
    """Collectives give up after three seconds instead of ten minutes."""
    from sfa_dist.parallel import runtime

    runtime.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=3)


_SYSTEMS: dict[str, Callable[[], None]] = {
    "whole": lambda: None,
    "no port": _no_port,
    "old": _old,
    "impatient": _impatient,
}


def rank_0_works_for_long(runtime, watch, folder):
    """Rank 0 does what it does for all, for longer than a collective waits."""
    for step in range(5):
        _step(runtime, watch, folder, step)
    assert runtime.on_main(lambda: time.sleep(7) or "done") == "done"


def _wait_for_request() -> None:
    end = time.monotonic() + 20
    while not STOP:
        assert time.monotonic() < end, "nobody told this rank"
        time.sleep(0.01)


def rank_1_waits_for_long(runtime, watch, folder):
    """Rank 1 is deep in a wait of its own, until it hears that another rank was asked to stop."""
    for step in range(5):
        _step(runtime, watch, folder, step)
    if runtime.rank == 1:
        _wait_for_request()
    runtime.barrier()
    _wait_for_request()  # The others have heard of it too, while they waited.
    raise runtime.for_all(PreemptedError(f"stopped; {runtime.gather(STOP.reason)}"))


_WORKS: dict[str, Callable[..., None]] = {
    work.__name__: work
    for work in (
        forever,
        for_a_while,
        for_long,
        bug_on_rank_1,
        bad_data_on_rank_1,
        preempted,
        bug_on_all_ranks,
        rank_0_holds_the_lock,
        rank_0_loads_for_long,
        rank_0_works_for_long,
        rank_1_waits_for_long,
    )
}
