"""Classifiers without a network: three kinds of small features, the nearest neighbour and a linear classifier.

They take a second, and show whether simple features of the clips separate the classes. A thumbnail of a clip is
(T, 3, GRID, GRID): the means of its pixels over a grid, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from sfa_dist.data.shards.index_columns import Int64

GRID = 8
Features = npt.NDArray[np.float32]
_RIDGE = 0.1  # Added to a kernel whose diagonal is about 1.


def thumbnails(clips: Tensor) -> Features:
    """uint8 (N, 3, T, S, S) -> float32 (N, T, 3, GRID, GRID)."""
    count, _, frames, _, _ = clips.shape
    pooled = F.adaptive_avg_pool2d(clips.transpose(1, 2).flatten(0, 1).float().div_(255), GRID)
    return pooled.unflatten(0, (count, frames)).numpy()


def in_random_order(small: Features, rng: np.random.Generator) -> Features:
    """The thumbnails with the frames of each clip shuffled, each clip in an order of its own."""
    return np.stack([clip[rng.permutation(len(clip))] for clip in small])


FEATURES: Mapping[str, Callable[[Features], Features]] = {
    "mean frame": lambda small: small.mean(axis=1).reshape(len(small), -1),
    "small frames": lambda small: small.mean(axis=2).reshape(len(small), -1),
    "differences of frames": lambda small: np.diff(small.mean(axis=2), axis=1).reshape(len(small), -1),
}


def nearest(train: Features, labels: Int64, test: Features) -> Int64:
    """The label (n,) of each test row's nearest training row; columns are standardised."""
    train, test = _scaled(train, test)
    squared = (test**2).sum(1)[:, None] - 2 * test @ train.T + (train**2).sum(1)[None]
    return labels[squared.argmin(axis=1)]


def linear(train: Features, labels: Int64, test: Features) -> Int64:
    """The predictions (n,) of a ridge regression on one-hot labels; columns are standardised."""
    train, test = _scaled(train, test)
    classes = np.unique(labels)
    wanted = (labels[:, None] == classes).astype(np.float64)
    prior = wanted.mean(axis=0)
    width = max(train.shape[1], 1)
    kernel = (train @ train.T).astype(np.float64) / width + _RIDGE * np.eye(len(train))
    scores = (test @ train.T / width) @ np.linalg.solve(kernel, wanted - prior) + prior
    return classes[scores.argmax(axis=1)]


def _scaled(train: Features, test: Features) -> tuple[Features, Features]:
    mean, deviation = train.mean(axis=0), train.std(axis=0) + 1e-6
    return (train - mean) / deviation, (test - mean) / deviation
