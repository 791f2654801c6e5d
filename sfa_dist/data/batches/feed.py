"""A loader's batches, waited for with open eyes: a stop request, a worker that died or one that is stuck ends the wait.

The loader runs in a thread of its own and is asked for one batch at a time, so the main thread never waits inside of
it. Workers write the sample that they are at into a few shared integers (`Batches.positions`): that is how a worker
that was killed, or whose decoder crashed, can be told with its clip.

Killed workers are named. The clip of a crash (SIGSEGV and its like) goes to the quarantine too, so that the next start
does not crash on it again.
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

BatchFeed = Generator[Batch, None, None]  # Close it when done.
STATES = {
    "R": "running",
    "S": "asleep",
    "D": "waiting for the disk",
    "T": "stopped by a signal, kill -CONT lets it go on",
    "t": "stopped by a debugger",
}
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)

# Seconds.
POLL_S = 0.2
DEATH_S, DEATH_POLL_S = 2.0, 0.02  # For a worker to be dead, after the first sign of it.
SHUTDOWN_S = 3.0  # For workers to finish what they are at.
REPORT_AFTER_S = 30.0  # After which such a worker is told.
PATIENCE_S = 300.0  # With one clip, in a worker that is waited for. Under the time that the other ranks wait for this.


@dataclass(frozen=True)
class Streams:
    """What the training loop draws from: `train(epoch, first_step)` yields this rank's micro-batches, `evaluate()`
    its share of a test. Both end early once this rank is asked to stop."""

    steps_per_epoch: int
    accumulation: int
    train: Callable[[int, int], BatchFeed]
    evaluate: Callable[[], BatchFeed] | None
    clip_name: Callable[[int], str] = str  # Of a number in a training batch's `ids`.
    encoding: Callable[[], ClipEncoding | None] = lambda: None  # Of the training clips; reads some when it is asked.
    loops_reported: bool = False  # How many videos are shorter than a clip has been said.


@dataclass(frozen=True)
class FeedSettings:
    """Who reads, and where a crash is written down: the rank in words, the quarantine's file, the file for stacks.

    `device` is what batches are pinned for: which card is the current one is a matter of each thread.
    """

    who: str
    quarantine: Path | None = None
    stacks: Path | None = None
    patience: float = PATIENCE_S
    report_after: float = REPORT_AFTER_S
    state_of: Callable[[int], str | None] = lambda pid: None  # The kernel's letter for a process, where it is known.
    device: torch.device | None = None


def feed(loader: DataLoader[Batch], settings: FeedSettings, stopped: Callable[[], bool] = bool) -> BatchFeed:
    """The batches of a loader of `Batches`; they end early once `stopped()` is true. Close it when done.

    Raises LostRankError that names worker and clip, when a worker died or is stuck.
    """
    source = _Source(loader, settings)
    try:
        while (batch := source.next(stopped)) is not None:
            yield batch
    finally:
        source.close()


class _Source:
    """The thread that runs the loader, and what its workers are at."""

    def __init__(self, loader: DataLoader[Batch], settings: FeedSettings) -> None:
        assert isinstance(loader.dataset, Batches)
        self._loader, self._batches, self._settings = loader, loader.dataset, settings
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[Batch | BaseException | None] = queue.SimpleQueue()
        self._workers: list[BaseProcess] = []
        self._waited_at: dict[int, tuple[int, float]] = {}  # Worker -> its sample, and since when it was seen there.
        self._reported: dict[int, int] = {}  # Worker -> the sample at which it was told to be slow.
        self._broken = False
        self._stacks: IO[bytes] = tempfile.NamedTemporaryFile(prefix="sfa_dist-")  # noqa: SIM115 (closed in `close`)
        self._batches.stacks = self._stacks.name
        self._thread = threading.Thread(target=self._serve, name="feed", daemon=True)
        self._thread.start()
        for _ in range(self._batches.ahead):
            self._asked.put(True)

    def _serve(self) -> None:
        try:
            if self._settings.device is not None and self._settings.device.type == "cuda":
                torch.cuda.set_device(self._settings.device)
            others = set(multiprocessing.active_children())
            batches = iter(self._loader)  # Forks the workers.
            self._workers = [child for child in multiprocessing.active_children() if child not in others]
            while self._asked.get():
                self._given.put(next(batches, None))
        except BaseException as error:  # noqa: BLE001 (raised where the batch is waited for)
            self._given.put(error)

    def next(self, stopped: Callable[[], bool]) -> Batch | None:
        """The next batch; None at the end, and once `stopped()` is true."""
        if stopped():
            return None
        self._asked.put(True)
        self._waited_at.clear()
        while True:
            try:
                answer = self._given.get(timeout=POLL_S)
            except queue.Empty:
                if stopped():
                    return None
                self._look_at_workers()
                continue
            if isinstance(answer, BaseException):
                self._broken = True
                # A worker's death is the better story: what it had sent cannot be fetched any more.
                end = time.monotonic() + DEATH_S
                while self._workers and not any(w.exitcode for w in self._workers) and time.monotonic() < end:
                    time.sleep(DEATH_POLL_S)
                self._look_at_workers()
                raise answer
            return answer

    def close(self) -> None:
        """Ends the workers; they ignore signals, so one that hangs in a decoder has to be killed."""
        self._asked.put(False)
        if (self._workers or self._batches.ahead) and not self._broken:
            self._thread.join(SHUTDOWN_S)
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()
        for worker in self._workers:
            worker.join(SHUTDOWN_S)
        self._stacks.close()

    def _look_at_workers(self) -> None:
        for worker in self._workers:
            if worker.exitcode:
                self._broken = True
                raise LostRankError(self._describe_death(worker))
        now = time.monotonic()
        for number, (pid, sample) in enumerate(self._batches.positions.tolist()):
            seen, since = self._waited_at.setdefault(number, (sample, now))
            # Between two clips it may have nothing to do, unless somebody has stopped it there.
            if sample != seen or (sample == NO_SAMPLE and not self._is_stopped(pid)):
                self._waited_at[number] = (sample, now)
            elif now - since > self._settings.patience:
                self._broken = True
                raise LostRankError(
                    f"{self._stuck(number, pid, sample, now - since)}; look at the storage, or take the clip out of "
                    "the shards and run the same command again to go on from the last checkpoint"
                )
            elif now - since > self._settings.report_after and self._reported.get(number) != sample:
                self._reported[number] = sample
                limit = f"the run ends after {self._settings.patience:.0f} s of it"
                print_line(f"warning: {self._stuck(number, pid, sample, now - since)}; waiting for it, {limit}")

    def _is_stopped(self, pid: int) -> bool:
        return pid != NO_SAMPLE and self._settings.state_of(pid) in ("T", "t")

    def _stuck(self, number: int, pid: int, sample: int, seconds: float) -> str:
        """Which worker waits where, and what the kernel says of it."""
        at = "between two clips" if sample == NO_SAMPLE else f"at clip {self._batches.index.name(sample)}"
        letter = None if pid == NO_SAMPLE else self._settings.state_of(pid)
        state = f" (process {pid}, {STATES.get(letter, f'state {letter}')})" if letter else ""
        return f"{self._settings.who}: loader worker {number} has been {at} for {seconds:.0f} s{state}"

    def _describe_death(self, worker: BaseProcess) -> str:
        """What became of a worker, at which clip, and what to do."""
        rows = {pid: (number, sample) for number, (pid, sample) in enumerate(self._batches.positions.tolist())}
        number, sample = rows.get(worker.pid or 0, (-1, NO_SAMPLE))
        code = worker.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        at = "between two clips" if sample == NO_SAMPLE else f"at clip {self._batches.index.name(sample)}"
        if number < 0:
            at = "before its first clip"
        text = f"{self._settings.who}: loader worker {number} (process {worker.pid}) {how} {at}"
        advice = "run the same command again to go on from the last checkpoint"
        if -code == signal.SIGKILL:
            advice = f"where memory is short the system kills (fewer data.workers take less); {advice}"
        elif -code in CRASHES:
            advice = self._note_crash(sample, how) + advice
        return f"{text}; {advice}"

    def _note_crash(self, sample: int, how: str) -> str:
        """Writes down what can be; a disk that refuses must not take the place of the crash."""
        told = ""
        stacks, quarantine = self._settings.stacks, self._settings.quarantine
        try:
            if stacks is not None and (written := Path(self._stacks.name).read_bytes()):
                stacks.parent.mkdir(parents=True, exist_ok=True)
                with stacks.open("ab") as file:
                    file.write(written)
                told = f"its stacks are in {stacks}; "
        except OSError as error:
            told = f"its stacks are lost ({explain(error, self._settings.stacks)}); "
        if quarantine is None or sample == NO_SAMPLE:
            return told
        try:
            add_to_quarantine(quarantine, self._batches.index, sample, f"its decoder {how}")
        except CheckpointError as error:
            return f"{told}{error}, so the next start meets it again; "
        return f"{told}the clip is in {quarantine} and counts as bad from now on; "
