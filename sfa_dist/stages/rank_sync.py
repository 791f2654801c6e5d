"""Synchronises ranks that work independently: every few seconds they exchange stop requests, failures and bad clips."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TypeVar

from sfa_dist.errors import DataError, PreemptedError, SfaError
from sfa_dist.run.context import Run

T = TypeVar("T")
BEAT_SECONDS = 5.0


@dataclass
class RankSync:
    """One rank's side: at every beat, a stop request or a failure of one rank ends all of them.

    A beat is a collective. A rank that has finished its share goes on beating until all have.
    """

    run: Run
    title: str  # Of the work, for messages.
    budget: float  # Share of the clips that may be bad.
    bad: dict[str, str] = field(default_factory=dict)  # This rank's bad clips: name -> reason.
    clips: int = 0  # Clips that this rank has processed, bad ones included.
    _reported: set[str] = field(default_factory=set)
    _last: float = field(default_factory=time.monotonic)

    def beat_if_due(self) -> None:
        """A beat, where the last one is BEAT_SECONDS ago."""
        if time.monotonic() - self._last >= BEAT_SECONDS:
            self.beat(done=False)

    def beat(self, done: bool, fault: SfaError | None = None) -> bool:
        """Exchanges the ranks' states; returns whether all are done. Collective.

        Raises, on all ranks, the first rank's `fault`, PreemptedError on a stop request, DataError over the budget of
        bad clips.
        """
        runtime = self.run.runtime
        states = runtime.gather((done, fault, bool(self.run.stop), self.bad, self.clips))
        self._last = time.monotonic()
        faults = [fault for _, fault, *_ in states if fault is not None]
        if faults:
            raise runtime.for_all(faults[0])
        if any(stop for _, _, stop, *_ in states):
            text = f"{self.title} stopped; finished parts are kept, run the same command again to go on"
            raise runtime.for_all(PreemptedError(text))
        self._note_bad({name: why for *_, bad, _ in states for name, why in bad.items()}, sum(n for *_, n in states))
        return all(done for done, *_ in states)

    def finish(self) -> None:
        """Waits until all ranks are done."""
        while not self.beat(done=True):
            pass

    def on_main(self, work: Callable[[], T]) -> T:
        """`work` on rank 0, its value on all ranks; the work may take longer than a collective waits. Collective."""
        future: Future[T] | None = None
        with ThreadPoolExecutor(1) as pool:
            if self.run.runtime.is_main:
                future = pool.submit(work)
            while not self.beat(done=future is None or future.done()):
                if future is not None:
                    wait([future], timeout=BEAT_SECONDS)
            return self.run.runtime.on_main(lambda: future.result() if future else work())

    def _note_bad(self, bad: dict[str, str], clips: int) -> None:
        for name in bad.keys() - self._reported:
            self.run.tracker.event("bad_sample", stage="cache", step=0, key=name, reason=bad[name])
            self.run.tracker.say(f"bad clip {name}: {bad[name]} (not cached)")
        self._reported |= bad.keys()
        if len(bad) > self.budget * max(clips, 100):
            over = f"{len(bad)} of {clips} clips are bad, over data.max_bad_fraction {self.budget}"
            raise self.run.runtime.for_all(DataError(f"{self.title}: {over}; log.jsonl names each (bad_sample)"))
