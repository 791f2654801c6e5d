"""Random numbers that belong to a sample and not to a process, so pixels do not depend on rank, worker or resume."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def sample_rng(seed: int, epoch: int, sample_id: int, purpose: str) -> np.random.Generator:
    """A generator (Philox) keyed by a hash of run seed, epoch, sample and purpose ("clip", "augment", "order").

    Draw from it by `.random()` alone: the raw doubles of Philox stay, other methods may change between numpy versions.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{sample_id}/{purpose}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """One number from [low, high)."""
    return low + (high - low) * float(rng.random())


def below(rng: np.random.Generator, stop: int) -> int:
    """One integer from [0, stop)."""
    return int(rng.random() * stop)


def permutation(rng: np.random.Generator, length: int) -> npt.NDArray[np.int64]:
    """A random order of 0 .. length - 1, int64 (length,)."""
    return np.argsort(rng.random(length), kind="stable").astype(np.int64)
