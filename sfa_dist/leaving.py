"""The last step of a process: it ends with the exit code of its work."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from typing import NoReturn, TextIO

from sfa_dist.errors import CheckpointError


def leave(code: int, patience: float = 0.0) -> NoReturn:
    """Ends the process with `code`, after `patience` seconds, once all that waits for its end is done: threads that are
    no daemons, `atexit` handlers, and what stdout and stderr still hold (74 where the disk does not take it).

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
    for stream in (sys.stdout, sys.stderr):
        code = _flush(stream) or code
    os._exit(code)


def _flush(stream: TextIO) -> int:
    """0, or the exit code for a disk that is full. A reader that has left has what it wanted."""
    try:
        stream.flush()
    except BrokenPipeError:
        return 0
    except OSError as error:
        print(f"error: disk: {stream.name}: {error}", file=sys.__stderr__)
        return CheckpointError.exit_code
    return 0
