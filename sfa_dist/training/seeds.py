"""Seeds of what a model draws (initial weights, drop-path), by (seed, stage, step, micro-batch). What a sample draws is
in data/randomness.py."""

from __future__ import annotations

import hashlib

RANDOM_VERSION = 1  # Raise it whenever the same (seed, stage, step, micro-batch) would draw other numbers.


def mix_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts, the same in every process and Python."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
