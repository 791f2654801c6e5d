"""The trunk's input and output, kept in host memory and copied chunk by chunk while the device computes.

    host:    clip (pinned by the loader)                          features (pinned, reused in each step)
                |  copy of chunk k + 1                               ^  copy of chunk k - 1
    device:     +-> [slot A] [slot B] -> trunk on chunk k -----------+           later: -> [slot A] [slot B] -> adapter

All copies go through one side stream in order, so a read always sees the writes before it. A copy begins when the work
issued before it is done, and overlaps with the work issued after it. On a CPU the device is the host: the same code
runs and makes the copies, but nothing is pinned.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class HostLink:
    """Copies between `device` and host memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = HostPool(pinned=device.type == "cuda")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Copies issued inside the block begin after all work issued so far, and overlap with later work."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """An event behind the last copy; None on a CPU."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Makes the device's next work begin after `mark`; the host does not wait."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def slots(self, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Two device buffers of `shape`: one is in use while the other is filled."""
        both = [torch.empty(tuple(shape), dtype=dtype, device=self.device) for _ in range(2)]
        for slot in both:
            if self._stream is not None:
                slot.record_stream(self._stream)  # A copy may still be running when the last reference goes.
        return both

    def inward(
        self, fill: Callable[[int, Tensor], None], spans: Sequence[slice], row_shape: Sequence[int], dtype: torch.dtype
    ) -> Inward:
        """Chunks of host memory on their way to the device; `fill(index, out)` copies chunk `index` into `out`.

        Chunk `index` is the rows `spans[index]`, each of `row_shape`.
        """
        return Inward(self, fill, spans, row_shape, dtype)

    def store(self, clips: int, spans: Sequence[slice], row_shape: Sequence[int], dtype: torch.dtype) -> HostFeatures:
        """Host memory for the features of `clips` clips, in chunks of rows (`spans`), each row of `row_shape`."""
        return HostFeatures(self, clips, spans, row_shape, dtype)


class HostPool:
    """Host buffers that are reused: pinning memory takes longer than filling it."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.bytes = 0  # Of all buffers, in use or free.
        self._free: list[Tensor] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(a tensor of this shape, the buffer that it is a view of). Pass the buffer to `give` when done."""
        needed = math.prod(shape) * dtype.itemsize
        fitting = [buffer for buffer in self._free if buffer.numel() >= needed]
        if fitting:
            buffer = min(fitting, key=Tensor.numel)
            self._free = [other for other in self._free if other is not buffer]
        else:
            self.bytes += needed - sum(other.numel() for other in self._free)
            self._free.clear()  # All are too small, and the new one can replace them.
            buffer = torch.empty(needed, dtype=torch.uint8, pin_memory=self.pinned)
        return buffer[:needed].view(dtype).view(tuple(shape)), buffer

    def give(self, buffer: Tensor) -> None:
        """Takes a buffer back. Copies from it may still run: those of the next user follow on the same stream."""
        self._free.append(buffer)


class Inward:
    """Chunks on their way to the device: while one is in use, the next in the direction of travel is copied."""

    def __init__(
        self,
        link: HostLink,
        fill: Callable[[int, Tensor], None],
        spans: Sequence[slice],
        row_shape: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self._link, self._fill, self._spans = link, fill, spans
        self._slots = link.slots((_longest(spans), *row_shape), dtype)
        self._holds: list[int | None] = [None, None]
        self._marks: list[torch.cuda.Event | None] = [None, None]
        self._last = -1

    def load(self, index: int) -> Tensor:
        """Chunk `index` on the device, valid until the next call.

        Forward goes from the first chunk to the last; backward goes from the last to the first, or from the first
        again.
        """
        slot = self._holds.index(index) if index in self._holds else self._start(index, 0)
        self._link.wait(self._marks[slot])
        ahead = index + 1 if index > self._last or index == 0 else index - 1
        self._last = index
        if 0 <= ahead < len(self._spans) and ahead not in self._holds:
            self._start(ahead, 1 - slot)
        return self._rows(index, slot)

    def _start(self, index: int, slot: int) -> int:
        with self._link.beside():
            self._fill(index, self._rows(index, slot))
        self._holds[slot], self._marks[slot] = index, self._link.mark()
        return slot

    def _rows(self, index: int, slot: int) -> Tensor:
        whole, rows = self._slots[slot], self._spans[index].stop - self._spans[index].start
        return whole if rows == len(whole) else whole[:rows]


class HostFeatures:
    """Features (R, ...) of `clips` clips in pinned host memory; written once, read in chunks as often as needed."""

    def __init__(
        self, link: HostLink, clips: int, spans: Sequence[slice], row_shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        self.clips, self.spans = clips, spans
        self._link = link
        self._host, buffer = link.pool.take((spans[-1].stop, *row_shape), dtype)
        self._inward: Inward | None = None
        self._leaving: tuple[Tensor, torch.cuda.Event | None] | None = None
        weakref.finalize(self, link.pool.give, buffer)

    def put(self, span: slice, value: Tensor) -> None:
        """Copies `value` from the device to these rows."""
        with self._link.beside():
            self._copy_out(span, value)
        self._release()
        self._leaving = (value, self._link.mark())

    def _copy_out(self, span: slice, value: Tensor) -> None:
        self._host[span].copy_(value, non_blocking=True)

    def _release(self) -> None:
        """Frees the device memory of the previous `put`'s chunk, once its copy is done."""
        if self._leaving is not None:
            self._link.wait(self._leaving[1])
            self._leaving = None

    def load(self, index: int) -> Tensor:
        """Chunk `index` on the device, valid until the next call."""
        self._release()
        if self._inward is None:
            host, spans = self._host, self.spans  # Not self: a cycle would hold the buffer until garbage collection.

            def fill(index: int, out: Tensor) -> None:
                out.copy_(host[spans[index]], non_blocking=True)

            self._inward = self._link.inward(fill, spans, host.shape[1:], host.dtype)
        return self._inward.load(index)

    def whole(self) -> Tensor:
        """All features on the device, (B, F, ...), for modules that need all frames at once."""
        self._release()
        out = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._link.device)
        with self._link.beside():
            out.copy_(self._host, non_blocking=True)
        self._link.wait(self._link.mark())
        return out.unflatten(0, (self.clips, -1))


def _longest(spans: Sequence[slice]) -> int:
    return max(span.stop - span.start for span in spans)
