"""The last step of a process: it ends with the exit code of its work, or when it is asked to before."""

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
ASKS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def exit_when_asked() -> None:
    """From here on SIGTERM, SIGUSR1 and SIGHUP (not where it is ignored, as nohup has it) end the process with one line
    and 75, wherever it is: in an import, an exception would be swallowed or make another of it.

    For as long as there is nothing to save: then a StopFlag takes the signals.
    """
    for number in ASKS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit_asked)


def restore_signals() -> None:
    """Takes `exit_when_asked` back: the signals do what they do to any process."""
    for number in ASKS:
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
    """Ends the process with `code`, after `patience` seconds, once all that waits for its end is done: threads that are
    no daemons, `atexit` handlers, and what stdout and stderr still hold. Work that went well, but whose stdout the
    disk does not take, ends with 74.

    The interpreter is not taken down: that ends any thread that asks for it. A thread of gloo does, to let go of a
    tensor, and cannot be ended there without an abort ("terminate called without an active exception"). One rank of a
    run that was done ended so, with 134, for which Slurm calls the job failed.
    """
    # srun sends TERM to the others when the first rank has left: one that is still on its way out would die of it, and
    # the job would end with 143 instead of 75.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(patience)
    threading._shutdown()  # type: ignore[attr-defined] # The order of Py_FinalizeEx.
    atexit._run_exitfuncs()
    failure = _flush(sys.stdout)
    _flush(sys.stderr)
    os._exit(code or failure)


def _flush(stream: TextIO | None) -> int:
    """0, or the exit code for a full disk, which is reported. A closed pipe is no error."""
    if stream is None or stream.closed:  # The process was started without it, or it was closed for its reader's sake.
        return 0
    try:
        stream.flush()
    except BrokenPipeError:
        return 0
    except OSError as error:
        with contextlib.suppress(OSError):  # Where stderr itself is on that disk, only the code can tell.
            os.write(STDERR, f"error: disk: {stream.name}: {error}\n".encode())
        return CheckpointError.exit_code
    return 0
