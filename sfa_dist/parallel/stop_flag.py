"""Stop requests: a signal sets a flag, and the loop reads it at a step's boundary.

A handler does nothing but set the flag: saving inside one would deadlock collectives. SIGINT, SIGTERM and SIGUSR1
ask for a stop
after the step in progress; a second SIGINT ends the process at once, for a user who does not want to wait.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set by any of `STOP_SIGNALS` once `install` was called."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def install(self) -> None:
        """Takes the handlers of this process (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
