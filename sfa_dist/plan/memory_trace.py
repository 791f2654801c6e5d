"""Counts the bytes of tensors that live at one time, with nothing allocated: fake tensors and a dispatch mode.

Under `FakeTensorMode` tensors have shapes, dtypes and storages, and no memory. Real code runs on them: forward,
autograd, optimizers. `MemoryTrace` sees each operation, notes the storages that come out and when they die,
and keeps the moment of the largest sum. All tensors are fake *cpu* ones: autograd and fused optimizers refuse fake
cuda tensors where there is no driver, and attention on the CPU (its flash kernel) saves what the GPU's saves.

What a card needs beyond tensors (context, workspaces, fragmentation) is not seen here; `cards.reserve_bytes` is for it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

GRANULE = 512  # The caching allocator's: each block is a multiple of it.
HOST = "host"  # The category of what does not lie on the device.
CATEGORIES = ("parameters", "frozen", "gradients", "optimizer", "activations", "buffers", "decoder")


def rounded(size: int) -> int:
    """Bytes that the allocator takes for `size` bytes."""
    return -(-size // GRANULE) * GRANULE


class MemoryTrace(TorchDispatchMode):
    """Live bytes by category, and what they were at the moment of the largest sum.

    Enter it inside a `FakeTensorMode`. What is made goes to the category that `category()` has set, "activations"
    else; `retag` moves a tensor to another one. Pinned tensors and the category `HOST` are counted apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.host_peak = 0
        self._category = "activations"
        self._storages: dict[int, tuple[Any, int, str]] = {}  # By id of the storage: (its death, bytes, category).

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        category = HOST if kwargs.get("pin_memory") else self._category
        if isinstance(out, Tensor):
            self._note(out, category)
        elif isinstance(out, tuple | list):
            for value in out:
                if isinstance(value, Tensor):
                    self._note(value, category)
        return out

    def _note(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._storages:
            size = rounded(storage.nbytes())
            death = weakref.ref(storage, lambda _: self._forget(key))
            self._storages[key] = (death, size, category)
            self._add(category, size)

    def _forget(self, key: int) -> None:
        _, size, category = self._storages.pop(key)
        self._add(category, -size)

    def _add(self, category: str, size: int) -> None:
        self.live[category] += size
        if category == HOST:
            self.host_peak = max(self.host_peak, self.live[HOST])
            return
        self.total += size
        if self.total > self.peak:
            self.peak = self.total
            self.at_peak = dict(self.live)

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """What is made inside goes to the category `name`."""
        before, self._category = self._category, name
        try:
            yield
        finally:
            self._category = before

    def retag(self, tensor: Tensor, category: str) -> None:
        """Moves a tensor's storage to another category."""
        key = id(tensor.untyped_storage())
        death, size, old = self._storages[key]
        if old != category:
            self._storages[key] = (death, size, category)
            self.live[old] -= size
            self.live[category] += size
            if HOST in (old, category):
                self.total += size if old == HOST else -size

    def bump(self, size: int) -> None:
        """Notes that `size` bytes of activations lived for a moment on top of what lives now."""
        self._add("activations", size)
        self._add("activations", -size)

    @contextmanager
    def transient(self) -> Iterator[list[int]]:
        """Yields a list that holds, at the end, how far the sum rose above what it was at the start."""
        start, outer_peak, outer_at_peak = self.total, self.peak, self.at_peak
        self.peak, self.at_peak = start, dict(self.live)
        rise: list[int] = []
        yield rise
        rise.append(self.peak - start)
        if outer_peak >= self.peak:
            self.peak, self.at_peak = outer_peak, outer_at_peak


def materialise(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Gives a module that was built on the meta device fake storages, one for each parameter and buffer.

    `dtype` in place of the parameters' own. `Module.to` would fail on fake tensors, so parameters are replaced.
    Engines make them views of one flat tensor; here they are not, since fake operations are remembered by their inputs,
    offset included, and alike blocks are then traced ten times as fast. Call it inside of the modes.
    """
    made: dict[int, Tensor] = {}

    def twin(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        return made[id(tensor)]

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = twin(parameter, dtype or parameter.dtype)
                part._parameters[name] = nn.Parameter(new, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = twin(buffer, buffer.dtype)
