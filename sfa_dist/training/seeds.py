"""Seeds of the model's random numbers (initial weights, drop-path), keyed by (seed, stage, step, micro-batch).

Those of a sample are in data/sampling/randomness.py.
"""

from __future__ import annotations

import hashlib

RANDOM_VERSION = 1  # Raise it when the same (seed, stage, step, micro-batch) draws other numbers.


def mix_seed(*parts: int | str) -> int:
    """A 63-bit seed made from the parts, the same in every process and Python version."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
