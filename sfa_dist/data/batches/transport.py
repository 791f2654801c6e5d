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

from sfa_dist.data.batches.batch import Batch, Mix
from sfa_dist.errors import CheckpointError

Message = dict[str, Any]  # A batch by name, its tensors as arrays (small ones) and SharedTensors.
SMALL_BYTES = 1 << 14


@dataclass(frozen=True)
class SharedTensor:
    """A tensor in a buffer: which one, and how to read it. `buffer` uint8, shared, is sent the first time only."""

    slot: tuple[int, str, int]  # Worker, name in the batch, number in the ring.
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

    def __call__(self, batch: Batch) -> Message:
        """The batch as it is sent."""
        number = self.sent % (self.prefetch_factor + 2)
        self.sent += 1
        message = {name: self._packed(name, number, value) for name, value in vars(batch).items()}
        if batch.mix is not None:
            message["mix"] = {name: self._packed(name, number, value) for name, value in vars(batch.mix).items()}
        return message

    def _packed(self, name: str, number: int, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.nbytes <= SMALL_BYTES and value.dtype != torch.bfloat16:  # Which numpy has not.
            return value.numpy()
        worker = get_worker_info()
        slot = (worker.id if worker else 0, name, number)
        buffer, new = self.buffers.get(slot), None
        if buffer is None or buffer.nbytes < value.nbytes:
            buffer = new = self.buffers[slot] = share(torch.empty(value.nbytes, dtype=torch.uint8))
        shared = SharedTensor(slot, value.shape, value.dtype, new)
        _view(shared, buffer).copy_(value)
        return shared


@dataclass
class Receiver:
    """The reader's side of one iteration. `pin` copies into page-locked memory, from where a GPU takes it by itself."""

    pin: bool
    buffers: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)

    def __call__(self, message: Message) -> Batch:
        """The batch as the worker made it, in memory of its own."""
        mix = message["mix"]
        return Batch(**{**self._unpacked_all(message), "mix": mix and Mix(**self._unpacked_all(mix))})

    def _unpacked_all(self, message: Message) -> dict[str, Any]:
        return {name: self._unpacked(value) for name, value in message.items()}

    def _unpacked(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return self._own(torch.from_numpy(value), lambda tensor: tensor)
        if not isinstance(value, SharedTensor):
            return value
        if value.buffer is not None:
            self.buffers[value.slot] = value.buffer
        return self._own(_view(value, self.buffers[value.slot]), torch.clone)

    def _own(self, tensor: Tensor, copy: Callable[[Tensor], Tensor]) -> Tensor:
        return tensor.pin_memory() if self.pin else copy(tensor)


def _view(shared: SharedTensor, buffer: Tensor) -> Tensor:
    """The tensor in its buffer."""
    return buffer[: shared.nbytes].view(shared.dtype).view(shared.shape)


def share_tensors(item: Any) -> Any:
    """In place of a collation: moves the tensors of a worker's item, a tuple, to shared memory.

    Left to the worker's queue, a node without room would lose the item, and the rank would wait without end.
    """
    if get_worker_info() is not None:
        for value in item:
            if isinstance(value, Tensor):
                share(value)
    return item


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
