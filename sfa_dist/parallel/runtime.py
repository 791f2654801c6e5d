"""This process as one of the ranks: its rank, its device and the small collectives that control a run."""

from __future__ import annotations

import datetime
import itertools
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sfa_dist.boundary.disk import explain
from sfa_dist.errors import CheckpointError, RecipeError, SfaError, UsageError
from sfa_dist.parallel.devices import DeviceChoice, agree, choose_device, own_place
from sfa_dist.parallel.environment import set_default
from sfa_dist.parallel.joining import join
from sfa_dist.parallel.launch import Launch, read_launch
from sfa_dist.parallel.rendezvous import meet, read_rendezvous

T = TypeVar("T")
E = TypeVar("E", bound=SfaError)

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
ODD_RANKS_SHOWN = 4
POLL_S, LONGEST_POLL_S = 0.005, 1.0


@dataclass(frozen=True)
class Runtime:
    """This process in a started process group."""

    launch: Launch
    device: torch.device
    host: str
    store: dist.Store | None = None  # The store of the rendezvous.
    core_sharers: int = 1  # Ranks that may run on this rank's cores, itself included.
    _main_calls: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)  # Calls of on_main.

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def is_main(self) -> bool:
        """True on rank 0, which logs and writes what all ranks share."""
        return self.launch.rank == 0

    @property
    def cores(self) -> int:
        """This process's share of the CPU cores that it may run on, at least 1."""
        return max(1, len(os.sched_getaffinity(0)) // self.core_sharers)

    def sum(self, *values: float) -> list[float]:
        """Element-wise sums over all ranks, in fp64, the same on each rank. Collective."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in rank order, on each rank. Collective."""
        out: list[T] = [value] * self.world_size
        dist.all_gather_object(out, value)
        return out

    def gather_to_main(self, value: T) -> list[T]:
        """The values of all ranks in rank order on rank 0; an empty list on the others. Collective."""
        out: list[T] | None = [value] * self.world_size if self.is_main else None
        dist.gather_object(value, out)
        return out or []

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank. Collective."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 and returns its value, or raises its error, on every rank. Collective.

        An OSError becomes a CheckpointError. The other ranks wait without a timeout: hashing a data set may take hours.
        """
        value: Any = None
        fault: SfaError | None = None
        if self.is_main:
            try:
                value = work()
            except SfaError as error:
                fault = error
            except OSError as error:
                fault = CheckpointError(f"rank 0 on {self.host}: {explain(error)}")
        self._await_main()
        value, fault = self.broadcast((value, fault))
        if fault is not None:
            raise self.for_all(fault)
        return value

    def everywhere(self, work: Callable[[], T]) -> list[T]:
        """Runs `work` on every rank and returns all values in rank order. Collective.

        If it fails on one rank, that error is raised on all of them; an OSError becomes a CheckpointError.
        """
        value: Any = None
        fault: SfaError | None = None
        try:
            value = work()
        except SfaError as error:
            fault = error
        except OSError as error:
            fault = CheckpointError(f"rank {self.rank} on {self.host}: {explain(error)}")
        outcomes = self.gather((value, fault))
        first = next((fault for _, fault in outcomes if fault is not None), None)
        if first is not None:
            raise self.for_all(first)
        return [value for value, _ in outcomes]

    def each(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank and returns this rank's value, without sending it. Errors as in `everywhere`."""
        own: list[T] = []
        self.everywhere(lambda: own.append(work()))
        return own[0]

    def _await_main(self) -> None:
        """Returns when rank 0 gets here.

        Not by a collective, which fails after COLLECTIVE_TIMEOUT. If rank 0 is lost meanwhile, the watch reports it.
        """
        if self.store is None or self.world_size == 1:
            return
        key = f"on_main/{next(self._main_calls)}"
        pause = POLL_S
        try:
            if self.is_main:
                self.store.set(key, "")
            while not self.store.check([key]):
                time.sleep(pause)
                pause = min(1.5 * pause, LONGEST_POLL_S)
        except dist.DistError:
            return  # The store ended with its launcher; the run must still be able to save its state.

    def require_equal(self, what: str, value: str) -> None:
        """Checks that all ranks have the same `value` of `what`. Collective.

        Otherwise raises RecipeError on every rank; it names the ranks whose value is not the most common one.
        """
        values = self.gather((value, self.host))
        count = Counter(value for value, _ in values)
        if len(count) == 1:
            return
        common = count.most_common(1)[0][0]  # Of equally common ones the lowest rank's.
        odd = [f"rank {rank} on {host}: {own}" for rank, (own, host) in enumerate(values) if own != common]
        more = f", and {len(odd) - ODD_RANKS_SHOWN} more" if len(odd) > ODD_RANKS_SHOWN else ""
        raise self.for_all(
            RecipeError(
                f"the ranks disagree on {what}: {', '.join(odd[:ODD_RANKS_SHOWN])}{more}, but on the other "
                f"{self.world_size - len(odd)}: {common}; do all nodes see the same files and environment?"
            )
        )

    def for_all(self, error: E) -> E:
        """Marks an error that every rank raises so that it is printed once (`Launch.prints_errors`)."""
        error.print_suppressed = not self.launch.prints_errors
        return error

    def barrier(self) -> None:
        """Returns when all ranks have called it. On the CPU: it does not wait for work on the device. Collective."""
        self.sum(0.0)

    def synchronize(self) -> None:
        """Waits for the current stream of the device, so that a clock read after it measures the work on it.

        Work on other streams goes on.
        """
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def peak_memory_gib(self) -> float:
        """Peak of allocated device memory in GiB; on a CPU the peak resident set of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def memory_summary(self) -> str:
        """Used and free memory, as text for a message."""
        if self.device.type == "cuda":
            free, size = (n / 2**30 for n in torch.cuda.mem_get_info(self.device))
            now = torch.cuda.memory_allocated(self.device) / 2**30
            taken = f"{now:.1f} GiB allocated, at most {self.peak_memory_gib():.1f}"
            return f"{taken}; {free:.1f} of the GPU's {size:.1f} GiB free"
        free, size = (os.sysconf(n) * os.sysconf("SC_PAGE_SIZE") / 2**30 for n in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
        return f"at most {self.peak_memory_gib():.1f} GiB resident; {free:.1f} of the host's {size:.1f} GiB free"

    def reset_peak_memory(self) -> None:
        """Starts a new peak on a GPU. Does nothing on a CPU: a process's peak resident set cannot be reset."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def start(environ: Mapping[str, str], device: DeviceChoice = "auto") -> Runtime:
    """Joins the process group: gloo for CPU tensors, and NCCL for CUDA tensors if there is a GPU.

    `device` is the recipe's. Raises UsageError for a wrong launch or a device that cannot be used (devices.py),
    LostRankError if the other ranks do not come in time (rendezvous.py) or do not connect (joining.py),
    PreemptedError if one is asked to stop meanwhile.
    """
    launch = read_launch(environ)
    if launch.world_size == 1:
        own = choose_device(device, launch, environ)
        store: dist.Store = dist.HashStore()
        dist.init_process_group(_begin(own), store=store, rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
        sharers = 1
    else:
        own = torch.device("cpu")
        try:
            own = choose_device(device, launch, environ)
            backend, place = _begin(own), own_place(own)
        except (UsageError, RuntimeError) as error:  # CUDA's are RuntimeErrors: a GPU that is busy, full or broken.
            backend, place = "", own_place(None, " ".join(str(error).split()))
        config = read_rendezvous(environ, launch)
        store = meet(config)
        store.set_timeout(COLLECTIVE_TIMEOUT)
        sharers = agree(place, config, store)  # Raises the fault of a place that has one.
        join(backend, config, store, environ, COLLECTIVE_TIMEOUT)
    set_default("LOCAL_RANK", str(launch.local_rank))  # DeepSpeed asks for it, and srun does not set it.
    return Runtime(launch, own, socket.gethostname(), store, sharers)


def _begin(device: torch.device) -> str:
    """Makes `device` this process's own, and returns the backends of the process group."""
    if device.type == "cpu":
        return "gloo"
    torch.cuda.set_device(device)
    return "cpu:gloo,cuda:nccl"


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
