"""How batches leave a loader process: through reused buffers of shared memory.

DataLoader shares each tensor of each batch anew: a new shared-memory file, whose pages both processes fault in, and a
connection with its handshake. That took two to three times as long as reading the features in it. Here a worker writes
into one of a ring of buffers and sends the buffer's number; small tensors travel in the message itself.

A buffer may be overwritten once its batch has been copied out. A loader with W workers that prefetch P batches each
requests item k + P * W when item k is taken, so a worker is at most P batches ahead of the one being copied: P + 1
buffers are enough, and there is one to spare.
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

Message = dict[str, Any]  # A batch by field name; its tensors are arrays (the small ones) or SharedTensors.
SMALL_BYTES = 1 << 14


@dataclass(frozen=True)
class SharedTensor:
    """A tensor in a shared buffer: which slot holds it, and its shape and dtype.

    `buffer`, uint8 in shared memory, is sent only when the slot gets a new one.
    """

    slot: tuple[int, str, int]  # (worker, field of the batch, number in the ring).
    shape: torch.Size
    dtype: torch.dtype
    buffer: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass
class Sender:
    """The worker's side, used as `collate_fn`; the dataset's items are batches already. Each process has its own."""

    prefetch_factor: int
    buffers: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)
    sent: int = 0

    def __call__(self, batch: Batch) -> Message:
        """The message that carries the batch."""
        number = self.sent % (self.prefetch_factor + 2)
        self.sent += 1
        message = {name: self._packed(name, number, value) for name, value in vars(batch).items()}
        if batch.mix is not None:
            message["mix"] = {name: self._packed(name, number, value) for name, value in vars(batch.mix).items()}
        return message

    def _packed(self, name: str, number: int, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.nbytes <= SMALL_BYTES and value.dtype != torch.bfloat16:  # numpy has no bfloat16.
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
    """The reader's side of one iteration; with `pin` batches are copied into page-locked memory."""

    pin: bool
    buffers: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)

    def __call__(self, message: Message) -> Batch:
        """The worker's batch, copied out of the shared buffers."""
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
    """The tensor as a view of its buffer."""
    return buffer[: shared.nbytes].view(shared.dtype).view(shared.shape)


def share_tensors(item: Any) -> Any:
    """A `collate_fn` that moves the tensors of a worker's item, a tuple, to shared memory.

    The worker's queue would do it too, but on a node without room it loses the item, and the rank waits forever.
    """
    if get_worker_info() is not None:
        for value in item:
            if isinstance(value, Tensor):
                share(value)
    return item


def share(tensor: Tensor) -> Tensor:
    """Moves the tensor to shared memory and returns it. Raises CheckpointError where there is no room."""
    try:
        return tensor.share_memory_()
    except RuntimeError as error:
        size = tensor.nbytes / 2**20
        raise CheckpointError(
            f"{socket.gethostname()} has no room for {size:.1f} MiB of shared memory for loader workers ({error}); "
            "free /dev/shm there, mount it larger (docker run --shm-size), or set data.workers to 0"
        ) from error
