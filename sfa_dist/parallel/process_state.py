"""What the kernel reports of a process on this host. Standard library only.

Read from Linux's /proc; elsewhere it is only known whether the process exists.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PROC = "/proc"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
GONE = ("Z", "X", "x")  # Z, a zombie, has ended too: its parent has not yet collected the exit code.


def state_of(pid: int) -> str | None:
    """The kernel's letter for the state of a process (R runs, S sleeps, T is stopped, ...); None if it has ended.

    Without /proc a process that exists counts as running.
    """
    fields = _fields(pid)
    if fields is None:
        return None if os.path.exists(f"{PROC}/self/stat") or not _is_there(pid) else "R"
    return None if fields[0] in GONE else fields[0]


def started_at(pid: int) -> str | None:
    """When a process started, in clock ticks since boot. Together with the pid it is unique within this boot."""
    fields = _fields(pid)
    return None if fields is None else fields[19]


def parent_of(pid: int) -> int | None:
    """The pid of a process's parent; None if the process has ended, or without /proc."""
    fields = _fields(pid)
    return None if fields is None else int(fields[1])


def command_of(pid: int) -> list[str]:
    """The command line of a process; empty if it cannot be read."""
    try:
        with open(f"{PROC}/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\0").split("\0")
    except OSError:
        return []


def end_with_parent() -> None:
    """Lets the kernel kill this process when the thread that started it ends, however it ends (Linux; else nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _fields(pid: int) -> list[str] | None:
    """/proc/PID/stat from its third field on. The second one, the program's name, may contain spaces and brackets."""
    try:
        with open(f"{PROC}/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # It exists and belongs to another user.
    return True
