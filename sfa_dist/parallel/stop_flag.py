"""Stop requests: by a signal, by another rank, or because the launcher is gone. The loop checks where it can stop.

A handler only records the request: saving inside a handler would deadlock collectives. Python runs handlers late,
though: in a rank that waits in a collective, only when the collective ends. So a thread receives each signal at once,
through the wakeup descriptor, and notifies the listeners. One of them is the watch, which informs the other ranks.

SIGINT always counts; a second one ends the process at once, for a user who does not want to wait. SIGHUP, which means
that the terminal is gone, counts too, unless the process was started to outlive its terminal (nohup).
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
ANOTHER_RANK = "another rank, which was asked to stop"  # The reason on a rank that was informed by another one.
INTERRUPTED = "stopped: interrupted before the state could be saved; the last checkpoint is intact"
INTERRUPTED_CODE = 70

# Seconds.
LAUNCHER_CHECK_S = 1.0  # Between two checks of the launcher.
INTERRUPT_S = 3.0  # For the main thread to end by itself after a second SIGINT.


class StopFlag:
    """True from the first stop request on."""

    def __init__(self) -> None:
        self.reason = ""  # Who asked; empty before the first request.
        self._signals: tuple[signal.Signals, ...] = (signal.SIGINT,)
        self._interrupts_handled = self._interrupts_received = 0
        self._nothing_to_save = self._reported = False
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self.reason)

    def install(
        self, signals: Sequence[signal.Signals] = DEFAULT_SIGNALS, lost_launcher: Callable[[], str] = str
    ) -> None:
        """Handles SIGINT, SIGHUP and `signals` in this process (main thread only).

        `lost_launcher` is called once a second; a non-empty answer says that the launcher is gone and counts as a
        request, because nobody else would stop this process.
        """
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
        if self._record(reason) and self._nothing_to_save:
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, self._signals[0])  # Interrupts a system call too.

    def _record(self, reason: str) -> bool:
        """Records a request and returns whether it is the first one, which is passed on to the listeners."""
        with self._lock:
            if self._reported:
                return False
            self._reported = True
        self.reason = self.reason or reason
        for listener in self._listeners:
            listener()
        return True

    def on_request(self, listener: Callable[[], None]) -> None:
        """Calls `listener` at the first request, in the thread that receives it; at once if there was a request."""
        self._listeners.append(listener)
        if self._reported:
            listener()

    @contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Inside the block, long work before training, a request raises PreemptedError at once (main thread only)."""
        self._nothing_to_save = True
        try:
            if self:
                raise self._preempted()
            yield
        finally:
            self._nothing_to_save = False

    def _preempted(self) -> PreemptedError:
        self._nothing_to_save = False
        return PreemptedError(
            f"stopped by {self.reason} before there was anything to save; run the same command again to go on"
        )

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Python runs it in the main thread, possibly late."""
        del frame
        if number == signal.SIGINT:
            self._interrupts_handled += 1
            if self._interrupts_handled > 1:
                raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name
        if self._nothing_to_save:
            raise self._preempted()

    def _listen(self, stream: socket.socket, far_end: socket.socket, lost_launcher: Callable[[], str]) -> None:
        del far_end  # An argument, so that it stays open as long as this thread runs.
        stream.settimeout(LAUNCHER_CHECK_S)  # Not by select, whose descriptors end at 1,023: rank 0 of many has more.
        while True:
            try:
                numbers = stream.recv(256)
            except TimeoutError:
                if not self and (why := lost_launcher()):
                    self.request(why)
                continue
            for number in numbers:  # Of all signals that have a handler, SIGCHLD for example.
                if number in self._signals:
                    self._take(signal.Signals(number))

    def _take(self, number: signal.Signals) -> None:
        self._record(number.name)
        if number == signal.SIGINT:
            self._interrupts_received += 1
            if self._interrupts_received == 2:
                threading.Thread(target=self._end_process, daemon=True).start()

    def _end_process(self) -> None:
        """Ends the process if its main thread does not get to the handler in time."""
        time.sleep(INTERRUPT_S)
        os.write(2, f"{INTERRUPTED}\n".encode())
        os._exit(INTERRUPTED_CODE)
