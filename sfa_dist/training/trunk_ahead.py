"""The frozen trunk one micro-batch ahead of the tail.

    trunk's stream    | copy k + 1, trunk k + 1                | copy k + 2, trunk k + 2 ...
    main stream       | tail k: forward, backward (, step)     | tail k + 1 ...
                      ^ waits for trunk k

The trunk of a micro-batch does not depend on what is trained, so it may run beside the tail of the one before. On a
card the two run on streams of their own: the tail's small kernels and the host's way back for the gradient norm no
longer leave the card idle. On a CPU the order is the same and nothing runs beside anything: the features are the same
bits.

What was run ahead and never trained on (a stop request, the end of the run) is dropped: steps are counted by the
trainer, and a resumed run draws it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sfa_dist.data.batches.batch import Batch
from sfa_dist.models.chunked import ChunkedFeatures


@dataclass
class _Drawn:
    """A micro-batch that the loader has given out; `done` is the point behind its trunk, on a card."""

    batch: Batch
    features: Tensor | None = None
    done: torch.cuda.Event | None = None


class TrunkAhead:
    """Features of micro-batches, each with the trunk of the next one started before it is handed out.

    `run` makes the features of a micro-batch on `device`. At most two micro-batches' features are alive: those that
    the tail works on, and those of the next. Clips that stand on the device belong to the trunk's run alone.
    """

    def __init__(self, run: Callable[[Batch], Tensor | ChunkedFeatures], device: torch.device) -> None:
        self._run, self._device = run, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._drawn: deque[_Drawn] = deque()
        self._newest: torch.cuda.Event | None = None

    def over(self, micro_batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same micro-batches in the same order, each handed out once the one behind it is there."""
        self._drawn.clear()
        if self._stream is not None:  # Weights may be on their way.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        ready: deque[Batch] = deque()  # Emptied by the hand-out: this frame must not hold a clip that is done with.
        for batch in micro_batches:
            self._drawn.append(_Drawn(batch))
            ready.append(batch)
            if len(ready) > 1:
                yield ready.popleft()
        yield from ready

    def features(self, batch: Batch) -> Tensor:
        """Those of a micro-batch that `over` has handed out, for work on the current stream. Those drawn before it and
        not asked for (a step without a single good clip) are dropped."""
        while self._drawn[0].batch is not batch:
            self._drawn.popleft()
        own = self._drawn.popleft()
        features = self._start(own)
        if self._drawn:
            self._start(self._drawn[0])
        if own.done is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(own.done)
            features.record_stream(stream)  # The trunk's stream must not get its memory back before the tail is done.
        return features

    def _start(self, drawn: _Drawn) -> Tensor:
        if drawn.features is None:
            if self._stream is None:
                drawn.features = self._whole(drawn.batch)
            else:
                with torch.cuda.stream(self._stream):
                    drawn.features = self._whole(drawn.batch)
                    drawn.done = self._newest = self._stream.record_event(torch.cuda.Event(enable_timing=True))
        return drawn.features

    def _whole(self, batch: Batch) -> Tensor:
        features = self._run(batch)
        assert isinstance(features, Tensor), "offloaded tokens, which come in chunks, do not run ahead (`overlaps`)"
        return features

    def idle_seconds(self, waited: float) -> float:
        """Of `waited` seconds for the loader, right before now, those in which the device had no trunk to run either.

        The main stream is to be empty: as behind a step, whose norm the host has read.
        """
        if self._newest is None:
            return waited
        if not self._newest.query():
            return 0.0
        now = torch.cuda.current_stream(self._device).record_event(torch.cuda.Event(enable_timing=True))
        now.synchronize()
        return min(waited, self._newest.elapsed_time(now) / 1000)
