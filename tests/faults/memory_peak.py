"""The most memory that this process has had."""

from __future__ import annotations

from pathlib import Path


def peak_mib() -> float:
    """The most that was resident since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()
