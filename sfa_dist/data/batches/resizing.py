"""Two ways to resize the frames of a clip (`augment.resize`), uint8 (T, H, W, 3) in and out.

`official` is that of the official code, which is tf.image.resize's default: bilinear between four pixels, without
antialias, and cut to whole levels, not rounded. `antialias` is torch's: bilinear over all the pixels that a new one
covers, rounded. The cut takes half a level off on average; where frames become much smaller, the official way aliases.
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
        """That part of (T, H, W, 3)."""
        return frames[:, self.top : self.top + self.height, self.left : self.left + self.width]


def resized(
    frames: torch.Tensor, height: int, width: int, how: Resize, window: PixelWindow | None = None
) -> torch.Tensor:
    """uint8 (T, H, W, 3) -> (T, height, width, 3), or of that the `window` alone. Frames of that size already are not
    resampled."""
    window = window or PixelWindow(0, 0, height, width)
    if frames.shape[1:3] == (height, width):
        return window.of(frames)
    if how == "official":
        return _between_four(frames, height, width, window)
    channels_last = frames.permute(0, 3, 1, 2)  # which has the fast uint8 kernel
    if frames.device.type == "cpu":
        pixels = F.interpolate(channels_last, (height, width), mode="bilinear", antialias=True)
    else:
        pixels = antialiased_in_float(channels_last, height, width)
    return window.of(pixels.permute(0, 2, 3, 1))


def antialiased_in_float(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 (T, 3, H, W) -> (T, 3, height, width), for cards, which have no uint8 kernel: within one level of it."""
    pixels = F.interpolate(frames.float(), (height, width), mode="bilinear", antialias=True)
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def _between_four(frames: torch.Tensor, height: int, width: int, window: PixelWindow) -> torch.Tensor:
    """Across first, then down, each as a + (b - a) * share in float32, as TensorFlow's kernel has it: the order decides
    about what is cut."""
    rows = _Between(frames.shape[1], height, window.top, window.height, frames.device)
    columns = _Between(frames.shape[2], width, window.left, window.width, frames.device)
    needed = frames[:, rows.first : rows.last + 1]
    left = needed.index_select(2, columns.lower).float()
    across = needed.index_select(2, columns.upper).float()
    across.sub_(left).mul_(columns.share.view(1, 1, -1, 1)).add_(left)
    top = across.index_select(1, rows.lower - rows.first)
    down = across.index_select(1, rows.upper - rows.first)
    return down.sub_(top).mul_(rows.share.view(1, -1, 1, 1)).add_(top).to(torch.uint8)


class _Between:
    """Between which two old pixels the new ones `start`, `start` + 1, ... lie along one side, and how far."""

    def __init__(self, old: int, new: int, start: int, count: int, device: torch.device) -> None:
        places = (np.arange(start, start + count, dtype=np.float32) + np.float32(0.5)) * np.float32(old / new)
        places -= np.float32(0.5)  # of pixels' centres
        lower, upper = np.floor(places).astype(np.int64), np.ceil(places).astype(np.int64)
        share = places - lower.astype(np.float32)
        lower, upper = lower.clip(0), upper.clip(max=old - 1)
        self.first, self.last = int(lower[0]), int(upper[-1])
        self.lower, self.upper, self.share = (torch.tensor(each, device=device) for each in (lower, upper, share))
