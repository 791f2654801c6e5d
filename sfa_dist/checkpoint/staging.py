"""An engine's state, copied to host memory at a step's boundary so that the next step can change the original.

The memory is allocated at the first save and reused by later ones: 4 bytes x (1 + number of moments) for each element
that the rank owns. With a GPU it is pinned, so that the copies run asynchronously.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfa_dist.checkpoint.layout import ITEM
from sfa_dist.parallel.engines.engine import Fragment


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + len(values)) of the flattened parameter `name`: master values or a moment (`key`).

    `values` is fp32, in host memory that nothing else writes.
    """

    name: str
    start: int
    key: str
    values: Tensor

    @property
    def size(self) -> int:
        """Size in bytes."""
        return ITEM * self.values.numel()


class HostMemory:
    """The buffers that hold the pieces of a save until the next one."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int, str, int], Tensor] = {}

    def stage(self, fragments: Iterable[Fragment]) -> list[Piece]:
        """A copy of all tensors of these fragments, complete when this returns. Raises TypeError if not fp32."""
        pieces = []
        devices = set()
        for fragment in fragments:
            for key, tensor in fragment.tensors.items():
                if tensor.dtype != torch.float32:
                    raise TypeError(f"{key} of {fragment.name} is {tensor.dtype}, not fp32")
                buffer = self._buffer((fragment.name, fragment.start, key, fragment.numel), tensor)
                buffer.copy_(tensor.detach(), non_blocking=True)
                pieces.append(Piece(fragment.name, fragment.start, key, buffer))
                devices.add(tensor.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return pieces

    def _buffer(self, slot: tuple[str, int, str, int], tensor: Tensor) -> Tensor:
        if slot not in self._buffers:
            pinned = tensor.device.type == "cuda"
            self._buffers[slot] = torch.empty(tensor.numel(), dtype=torch.float32, pin_memory=pinned)
        return self._buffers[slot]
