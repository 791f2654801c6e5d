"""The loader and its worker processes: how they start and end, and how they report which sample they read."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.transport import Receiver, Sender, share
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.errors import SfaError

NO_SAMPLE = -1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Batches(Dataset[Batch]):
    """Batches of the samples of `index`, made by `workers` processes that report which sample they read.

    `positions`, int64 (max(workers, 1), 2), is shared by all processes: each worker's process id and the sample that it
    reads, or NO_SAMPLE. A crashing worker writes its stacks to the file `stacks`. Without workers a feed requests
    `ahead` batches in advance, so that a card can decode beside the training.
    """

    ahead = 0

    def __init__(self, index: SampleIndex, workers: int = 0) -> None:
        self.index = index
        self.positions = torch.full((max(workers, 1), 2), NO_SAMPLE)
        if workers:
            share(self.positions)
        self.stacks = os.devnull

    def own_position(self) -> torch.Tensor:
        """This process's row of `positions`."""
        worker = get_worker_info()
        return self.positions[worker.id if worker else 0]


class Loader(DataLoader[Batch]):
    """A DataLoader that unpacks its workers' messages, passes on their errors, and ends them with the iteration.

    A worker's SfaError is raised with its own one-line text; DataLoader would put the worker's traceback there. Workers
    are ended explicitly: after an error the traceback keeps their iterator alive, and they ignore the SIGTERM that
    Python sends before it joins them at exit, so the process would hang.
    """

    pins = False  # Whether batches from workers are copied into page-locked memory.

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        sent: Iterator[Any] = super().__iter__()
        return _guarded(sent, Receiver(self.pins) if self.num_workers else _unchanged)


def _guarded(sent: Iterator[Any], receive: Callable[[Any], Batch]) -> Iterator[Batch]:
    try:
        yield from map(receive, sent)
    except SfaError as error:
        kind = type(error)
        name = f"{kind.__module__}.{kind.__qualname__}: "
        raise kind(str(error).strip().splitlines()[-1].removeprefix(name)) from error
    finally:
        end_workers = getattr(sent, "_shutdown_workers", None)  # Absent where there are no workers.
        if end_workers is not None:
            end_workers()


def make_loader(
    batches: Dataset[Batch], items: Iterable[int], workers: int, pin_memory: bool, prefetch_factor: int
) -> Loader:
    """A loader of the given items, in order, made by `workers` processes (0: by this one)."""
    collate: Callable[[Any], Any] = Sender(prefetch_factor) if workers else _unchanged
    loader = Loader(
        batches,
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=start_worker,
        prefetch_factor=prefetch_factor if workers else None,
        pin_memory=pin_memory and not workers,  # With workers, `Receiver` pins what it copies out of the buffers.
        generator=torch.Generator(),  # Its own: creating an iterator draws a number, which must not shift the model's.
    )
    loader.pins = pin_memory and workers > 0
    return loader


def _unchanged(batch: Batch) -> Batch:
    return batch


def leave_signals_to_the_rank() -> None:
    """Prepares a process that a rank has forked: signals ignored, no handlers of crashes, one thread.

    Signals reach the whole process group, but only the trainer decides to stop.
    """
    signal.set_wakeup_fd(-1)  # The fork inherits the rank's.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.disable()  # The rank's, if it has one: it still refers to the handlers that it found there.
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)


def start_worker(worker: int) -> None:
    """Prepares a worker process: signals ignored, stacks written on a crash, one thread.

    A worker killed by a signal would take the rank down before its state is saved. A crash writes its stacks and
    nothing else; torch's own handlers would add a line to the rank's stderr. One thread is enough, because the workers
    are the parallelism.
    """
    leave_signals_to_the_rank()
    info = get_worker_info()
    assert info is not None
    batches = info.dataset
    if isinstance(batches, Batches):
        batches.positions[worker, 0] = os.getpid()
        faulthandler.enable(open(batches.stacks, "ab", buffering=0))  # noqa: SIM115 (stays open until the worker ends)
