"""How batches come from a loader process: through buffers of shared memory that are used again and again.

DataLoader shares each tensor of each batch anew: a file of shared memory whose pages are all new to both processes, a
connection and its handshake. That took two to three times as long as reading the features that it carried. Here a
worker writes into one of a ring of buffers and sends its number; small tensors travel in the message itself.

A buffer may be written again once the batch in it was copied out. A loader of W workers that prefetches P batches each
gives out item k + P * W when item k is asked for, so a worker is at most P batches ahead of the one that is being
copied: P + 1 buffers are enough, and there is one to spare.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from sfa_dist.errors import CheckpointError

Batch = dict[str, Any]
SMALL_BYTES = 1 << 14


@dataclass(frozen=True)
class SharedTensor:
    """A tensor in a buffer: which one, and what to take it for. `buffer` uint8, shared, comes along the first time."""

    place: tuple[int, str, int]  # Worker, key of the batch, number in the ring.
    shape: torch.Size
    dtype: torch.dtype
    buffer: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass
class Sender:
    """The worker's side, in place of a collation: items are batches already. Each process has its own copy."""

    prefetch_factor: int
    buffers: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)
    sent: int = 0

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its tensors in arrays (small ones) and parcels."""
        number = self.sent % (self.prefetch_factor + 2)
        self.sent += 1
        return {key: self._packed(key, number, value) for key, value in batch.items()}

    def _packed(self, key: str, number: int, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.nbytes <= SMALL_BYTES and value.dtype != torch.bfloat16:  # Which numpy has not.
            return value.numpy()
        worker = get_worker_info()
        place = (worker.id if worker else 0, key, number)
        buffer, new = self.buffers.get(place), None
        if buffer is None or buffer.nbytes < value.nbytes:
            buffer = new = self.buffers[place] = share(torch.empty(value.nbytes, dtype=torch.uint8))
        parcel = SharedTensor(place, value.shape, value.dtype, new)
        _opened(parcel, buffer).copy_(value)
        return parcel


@dataclass
class Receiver:
    """The reader's side of one iteration. `pin` copies into page-locked memory, from where a GPU takes it by itself."""

    pin: bool
    buffers: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)

    def __call__(self, batch: Batch) -> Batch:
        """The batch as the worker made it, in memory of its own."""
        return {key: self._unpacked(value) for key, value in batch.items()}

    def _unpacked(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return self._own(torch.from_numpy(value), lambda tensor: tensor)
        if not isinstance(value, SharedTensor):
            return value
        if value.buffer is not None:
            self.buffers[value.place] = value.buffer
        return self._own(_opened(value, self.buffers[value.place]), torch.clone)

    def _own(self, tensor: Tensor, copy: Callable[[Tensor], Tensor]) -> Tensor:
        return tensor.pin_memory() if self.pin else copy(tensor)


def _opened(parcel: SharedTensor, buffer: Tensor) -> Tensor:
    """What a parcel stands for, in its buffer."""
    return buffer[: parcel.nbytes].view(parcel.dtype).view(parcel.shape)


def hand_over(batch: Any) -> Any:
    """In place of a collation, as items (dictionaries or tuples) are batches already: a worker's tensors go to shared
    memory here. Left to the worker's queue, a node without room would lose the batch, and the rank wait without end."""
    if get_worker_info() is not None:
        for value in batch.values() if isinstance(batch, dict) else batch:
            if isinstance(value, Tensor):
                share(value)
    return batch


def share(tensor: Tensor) -> Tensor:
    """The tensor, moved to memory that processes share. Raises CheckpointError where there is no room."""
    try:
        return tensor.share_memory_()
    except RuntimeError as error:
        size = tensor.nbytes / 2**20
        raise CheckpointError(
            f"{socket.gethostname()} has no room for {size:.1f} MiB that loader workers hand over ({error}); free "
            "/dev/shm there, mount it larger (docker run --shm-size), or set data.workers to 0"
        ) from error
