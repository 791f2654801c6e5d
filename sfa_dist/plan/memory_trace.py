"""Counts the bytes of tensors that are alive at one time, without allocating them: fake tensors and a dispatch mode.

Under `FakeTensorMode` tensors have shapes, dtypes and storages, but no memory. Real code runs on them: forward,
autograd, optimizers. `MemoryTrace` sees each operation, notes the storages that it returns and when they are freed, and
keeps the moment of the largest sum. All tensors are fake *cpu* tensors: autograd and fused optimizers refuse fake cuda
tensors where there is no driver, and attention on the CPU (its flash kernel) saves what the GPU's saves.

What a card needs beyond tensors (context, workspaces, fragmentation) is not traced; `cards.reserve_bytes` is kept for
it.
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

GRANULE = 512  # Bytes: the caching allocator's blocks are multiples of it.
HOST = "host"  # The category of what is not on the device.
CATEGORIES = ("parameters", "frozen", "gradients", "optimizer", "activations", "buffers", "decoder")


def rounded(size: int) -> int:
    """Bytes that the allocator takes for `size` bytes."""
    return -(-size // GRANULE) * GRANULE


class MemoryTrace(TorchDispatchMode):
    """Live bytes by category, and what they were at the moment of the largest sum.

    Enter it inside a `FakeTensorMode`. A new tensor goes to the category that `category()` has set, "activations" by
    default; `retag` moves it to another one. Pinned tensors and the category `HOST` are counted apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.host_peak = 0
        self._category = "activations"
        self._storages: dict[int, tuple[Any, int, str]] = {}  # By id of the storage: (weak reference, bytes, category).

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
            reference = weakref.ref(storage, lambda _: self._forget(key))
            self._storages[key] = (reference, size, category)
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
        """Tensors that are created inside go to the category `name`."""
        before, self._category = self._category, name
        try:
            yield
        finally:
            self._category = before

    def retag(self, tensor: Tensor, category: str) -> None:
        """Moves a tensor's storage to another category."""
        key = id(tensor.untyped_storage())
        reference, size, old = self._storages[key]
        if old != category:
            self._storages[key] = (reference, size, category)
            self.live[old] -= size
            self.live[category] += size
            if HOST in (old, category):
                self.total += size if old == HOST else -size

    def bump(self, size: int) -> None:
        """Notes that `size` bytes of activations were alive for a moment on top of what is alive now."""
        self._add("activations", size)
        self._add("activations", -size)

    @contextmanager
    def transient(self) -> Iterator[list[int]]:
        """Yields a list that holds, after the block, how far the sum rose above its value at the start."""
        start, outer_peak, outer_at_peak = self.total, self.peak, self.at_peak
        self.peak, self.at_peak = start, dict(self.live)
        rise: list[int] = []
        yield rise
        rise.append(self.peak - start)
        if outer_peak >= self.peak:
            self.peak, self.at_peak = outer_peak, outer_at_peak


def materialise(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Gives a module that was built on the meta device fake storages, one for each parameter and buffer.

    Parameters get `dtype` instead of their own. They are replaced, because `Module.to` fails on fake tensors. Engines
    make parameters views of one flat tensor; here each has a storage of its own, because fake operations are cached by
    their inputs, offset included, and identical blocks are then traced ten times as fast. Call it inside the modes.
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
