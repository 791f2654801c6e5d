"""What the kernel says of a process on this host (Linux's /proc; elsewhere only whether it is there). Standard library
only."""

from __future__ import annotations

import os

PROC = "/proc"
GONE = ("Z", "X", "x")  # A zombie has ended: nobody has asked for its exit code yet.


def state_of(pid: int) -> str | None:
    """The kernel's letter for the state of a process (R runs, S sleeps, T is stopped, ...), None once it has ended.

    Without /proc a process that is there counts as running.
    """
    fields = _fields(pid)
    if fields is None:
        return None if os.path.exists(f"{PROC}/self/stat") or not _is_there(pid) else "R"
    return None if fields[0] in GONE else fields[0]


def started_at(pid: int) -> str | None:
    """When a process started, in clock ticks since boot: with the pid, what no other process of this boot has."""
    fields = _fields(pid)
    return None if fields is None else fields[19]


def parent_of(pid: int) -> int | None:
    """The pid of a process's parent; None where it has ended, or where there is no /proc."""
    fields = _fields(pid)
    return None if fields is None else int(fields[1])


def command_of(pid: int) -> list[str]:
    """The command line of a process; empty where it cannot be read."""
    try:
        with open(f"{PROC}/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\0").split("\0")
    except OSError:
        return []


def _fields(pid: int) -> list[str] | None:
    """/proc/PID/stat from its third field on: the second, the program's name, may hold spaces and brackets."""
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
        pass  # It is there, and another user's.
    return True
