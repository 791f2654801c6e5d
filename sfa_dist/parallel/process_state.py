"""What the kernel says of a process on this host (Linux's /proc). Standard library only."""

from __future__ import annotations

GONE = ("Z", "X", "x")  # A zombie has ended: nobody has asked for its exit code yet.


def state_of(pid: int) -> str | None:
    """The kernel's letter for the state of a process (R runs, S sleeps, T is stopped, ...), None once it has ended."""
    fields = _fields(pid)
    return None if fields is None or fields[0] in GONE else fields[0]


def started_at(pid: int) -> str | None:
    """When a process started, in clock ticks since boot: with the pid, what no other process of this boot has."""
    fields = _fields(pid)
    return None if fields is None else fields[19]


def parent_of(pid: int) -> int | None:
    """The parent's pid, None once the process is gone."""
    fields = _fields(pid)
    return None if fields is None else int(fields[1])


def _fields(pid: int) -> list[str] | None:
    """/proc/PID/stat from its third field on: the second, the program's name, may hold spaces and brackets."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
