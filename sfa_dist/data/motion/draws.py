"""The random numbers of clips, from a generator for each (seed, index)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfa_dist.data.sampling.randomness import sample_rng

Numbers = npt.NDArray[np.float64]
_PURPOSE = "motion"


class Draws:
    """Random numbers of some clips, in the order of the calls. Those of a clip do not depend on the other clips."""

    def __init__(self, seed: int, indices: Sequence[int]) -> None:
        self._generators = [sample_rng(seed, 0, index, _PURPOSE) for index in indices]

    def uniform(self, low: float, high: float, *shape: int) -> Numbers:
        """Float64 (clips, *shape), each from [low, high)."""
        drawn = np.stack([generator.random(shape) for generator in self._generators])
        return low + (high - low) * drawn

    def logarithmic(self, low: float, high: float, *shape: int) -> Numbers:
        """Float64 (clips, *shape) from [low, high), uniform in the logarithm."""
        return np.exp(self.uniform(float(np.log(low)), float(np.log(high)), *shape))

    def chance(self, share: float, *shape: int) -> npt.NDArray[np.bool_]:
        """Bool (clips, *shape), true with probability `share`."""
        return self.uniform(0.0, 1.0, *shape) < share


def tensor(values: npt.NDArray[np.generic]) -> Tensor:
    """The values as a float32 tensor."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
