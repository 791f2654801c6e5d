"""What the trunk takes in and puts out, kept in the host's memory and moved chunk by chunk beside the computation.

    host:    clip (pinned by the loader)                          features (pinned, used again each step)
                |  copy of chunk k + 1                               ^  copy of chunk k - 1
    device:     +-> [slot A] [slot B] -> trunk on chunk k -----------+           later: -> [slot A] [slot B] -> adapter

All copies go through one side stream, in order, so what was written is there when it is read. A copy begins when the
work issued before it is done and runs beside what is issued after it. On a CPU the device is the host: the same code
runs, the copies are made, and nothing is pinned.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class HostLink:
    """The way between `device` and the host's memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = HostPool(pinned=device.type == "cuda")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Copies issued here begin after all work issued so far, and run beside what is issued next."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """The point behind the last copy."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Lets the device's next work begin after `mark`; the host does not wait."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def slots(self, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Two device buffers: one is worked on while the other is filled."""
        both = [torch.empty(tuple(shape), dtype=dtype, device=self.device) for _ in range(2)]
        for slot in both:
            if self._stream is not None:
                slot.record_stream(self._stream)  # A copy may be on its way when the last name of it goes.
        return both

    def inward(
        self, fill: Callable[[int, Tensor], None], spans: Sequence[slice], row_shape: Sequence[int], dtype: torch.dtype
    ) -> Inward:
        """Chunks of host memory for the device; `fill(index, out)` copies chunk `index` into a device buffer."""
        return Inward(self, fill, spans, row_shape, dtype)

    def store(self, clips: int, spans: Sequence[slice], row_shape: Sequence[int], dtype: torch.dtype) -> HostFeatures:
        """Room in the host's memory for features of `clips` clips, in chunks of rows."""
        return HostFeatures(self, clips, spans, row_shape, dtype)


class HostPool:
    """Host buffers that are used again: pinning memory takes longer than filling it."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.bytes = 0  # All that it has given out or holds.
        self._free: list[Tensor] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(a tensor of this shape, the buffer that it is a view of, to be given back)."""
        needed = math.prod(shape) * dtype.itemsize
        fitting = [buffer for buffer in self._free if buffer.numel() >= needed]
        if fitting:
            buffer = min(fitting, key=Tensor.numel)
            self._free = [other for other in self._free if other is not buffer]
        else:
            self.bytes += needed - sum(other.numel() for other in self._free)
            self._free.clear()  # Too small, and a larger one serves what they did.
            buffer = torch.empty(needed, dtype=torch.uint8, pin_memory=self.pinned)
        return buffer[:needed].view(dtype).view(tuple(shape)), buffer

    def give(self, buffer: Tensor) -> None:
        """Back from a user that is done. Copies still on their way are on the stream that the next user's are on."""
        self._free.append(buffer)


class Inward:
    """Chunks on their way to the device: while one is worked on, the next one in the order of travel is copied."""

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
        """Chunk `index`, on the device. It holds until the next call.

        Backward goes through the chunks from the last to the first, or from the first again.
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
    """Features (R, ...) of `clips` clips in pinned host memory, written once, read as often as needed, in chunks."""

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
        """Frees the chunk whose copy was the last but one: by now it is done, or nearly."""
        if self._leaving is not None:
            self._link.wait(self._leaving[1])
            self._leaving = None

    def load(self, index: int) -> Tensor:
        """Chunk `index` on the device. It holds until the next call."""
        self._release()
        if self._inward is None:
            host, spans = self._host, self.spans  # Not self: a circle would keep the buffer until the collector comes.

            def fill(index: int, out: Tensor) -> None:
                out.copy_(host[spans[index]], non_blocking=True)

            self._inward = self._link.inward(fill, spans, host.shape[1:], host.dtype)
        return self._inward.load(index)

    def whole(self) -> Tensor:
        """All of it on the device, (B, F, ...), for what must see all frames at once."""
        self._release()
        out = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._link.device)
        with self._link.beside():
            out.copy_(self._host, non_blocking=True)
        self._link.wait(self._link.mark())
        return out.unflatten(0, (self.clips, -1))


def _longest(spans: Sequence[slice]) -> int:
    return max(span.stop - span.start for span in spans)
