"""A loader's batches for the trainer: a stop request, a dead worker or a stuck one ends the wait.

The loader runs in a thread of its own and is asked for one batch at a time, so the main thread never blocks inside it.
Each worker writes the sample that it reads into shared memory (`Batches.positions`), so that the error of a worker that
was killed, or whose decoder crashed, can name the clip.

After a crash (SIGSEGV and the like) the clip also goes into the quarantine file, so that the next start does not crash
on it again.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

import torch
from torch.utils.data import DataLoader

from sfa_dist.boundary.disk import explain, print_line
from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.loader import NO_SAMPLE, Batches
from sfa_dist.data.shards.quarantine import add_to_quarantine
from sfa_dist.data.video.clip_encoding import ClipEncoding
from sfa_dist.errors import CheckpointError, LostRankError

BatchFeed = Generator[Batch, None, None]  # The caller closes it.
STATES = {
    "R": "running",
    "S": "asleep",
    "D": "waiting for the disk",
    "T": "stopped by a signal, kill -CONT resumes it",
    "t": "stopped by a debugger",
}
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)

# Seconds.
POLL_S = 0.2
DEATH_S, DEATH_POLL_S = 2.0, 0.02  # How long after a loader error a worker's exit code may still appear.
SHUTDOWN_S = 3.0  # How long workers may take to finish their clip.
REPORT_AFTER_S = 30.0  # A worker that has been at one clip for this long is reported.
PATIENCE_S = 300.0  # After this long at one clip the run ends. Shorter than the other ranks' wait for this one.


@dataclass(frozen=True)
class Streams:
    """The batches of a stage for this rank.

    `train(epoch, first_step)` yields the micro-batches of an epoch from a step on, `evaluate()` this rank's share of
    the validation split. Both end early once this rank is asked to stop.
    """

    steps_per_epoch: int
    accumulation: int
    train: Callable[[int, int], BatchFeed]
    evaluate: Callable[[], BatchFeed] | None
    clip_name: Callable[[int], str] = str  # "shard/key" of a number in a training batch's `ids`.
    encoding: Callable[[], ClipEncoding | None] = lambda: None  # Of the training clips; reads some when called.
    loops_reported: bool = False  # Whether the number of videos shorter than a clip has been printed already.


@dataclass(frozen=True)
class FeedSettings:
    """How a feed names itself, how long it waits, and where it records a worker's crash.

    `who` names the rank in messages; `quarantine` and `stacks` are files (None: nothing is recorded). The feed's thread
    pins batches for `device`, since each thread has a current card of its own.
    """

    who: str
    quarantine: Path | None = None
    stacks: Path | None = None
    patience: float = PATIENCE_S
    report_after: float = REPORT_AFTER_S
    state_of: Callable[[int], str | None] = lambda pid: None  # The kernel's state letter of a process, if known.
    device: torch.device | None = None


def feed(loader: DataLoader[Batch], settings: FeedSettings, stopped: Callable[[], bool] = bool) -> BatchFeed:
    """The batches of a loader of `Batches`, until `stopped()` is true. The caller closes the feed.

    Raises LostRankError, naming worker and clip, when a worker dies or is stuck; the loader's own errors pass through.
    """
    source = _Source(loader, settings)
    try:
        while (batch := source.next(stopped)) is not None:
            yield batch
    finally:
        source.close()


class _Source:
    """Runs the loader in a thread and watches its workers."""

    def __init__(self, loader: DataLoader[Batch], settings: FeedSettings) -> None:
        assert isinstance(loader.dataset, Batches)
        self._loader, self._batches, self._settings = loader, loader.dataset, settings
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: one batch more; False: end.
        self._answers: queue.SimpleQueue[Batch | BaseException | None] = queue.SimpleQueue()
        self._workers: list[BaseProcess] = []
        self._waited_at: dict[int, tuple[int, float]] = {}  # Worker -> (its sample, since when).
        self._reported: dict[int, int] = {}  # Worker -> the sample for which it was reported as slow.
        self._broken = False  # The thread may never answer again, so `close` does not wait for it.
        self._stacks: IO[bytes] = tempfile.NamedTemporaryFile(prefix="sfa_dist-")  # noqa: SIM115 (closed in `close`)
        self._batches.stacks = self._stacks.name
        self._thread = threading.Thread(target=self._serve, name="feed", daemon=True)
        self._thread.start()
        for _ in range(self._batches.ahead):
            self._requests.put(True)

    def _serve(self) -> None:
        try:
            if self._settings.device is not None and self._settings.device.type == "cuda":
                torch.cuda.set_device(self._settings.device)
            others = set(multiprocessing.active_children())
            batches = iter(self._loader)  # Forks the workers.
            self._workers = [child for child in multiprocessing.active_children() if child not in others]
            while self._requests.get():
                self._answers.put(next(batches, None))
        except BaseException as error:  # noqa: BLE001 (`next` raises it in the main thread)
            self._answers.put(error)

    def next(self, stopped: Callable[[], bool]) -> Batch | None:
        """The next batch; None at the end of the loader, or once `stopped()` is true."""
        if stopped():
            return None
        self._requests.put(True)
        self._waited_at.clear()
        while True:
            try:
                answer = self._answers.get(timeout=POLL_S)
            except queue.Empty:
                if stopped():
                    return None
                self._check_workers()
                continue
            if isinstance(answer, BaseException):
                self._broken = True
                # A dead worker is the cause, and the loader's error its effect: wait for the exit code, and raise that.
                end = time.monotonic() + DEATH_S
                while self._workers and not any(w.exitcode for w in self._workers) and time.monotonic() < end:
                    time.sleep(DEATH_POLL_S)
                self._check_workers()
                raise answer
            return answer

    def close(self) -> None:
        """Ends the workers. They ignore signals, so one that hangs in a decoder is killed."""
        self._requests.put(False)
        if (self._workers or self._batches.ahead) and not self._broken:
            self._thread.join(SHUTDOWN_S)
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()
        for worker in self._workers:
            worker.join(SHUTDOWN_S)
        self._stacks.close()

    def _check_workers(self) -> None:
        """Raises LostRankError for a dead or stuck worker, and prints a warning for a slow one."""
        for worker in self._workers:
            if worker.exitcode:
                self._broken = True
                raise LostRankError(self._describe_death(worker))
        now = time.monotonic()
        for number, (pid, sample) in enumerate(self._batches.positions.tolist()):
            seen, since = self._waited_at.setdefault(number, (sample, now))
            # A worker between two clips may have nothing to do; only a stopped one counts as stuck there.
            if sample != seen or (sample == NO_SAMPLE and not self._is_stopped(pid)):
                self._waited_at[number] = (sample, now)
            elif now - since > self._settings.patience:
                self._broken = True
                raise LostRankError(
                    f"{self._describe_wait(number, pid, sample, now - since)}; check the storage, or remove the clip "
                    "from the shards, and run the same command again to go on from the last checkpoint"
                )
            elif now - since > self._settings.report_after and self._reported.get(number) != sample:
                self._reported[number] = sample
                wait = self._describe_wait(number, pid, sample, now - since)
                print_line(f"warning: {wait}; still waiting, the run ends after {self._settings.patience:.0f} s")

    def _is_stopped(self, pid: int) -> bool:
        return pid != NO_SAMPLE and self._settings.state_of(pid) in ("T", "t")

    def _describe_wait(self, number: int, pid: int, sample: int, seconds: float) -> str:
        """Which worker has been where for how long, with the kernel's state of its process."""
        at = "between two clips" if sample == NO_SAMPLE else f"at clip {self._batches.index.name(sample)}"
        letter = None if pid == NO_SAMPLE else self._settings.state_of(pid)
        state = f" (process {pid}, {STATES.get(letter, f'state {letter}')})" if letter else ""
        return f"{self._settings.who}: loader worker {number} has been {at} for {seconds:.0f} s{state}"

    def _describe_death(self, worker: BaseProcess) -> str:
        """How a worker ended, at which clip, and what to do."""
        by_pid = {pid: (number, sample) for number, (pid, sample) in enumerate(self._batches.positions.tolist())}
        number, sample = by_pid.get(worker.pid or 0, (-1, NO_SAMPLE))
        code = worker.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        at = "between two clips" if sample == NO_SAMPLE else f"at clip {self._batches.index.name(sample)}"
        if number < 0:
            at = "before its first clip"
        text = f"{self._settings.who}: loader worker {number} (process {worker.pid}) {how} {at}"
        advice = "run the same command again to go on from the last checkpoint"
        if -code == signal.SIGKILL:
            advice = f"the system kills processes where memory is short (fewer data.workers use less); {advice}"
        elif -code in CRASHES:
            advice = self._note_crash(sample, how) + advice
        return f"{text}; {advice}"

    def _note_crash(self, sample: int, how: str) -> str:
        """Saves the worker's stacks and quarantines its clip; returns what was done, for the message.

        A disk error goes into the message too: it must not replace the crash as the reported cause.
        """
        note = ""
        stacks, quarantine = self._settings.stacks, self._settings.quarantine
        try:
            if stacks is not None and (written := Path(self._stacks.name).read_bytes()):
                stacks.parent.mkdir(parents=True, exist_ok=True)
                with stacks.open("ab") as file:
                    file.write(written)
                note = f"its stacks are in {stacks}; "
        except OSError as error:
            note = f"its stacks are lost ({explain(error, self._settings.stacks)}); "
        if quarantine is None or sample == NO_SAMPLE:
            return note
        try:
            add_to_quarantine(quarantine, self._batches.index, sample, f"its decoder {how}")
        except CheckpointError as error:
            return f"{note}{error}, so the next start will crash on the clip again; "
        return f"{note}the clip is in {quarantine} and counts as bad from now on; "
