"""One thread that writes to a run's trackers. None of them can end a run, slow it, or hold up its end.

The run puts lines into a queue and goes on. Where the queue is full, a line is dropped and counted. A tracker that
raises is switched off. At the end the thread has FLUSH_SECONDS to write what is left.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sfa_dist.run.trackers.sink import Line, Sink

QUEUE_LINES = 1000
FLUSH_SECONDS = 10.0
ABANDON_SECONDS = 2.0  # For the thread to end after what it waits for was ended.
SIGNALS_APART = 1.0  # Seconds within which all processes of a run get a launcher's signal.


@dataclass(frozen=True)
class Failure:
    """A tracker that was switched off. `quiet` where the run is about to stop: a launcher may have ended both."""

    name: str
    reason: str
    quiet: bool


class Background:
    """Writes lines to `sinks` in a thread of its own. All public methods are for the run's thread."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        stopping: Callable[[], bool] = lambda: False,
        capacity: int = QUEUE_LINES,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        self.names = ", ".join(sink.name for sink in sinks)
        self.dropped = 0  # Lines for which there was no room.
        self.flush_seconds = flush_seconds
        self._sinks, self._stopping = tuple(sinks), stopping
        self._off: set[str] = set()
        self._lines: queue.Queue[Line | None] = queue.Queue(capacity)
        self._failures: queue.SimpleQueue[Failure] = queue.SimpleQueue()
        for sink in self._sinks:
            self._guard(sink, sink.load)
        self._thread = threading.Thread(target=self._run, name="trackers", daemon=True)
        self._thread.start()

    def send(self, line: Line) -> bool:
        """Queues a line; False where there is no room for it."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1
            return False
        return True

    def failures(self) -> list[Failure]:
        """The trackers that were switched off since the last call."""
        found = []
        with suppress(queue.Empty):
            while True:
                found.append(self._failures.get_nowait())
        return found

    def close(self) -> bool:
        """Writes what is queued and closes the trackers; False where that was not done in time."""
        until = time.monotonic() + self.flush_seconds
        with suppress(queue.Full):
            self._lines.put(None, timeout=self.flush_seconds)
        self._thread.join(max(0.0, until - time.monotonic()))
        if not self._thread.is_alive():
            return True
        for sink in self._sinks:
            with suppress(Exception):
                sink.abandon()
        self._thread.join(ABANDON_SECONDS)
        return False

    def _run(self) -> None:
        for sink in self._running():
            self._guard(sink, sink.open)
        while (line := self._lines.get()) is not None:
            for sink in self._running():
                self._guard(sink, sink.write, line)
        for sink in self._sinks:
            self._guard(sink, sink.close)

    def _running(self) -> list[Sink]:
        return [sink for sink in self._sinks if sink.name not in self._off]

    def _guard(self, sink: Sink, action: Callable[..., None], *arguments: Line) -> None:
        """Calls a tracker. Its first error switches it off; later ones, of closing it, say nothing new."""
        try:
            action(*arguments)
        except Exception as error:  # noqa: BLE001 (whatever its library raises)
            if sink.name not in self._off:
                self._off.add(sink.name)
                self._failures.put(Failure(sink.name, f"{type(error).__name__}: {error}", self._stops_soon()))

    def _stops_soon(self) -> bool:
        """Whether the run is about to stop: a launcher's signal ends wandb's service too, and may reach it first."""
        until = time.monotonic() + SIGNALS_APART
        while not self._stopping() and time.monotonic() < until:
            time.sleep(0.01)
        return self._stopping()
