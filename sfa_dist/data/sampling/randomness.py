"""Random numbers keyed by sample, not by process: pixels do not depend on rank, worker or resume."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_WORD = (1 << 64) - 1


def sample_rng(seed: int, epoch: int, sample_id: int, purpose: str) -> np.random.Generator:
    """A generator (Philox) keyed by a hash of run seed, epoch, sample and purpose ("clip", "augment", "order").

    Use only its `.random()`: the doubles of Philox are stable, while other methods may change between numpy versions.
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, epoch, sample_id, purpose)))


def first_random(seed: int, epoch: int, sample_id: int, purpose: str) -> float:
    """The first `sample_rng(...).random()`, in a tenth of the time.

    For one number per sample, a generator would cost more than reading the sample's features. This is Philox4x64-10
    (Salmon et al. 2011) at counter 1, where numpy starts.
    """
    key = _key(seed, epoch, sample_id, purpose)
    low, high = key & _WORD, key >> 64
    a, b, c, d = 1, 0, 0, 0
    for _ in range(10):
        left, right = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = (right >> 64) ^ b ^ low, right & _WORD, (left >> 64) ^ d ^ high, left & _WORD
        low, high = (low + 0x9E3779B97F4A7C15) & _WORD, (high + 0xBB67AE8584CAA73B) & _WORD
    return (a >> 11) * 2.0**-53


def _key(*parts: int | str) -> int:
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """One number from [low, high)."""
    return low + (high - low) * float(rng.random())


def below(rng: np.random.Generator, stop: int) -> int:
    """One integer from [0, stop)."""
    return int(rng.random() * stop)


def permutation(rng: np.random.Generator, length: int) -> npt.NDArray[np.int64]:
    """A random order of 0 .. length - 1, int64 (length,)."""
    return np.argsort(rng.random(length), kind="stable").astype(np.int64)
