"""How a process ends: with the exit code of its work, or on a stop signal while there is nothing to save."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn, TextIO

from sfa_dist.errors import CheckpointError, PreemptedError

STDERR = 2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def exit_when_asked() -> None:
    """Makes SIGTERM, SIGUSR1 and SIGHUP end the process with one line and exit code 75, wherever it is.

    Not by an exception: an import would swallow it or turn it into another one. SIGHUP stays ignored where it is
    (nohup). This is for the time in which there is nothing to save; later a StopFlag takes the signals.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit_asked)


def restore_signals() -> None:
    """Undoes `exit_when_asked`: the signals get their default handlers again."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _exit_asked:
            signal.signal(number, signal.SIG_DFL)


def _exit_asked(number: int, frame: FrameType | None) -> None:
    del frame
    line = f"stopped: by {signal.Signals(number).name}, with nothing to save; run the same command again\n"
    try:
        os.write(STDERR, line.encode())
    finally:
        os._exit(PreemptedError.exit_code)


def exit_process(code: int, patience: float = 0.0) -> NoReturn:
    """Ends the process with `code` after `patience` seconds, when its remaining work is done.

    That is: non-daemon threads, `atexit` handlers, and the buffers of stdout and stderr. If `code` is 0 but the disk
    has no room for stdout, the process ends with 74.

    The interpreter is not finalized, because that ends every thread that asks for the interpreter's lock. A thread of
    gloo asks for it to free a tensor and cannot be ended there without an abort ("terminate called without an active
    exception"): one rank of a finished run ended so, with 134, and Slurm called the job failed.
    """
    # srun sends SIGTERM to the other ranks when the first one has left. A rank that is still on its way out would die
    # of it, and the job would end with 143 instead of 75.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(patience)
    threading._shutdown()  # type: ignore[attr-defined] # In the order of Py_FinalizeEx.
    atexit._run_exitfuncs()
    failure = _flush(sys.stdout)
    _flush(sys.stderr)
    os._exit(code or failure)


def _flush(stream: TextIO | None) -> int:
    """0, or the exit code for a full disk, which is reported. A closed pipe is no error."""
    if stream is None or stream.closed:  # The process was started without it, or has closed it.
        return 0
    try:
        stream.flush()
    except BrokenPipeError:
        return 0
    except OSError as error:
        with contextlib.suppress(OSError):  # If stderr is on that disk too, only the exit code can report it.
            os.write(STDERR, f"error: disk: {stream.name}: {error}\n".encode())
        return CheckpointError.exit_code
    return 0
