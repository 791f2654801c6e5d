"""The loader processes: what they get, how they start and end, and how they report where they are."""

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
    """Batches of the samples of `index`, made by `workers` processes that report where they are.

    `positions`, int64 (workers, 2), is shared by all processes: each worker's process id and the sample that it reads,
    or NO_SAMPLE. `stacks` names the file that a crashing worker writes its stacks to. `ahead` is how many batches a
    feed without workers makes before they are asked for: those that a card decodes beside the training.
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
    """Unpacks what workers send, raises the SfaError of a worker as the one line that it is (DataLoader makes the
    worker's traceback its text), and ends its workers with the iteration.

    They would outlive an error, whose traceback holds their iterator, and ignore the SIGTERM that Python sends them
    before it waits for them at its exit, so the process would not end.
    """

    pins = False  # Whether batches of workers are copied into page-locked memory.

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        sent: Iterator[Any] = super().__iter__()
        return _guarded(sent, Receiver(self.pins) if self.num_workers else _as_it_is)


def _guarded(sent: Iterator[Any], receive: Callable[[Any], Batch]) -> Iterator[Batch]:
    try:
        yield from map(receive, sent)
    except SfaError as error:
        kind = type(error)
        name = f"{kind.__module__}.{kind.__qualname__}: "
        raise kind(str(error).strip().splitlines()[-1].removeprefix(name)) from error
    finally:
        end_workers = getattr(sent, "_shutdown_workers", None)  # only where there are any
        if end_workers is not None:
            end_workers()


def make_loader(
    batches: Dataset[Batch], items: Iterable[int], workers: int, pin_memory: bool, prefetch_factor: int
) -> Loader:
    """A loader of the given items, in order, from `workers` processes (0: this one)."""
    collate: Callable[[Any], Any] = Sender(prefetch_factor) if workers else _as_it_is
    loader = Loader(
        batches,
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=start_worker,
        prefetch_factor=prefetch_factor if workers else None,
        pin_memory=pin_memory and not workers,  # Those of workers are pinned as they come out of their buffers.
        generator=torch.Generator(),  # its own: making an iterator draws a number, which must not shift the model's
    )
    loader.pins = pin_memory and workers > 0
    return loader


def _as_it_is(batch: Batch) -> Batch:
    return batch


def start_worker(worker: int) -> None:
    """Signals go to the whole process group, but stopping is the trainer's decision: a worker that dies of one would
    take the rank with it before its state is saved. One thread each: the workers are the parallelism.

    A crash is written down by its stacks alone; torch's own handlers would add a line to the rank's stderr.
    """
    signal.set_wakeup_fd(-1)  # The rank's, that a fork hands down.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.disable()  # The rank's, where it has one: it keeps the handlers that it found.
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)
    info = get_worker_info()
    assert info is not None
    batches = info.dataset
    if isinstance(batches, Batches):
        batches.positions[worker, 0] = os.getpid()
        faulthandler.enable(open(batches.stacks, "ab", buffering=0))  # noqa: SIM115 (open until the worker ends)
    torch.set_num_threads(1)
