"""Stop requests: by a signal, by another rank, or because the launcher is gone. The loop reads them where it may stop.

A handler only records the request: saving inside one would deadlock collectives. Python runs handlers late,
though: a rank that waits in a collective gets there when the collective ends. So a thread hears of each signal as it
comes, through the wakeup descriptor, and tells those who listen, the watch for one, which tells the other ranks.

SIGINT always counts. A second one ends the process at once, for a user who does not want to wait. So does SIGHUP, which
tells that the terminal is gone, unless the process was started to outlive it (nohup).
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from sfa_dist.errors import PreemptedError
from sfa_dist.parallel.process_exit import restore_signals

DEFAULT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ANOTHER_RANK = "another rank, which was asked to stop"  # The reason of a rank that heard it from the others.
INTERRUPTED = "stopped: interrupted before the state could be saved; the last checkpoint is intact"
INTERRUPTED_CODE = 70

# Seconds.
LOOK_S = 1.0  # Between two looks at the launcher.
HURRY_S = 3.0  # For the main thread to end by itself after a second SIGINT.


class StopFlag:
    """True from the first request on."""

    def __init__(self) -> None:
        self.reason = ""  # Who asked; empty as long as nobody has.
        self._signals: tuple[signal.Signals, ...] = (signal.SIGINT,)
        self._interrupts_taken = self._interrupts_heard = 0
        self._nothing_to_save = self._reported = False
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self.reason)

    def install(
        self, signals: Sequence[signal.Signals] = DEFAULT_SIGNALS, lost_launcher: Callable[[], str] = str
    ) -> None:
        """Takes SIGINT and `signals` of this process (main thread only). `lost_launcher` says, when it is asked now and
        then, that the launcher is gone: nobody else would stop this process."""
        hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
        self._signals = tuple(dict.fromkeys((*signals, *hangup, signal.SIGINT)))
        restore_signals()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        for number in self._signals:
            signal.signal(number, self._receive)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        listener = threading.Thread(target=self._listen, args=(ours, theirs, lost_launcher), name="stop", daemon=True)
        listener.start()

    def request(self, reason: str) -> None:
        """Asks for a stop; from any thread. Only the first request counts."""
        if self._note(reason) and self._nothing_to_save:
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, self._signals[0])  # Also out of a system call.

    def _note(self, reason: str) -> bool:
        """Whether this is the first request, which is passed on to the listeners."""
        with self._lock:
            if self._reported:
                return False
            self._reported = True
        self.reason = self.reason or reason
        for tell in self._listeners:
            tell()
        return True

    def on_request(self, tell: Callable[[], None]) -> None:
        """Calls `tell` at the first request, in whatever thread hears of it; now where there was one."""
        self._listeners.append(tell)
        if self._reported:
            tell()

    @contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Inside of the block, long work of one rank before it trains, a request raises PreemptedError at once (main
        thread only)."""
        self._nothing_to_save = True
        try:
            if self:
                raise self._leaving()
            yield
        finally:
            self._nothing_to_save = False

    def _leaving(self) -> PreemptedError:
        self._nothing_to_save = False
        return PreemptedError(
            f"stopped by {self.reason} before there was anything to save; run the same command again to go on"
        )

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """The handler, in the main thread, sooner or later."""
        del frame
        if number == signal.SIGINT:
            self._interrupts_taken += 1
            if self._interrupts_taken > 1:
                raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name
        if self._nothing_to_save:
            raise self._leaving()

    def _listen(self, stream: socket.socket, far_end: socket.socket, lost_launcher: Callable[[], str]) -> None:
        del far_end  # Held open by being an argument here.
        stream.settimeout(LOOK_S)  # By poll: select knows no descriptor above 1,023, and rank 0 of many has more.
        while True:
            try:
                numbers = stream.recv(256)
            except TimeoutError:
                if not self and (why := lost_launcher()):
                    self.request(why)
                continue
            for number in numbers:  # Also of signals that are others' business, as SIGCHLD.
                if number in self._signals:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        self._note(number.name)
        if number == signal.SIGINT:
            self._interrupts_heard += 1
            if self._interrupts_heard == 2:
                threading.Thread(target=self._hurry, daemon=True).start()

    def _hurry(self) -> None:
        """Ends a process whose main thread does not come to its handler."""
        time.sleep(HURRY_S)
        os.write(2, f"{INTERRUPTED}\n".encode())
        os._exit(INTERRUPTED_CODE)
