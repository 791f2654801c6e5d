"""The frozen trunk one micro-batch ahead of the tail.

    trunk's stream    | copy k + 1, trunk k + 1                | copy k + 2, trunk k + 2 ...
    main stream       | tail k: forward, backward (, step)     | tail k + 1 ...
                      ^ waits for trunk k

The trunk does not depend on what is trained, so the trunk of a micro-batch can run beside the tail of the one before.
On a card the two have streams of their own, and the tail's small kernels and the host's wait for the gradient norm no
longer leave the card idle. On a CPU the order is the same without any overlap. The features are the same bits.

Features that were computed ahead and never trained on (after a stop request) are dropped. The trainer counts the steps,
so a resumed run draws those micro-batches again.
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
    """A micro-batch from the loader; on a card, `done` is recorded behind its trunk."""

    batch: Batch
    features: Tensor | None = None
    done: torch.cuda.Event | None = None


class TrunkAhead:
    """The features of micro-batches; the trunk of the next micro-batch starts before those of this one are returned.

    `run` computes the features of a micro-batch on `device`. At most two micro-batches' features exist at a time: the
    tail's and the next one's. Clips are on the device only while the trunk runs on them.
    """

    def __init__(self, run: Callable[[Batch], Tensor | ChunkedFeatures], device: torch.device) -> None:
        self._run, self._device = run, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._drawn: deque[_Drawn] = deque()
        self._newest: torch.cuda.Event | None = None

    def over(self, micro_batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same micro-batches in the same order, each yielded once the next one has been drawn."""
        self._drawn.clear()
        if self._stream is not None:  # The main stream may still be copying weights.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        ready: deque[Batch] = deque()  # A queue, so that this frame keeps no reference to a clip that is used up.
        for batch in micro_batches:
            self._drawn.append(_Drawn(batch))
            ready.append(batch)
            if len(ready) > 1:
                yield ready.popleft()
        yield from ready

    def features(self, batch: Batch) -> Tensor:
        """The features of a micro-batch that `over` has yielded, ready for the current stream.

        Micro-batches drawn before it and never requested (of a step without a good clip) are dropped.
        """
        while self._drawn[0].batch is not batch:
            self._drawn.popleft()
        own = self._drawn.popleft()
        features = self._start(own)
        if self._drawn:
            self._start(self._drawn[0])
        if own.done is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(own.done)
            features.record_stream(stream)  # Keeps the trunk's stream from reusing the memory before the tail is done.
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
        """Of the `waited` seconds for the loader, which end now, those in which the device ran no trunk either.

        The main stream has to be empty, as it is after a step, whose gradient norm the host has read.
        """
        if self._newest is None:
            return waited
        if not self._newest.query():
            return 0.0
        now = torch.cuda.current_stream(self._device).record_event(torch.cuda.Event(enable_timing=True))
        now.synchronize()
        return min(waited, self._newest.elapsed_time(now) / 1000)
