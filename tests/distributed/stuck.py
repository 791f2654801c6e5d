"""What processes that do not end are doing, for the message of the test that waited for them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import pytest

TICKS = os.sysconf("SC_CLK_TCK")


def threads_of(processes: Iterable[int]) -> str:
    """Of each thread: its name, state, CPU seconds, the system call that it is in, and, for root, its stack there.

    It only reads: a debugger's signals wake a thread whose wake-up was lost, and the reason is gone.
    """
    lines = []
    for process in processes:
        for task in sorted(Path(f"/proc/{process}/task").glob("*")):
            name, _, rest = _read(task / "stat").partition(" (")[2].rpartition(") ")
            fields = rest.split()
            if not fields:
                continue  # It has just ended.
            busy = (int(fields[11]) + int(fields[12])) / TICKS
            call = _read(task / "syscall").strip() or "?"
            lines.append(f"  {process}/{task.name} {name}: {fields[0]}, {busy:.1f} CPU-s, system call {call}")
            lines.extend(f"    {frame}" for frame in _read(task / "stack").splitlines())
    return "\n".join(lines)


def fail_stuck(message: str) -> NoReturn:
    """The test fails with it; it is a warning too, as the test may be run once more (`make test`)."""
    warnings.warn(message, stacklevel=2)
    pytest.fail(message)


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
