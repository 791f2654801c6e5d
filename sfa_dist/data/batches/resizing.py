"""Two ways to resize the frames of a clip (`augment.resize`), uint8 (T, H, W, 3) in and out.

`official` is what the official code does, tf.image.resize with its defaults: bilinear between four pixels, without
antialiasing, truncated to whole levels. `antialias` is torch's: bilinear over all pixels that a new one covers,
rounded. Truncation loses half a level on average, and the official way aliases where frames become much smaller.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from sfa_dist.recipe.blocks import Resize


class PixelWindow(NamedTuple):
    """A part of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, frames: torch.Tensor) -> torch.Tensor:
        """The window of frames (T, H, W, 3)."""
        return frames[:, self.top : self.top + self.height, self.left : self.left + self.width]


def resized(
    frames: torch.Tensor, height: int, width: int, how: Resize, window: PixelWindow | None = None
) -> torch.Tensor:
    """uint8 (T, H, W, 3) -> (T, height, width, 3), or its `window` alone; frames of that size are not resampled."""
    window = window or PixelWindow(0, 0, height, width)
    if frames.shape[1:3] == (height, width):
        return window.of(frames)
    if how == "official":
        return _bilinear(frames, height, width, window)
    channels_last = frames.permute(0, 3, 1, 2)  # This memory format has the fast uint8 kernel.
    if frames.device.type == "cpu":
        pixels = F.interpolate(channels_last, (height, width), mode="bilinear", antialias=True)
    else:
        pixels = antialiased_in_float(channels_last, height, width)
    return window.of(pixels.permute(0, 2, 3, 1))


def antialiased_in_float(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 (T, 3, H, W) -> (T, 3, height, width) on cards, which lack the uint8 kernel; within one level of it."""
    pixels = F.interpolate(frames.float(), (height, width), mode="bilinear", antialias=True)
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def _bilinear(frames: torch.Tensor, height: int, width: int, window: PixelWindow) -> torch.Tensor:
    """Interpolates across, then down, each as a + (b - a) * share in float32, in the order of TensorFlow's kernel.

    The order matters: it decides which values fall below a whole level and are truncated.
    """
    rows = _Neighbours(frames.shape[1], height, window.top, window.height, frames.device)
    columns = _Neighbours(frames.shape[2], width, window.left, window.width, frames.device)
    needed = frames[:, rows.first : rows.last + 1]
    left = needed.index_select(2, columns.lower).float()
    across = needed.index_select(2, columns.upper).float()
    across.sub_(left).mul_(columns.share.view(1, 1, -1, 1)).add_(left)
    top = across.index_select(1, rows.lower - rows.first)
    down = across.index_select(1, rows.upper - rows.first)
    return down.sub_(top).mul_(rows.share.view(1, -1, 1, 1)).add_(top).to(torch.uint8)


class _Neighbours:
    """For `count` new pixels from `start` on, along one side: their two old neighbours, and the share of the second."""

    def __init__(self, old: int, new: int, start: int, count: int, device: torch.device) -> None:
        centres = (np.arange(start, start + count, dtype=np.float32) + np.float32(0.5)) * np.float32(old / new)
        centres -= np.float32(0.5)
        lower, upper = np.floor(centres).astype(np.int64), np.ceil(centres).astype(np.int64)
        share = centres - lower.astype(np.float32)
        lower, upper = lower.clip(0), upper.clip(max=old - 1)
        self.first, self.last = int(lower[0]), int(upper[-1])
        self.lower, self.upper, self.share = (torch.tensor(each, device=device) for each in (lower, upper, share))
