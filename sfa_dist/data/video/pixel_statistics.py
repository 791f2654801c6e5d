"""Mean and standard deviation of pixels, for a recipe's `data.mean` and `data.std`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_SIDE = 64  # about this many pixels along a side are sampled: enough for a mean over many clips


def pixel_moments(frames: torch.Tensor) -> tuple[float, ...]:
    """The mean of each channel, then the mean of each channel's square, with pixels scaled to 0..1.

    frames: uint8 (n, height, width, 3).
    """
    step = max(1, min(frames.shape[1:3]) // _SIDE)
    pixels = frames[:, ::step, ::step].reshape(-1, 3).double() / 255
    return tuple(torch.cat([pixels.mean(0), pixels.square().mean(0)]).tolist())


def mean_and_std(moments: Sequence[Sequence[float]]) -> tuple[list[float] | None, list[float] | None]:
    """(mean, std) of three channels over all clips, equally weighted; None without clips."""
    if not moments:
        return None, None
    means = [math.fsum(values) / len(moments) for values in zip(*moments, strict=True)]
    deviations = [math.sqrt(max(0.0, square - mean**2)) for mean, square in zip(means[:3], means[3:], strict=True)]
    return [round(mean, 4) for mean in means[:3]], [round(deviation, 4) for deviation in deviations]
