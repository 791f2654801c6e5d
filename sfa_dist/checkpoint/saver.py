"""A save during training: staged at a step's boundary, written by a thread of each rank, committed by rank 0.

    boundary of step s     the state is staged in host memory, space is checked, rank 0 makes the folder
    steps s+1, ...         each rank's thread writes, flushes and hashes its part
    a later boundary       all parts are written: rank 0's thread checks the whole, renames it, purges old checkpoints
    a later boundary       the checkpoint is complete

Whether ranks are still busy, and whether one has failed, are two numbers in the sum over ranks that every step computes
anyway (`Saver.status`, `Saver.advance`), so all ranks take each turn at the same boundary. One save is pending at a
time. A synchronous save is the same save, followed by a wait.
"""

from __future__ import annotations

import copy
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError

from sfa_dist.boundary.disk import explain, free_bytes, no_space
from sfa_dist.checkpoint.failpoints import NO_FAILPOINTS, Failpoints
from sfa_dist.checkpoint.files import LOOSE_FILE_SYSTEMS, file_system
from sfa_dist.checkpoint.folder import FORMAT, CheckpointDir, clear_remains
from sfa_dist.checkpoint.layout import Layout, plan_layout
from sfa_dist.checkpoint.staging import HostMemory, Piece
from sfa_dist.checkpoint.writing import (
    MODEL,
    CalledOffError,
    NotFiniteError,
    SavePart,
    begin_model,
    write_part,
)
from sfa_dist.errors import CheckpointError, LostRankError
from sfa_dist.parallel.engines.engine import Engine
from sfa_dist.parallel.runtime import Runtime

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """How a save ended: as a checkpoint at `path`, or `refused` (the reason) because a value in it is not finite."""

    step: int
    path: Path
    refused: str | None
    blocked_seconds: float  # How long training was blocked.
    seconds: float  # From the start of the save until all ranks knew the outcome.


class Saver:
    """The saves of one stage into `root`, of which the newest `keep` stay. Made and used by all ranks together.

    All masters go into one file, into which each rank writes what it owns. Rank 0 collects and writes all of them
    if the ranks are on several nodes and on a file system where they might overwrite each other's bytes, or if
    `share_file` is False.
    """

    def __init__(
        self,
        root: Path,
        runtime: Runtime,
        keep: int,
        failpoints: Failpoints = NO_FAILPOINTS,
        share_file: bool | None = None,
    ) -> None:
        self.runtime, self.failpoints = runtime, failpoints
        self._root = root
        self._checkpoints = CheckpointDir(root, keep)
        self._memory = HostMemory()
        self._share_file = self._may_share() if share_file is None else share_file
        self._pending: PendingSave | None = None

    def _may_share(self) -> bool:
        ranks = self.runtime.gather((self.runtime.host, file_system(self._root).startswith(LOOSE_FILE_SYSTEMS)))
        return len({host for host, _ in ranks}) == 1 or not any(loose for _, loose in ranks)

    def begin(self, step: int, engine: Engine, state: Mapping[str, Any]) -> None:
        """Stages the engine's state and starts to write it, with `state` as state.json. Collective.

        No other save may be pending. Raises CheckpointError on every rank if any rank's disk refuses; older checkpoints
        stay.
        """
        if self._pending is not None:
            raise RuntimeError("a save is in flight")
        started = time.monotonic()
        layout = plan_layout(engine.shapes())
        part: SavePart | None = None
        fault: tuple[str, str] | None = None
        try:
            part = self._stage(step, engine, layout, {"format": FORMAT, "step": step, **state})
            if self.runtime.is_main:
                clear_remains(self._root)
        except OSError as error:
            temporary = self._checkpoints.names(step)[1]
            part, fault = None, ("disk", self._describe(error, f"stage {temporary}", layout.size))
        sizes = self.runtime.gather(part.size if part else 0)
        needed = sum(sizes) + len(layout.header)
        if fault is None:
            fault = self._prepare(step, layout, needed)
        self._raise_first(self.runtime.gather(fault))
        assert part is not None
        called_off = threading.Event()
        worker = _Worker(lambda: write_part(part, self.failpoints, called_off))
        self._pending = PendingSave(step, layout, needed, worker, called_off, started, time.monotonic() - started)

    def _stage(self, step: int, engine: Engine, layout: Layout, state: Mapping[str, Any]) -> SavePart:
        runtime = self.runtime
        mine = runtime.rank < engine.owners
        pieces = self._memory.stage(engine.fragments()) if mine else []
        masters = [piece for piece in pieces if piece.key == "master"]
        if not self._share_file and engine.owners > 1:
            whole = engine.full_parameters()
            masters = [Piece(name, 0, "master", value.view(-1)) for name, value in whole.items()]
        self.failpoints.reach("save.stage", step=step)
        return SavePart(
            folder=self._checkpoints.names(step)[1],
            layout=layout,
            masters=masters,
            moments=[piece for piece in pieces if piece.key != "master"],
            optimizer=f"optimizer-{runtime.rank:05d}-of-{engine.owners:05d}.safetensors" if mine else "",
            state=copy.deepcopy(state) if runtime.is_main else None,  # Training goes on changing the original.
            step=step,
        )

    def _prepare(self, step: int, layout: Layout, needed: int) -> tuple[str, str] | None:
        """Checks the free space and makes, on rank 0, the folder and the common file. Returns a fault or None."""
        _, temporary, _ = self._checkpoints.names(step)
        try:
            if free_bytes(self._root) < needed:
                return "disk", self._describe(no_space(self._root, needed), f"write {temporary}", needed)
            if self.runtime.is_main:
                temporary.mkdir(parents=True)
                begin_model(temporary / MODEL, layout)
        except OSError as error:
            return "disk", self._describe(error, f"prepare {temporary}", needed)
        return None

    def status(self) -> tuple[bool, bool]:
        """(this rank still writes, its part has failed). `advance` takes the sums of both over all ranks."""
        worker = self._pending.worker if self._pending else None
        if worker is None:
            return False, False
        busy = worker.is_alive()
        return busy, not busy and worker.error is not None

    def advance(self, busy: float, failed: float) -> Outcome | None:
        """Takes the next turn of the pending save once all ranks are ready for it. Collective.

        `busy` and `failed` are the sums of `status` over all ranks. Returns the outcome when the save is over, else
        None. Raises CheckpointError on every rank if a rank's disk failed, LostRankError for any other failure; older
        checkpoints stay as they are.
        """
        pending = self._pending
        if pending is None or (busy and not failed):
            return None
        if failed:
            return self._give_up(pending)
        if not pending.committing:
            written: list[Any] = self.runtime.gather(pending.worker.value if pending.worker else None)
            pending.committing, pending.worker = True, None
            if self.runtime.is_main:
                pending.worker = _Worker(
                    lambda: self._checkpoints.commit(pending.step, pending.layout, written, self.failpoints)
                )
            return None
        self._pending = None
        return self._outcome(pending, None)

    def _give_up(self, pending: PendingSave) -> Outcome:
        pending.called_off.set()
        fault = None
        if pending.worker is not None:
            pending.worker.join()
            fault = self._fault(pending, pending.worker.error)
        self._pending = None
        faults = self.runtime.gather(fault)
        if self.runtime.is_main:  # Frees the disk. If that fails now, the next save tries again.
            shutil.rmtree(self._checkpoints.names(pending.step)[1], ignore_errors=True)
        refused = next((text for kind, text in filter(None, faults) if kind == "not finite"), None)
        self._raise_first([fault for fault in faults if fault is None or fault[0] != "not finite"])
        return self._outcome(pending, refused)

    def _fault(self, pending: PendingSave, error: BaseException | None) -> tuple[str, str] | None:
        """What went wrong on this rank, as (kind, message); None if nothing did."""
        final, temporary, _ = self._checkpoints.names(pending.step)
        what = f"commit {final}" if pending.committing else f"write {temporary}"
        if error is None or isinstance(error, CalledOffError):
            return None
        if isinstance(error, NotFiniteError):
            return "not finite", f"{error} on rank {self.runtime.rank}"
        if isinstance(error, OSError | SafetensorError | CheckpointError):
            return "disk", self._describe(error, what, pending.needed)
        return "internal", self._describe(f"{type(error).__name__}: {error}", what, 0)

    def _describe(self, error: BaseException | str, what: str, needed: int) -> str:
        reason = explain(error, self._root, needed) if isinstance(error, OSError | SafetensorError) else error
        return f"rank {self.runtime.rank} on {self.runtime.host} could not {what}: {reason}"

    def _raise_first(self, faults: list[tuple[str, str] | None]) -> None:
        for kind, text in filter(None, faults):
            message = f"{text}; older checkpoints are untouched"
            raise self.runtime.for_all(CheckpointError(message) if kind == "disk" else LostRankError(message))

    def _outcome(self, pending: PendingSave, refused: str | None) -> Outcome:
        path = self._checkpoints.names(pending.step)[0]
        return Outcome(pending.step, path, refused, pending.blocked, time.monotonic() - pending.started)

    def finish(self) -> Outcome | None:
        """Waits for the pending save, if there is one. Collective. Raises what `advance` raises."""
        while self._pending is not None:
            if self._pending.worker is not None:
                self._pending.worker.join()
            outcome = self.advance(*self.runtime.sum(*self.status()))
            if outcome is not None:
                return outcome
        return None

    def abandon(self) -> None:
        """Cancels the pending save because the run ends with an error. Not collective."""
        if self._pending is not None:
            self._pending.called_off.set()


@dataclass
class PendingSave:
    """A save that is not over. `worker` is this rank's thread, None if it has none in this turn."""

    step: int
    layout: Layout
    needed: int
    worker: _Worker[Any] | None
    called_off: threading.Event
    started: float
    blocked: float
    committing: bool = False


class _Worker(threading.Thread, Generic[T]):
    """`work()` in a thread. Either `value` or `error` is set when the thread has ended.

    Not a daemon: at exit Python would stop it in the middle of a C++ call, which crashes the process.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(name="checkpoint")
        self._work = work
        self.value: T | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Runs in the thread."""
        try:
            self.value = self._work()
        except BaseException as error:  # noqa: BLE001 (reported to all ranks at the next boundary)
            self.error = error
