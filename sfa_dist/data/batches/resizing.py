"""Two ways to resize the frames of a clip (`augment.resize`), uint8 (T, H, W, 3) in and out.

`official` is what the official code does, tf.image.resize with its defaults: bilinear between four pixels, without
antialiasing, truncated to whole levels. `antialias` is torch's: bilinear over all pixels that a new one covers,
rounded. Truncation loses half a level on average, and the official way aliases where frames become much smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from sfa_dist.recipe.blocks import Resize

VALUES_AT_ONCE = 1 << 16  # Of a clip, on a CPU: they and what is made of them fit into its cache.
FRAMES_ON_A_CARD = 8


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
        return official(frames, [(height, width)], window)
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


def official(frames: torch.Tensor, sizes: Sequence[tuple[int, int]], window: PixelWindow | None = None) -> torch.Tensor:
    """Resizes uint8 (T, H, W, 3) to each (height, width) in turn: (T, height, width, 3), or the last one's `window`.

    Of each size, only the pixels that the next one needs are computed. Frames of a size are not resampled to it.
    """
    window = window or PixelWindow(0, 0, *sizes[-1])
    steps: list[tuple[_Side, _Side]] = []
    before = [(frames.shape[1], frames.shape[2]), *sizes[:-1]]
    for old, new in zip(reversed(before), reversed(sizes), strict=True):
        if old != new:
            rows = _side(old[0], new[0], window.top, window.height)
            columns = _side(old[1], new[1], window.left, window.width, channels=3)
            steps.append((rows, columns))
            window = PixelWindow(rows.first, columns.first, rows.old, columns.old)
    frames = window.of(frames)
    for rows, columns in reversed(steps):
        frames = _bilinear(frames, rows, columns)
    return frames


def _bilinear(frames: torch.Tensor, rows: _Side, columns: _Side) -> torch.Tensor:
    """uint8 (T, rows.old, columns.old, 3) -> (T, rows.new, columns.new, 3).

    Interpolates across, then down, each as a + (b - a) * share in float32, in the order of TensorFlow's kernel. The
    order matters: it decides which values fall below a whole level and are truncated.
    """
    count, device = len(frames), frames.device
    before, after = 3 * columns.old, 3 * columns.new  # Values in a row.
    at_once = frames_at_once(count, rows.old * before, device)
    left, right, across_share = columns.on(device)
    upper, lower, down_share = rows.on(device)
    out = frames.new_empty((count, rows.new, columns.new, 3))
    # Memory is new to the process when first written to, which takes longer than the arithmetic, so it is used again.
    sizes = (max(rows.old * before, rows.new * after), max(rows.old, rows.new) * after, rows.old * after)
    memory = [torch.empty(at_once * size, device=device) for size in sizes]

    def table(number: int, *shape: int) -> torch.Tensor:
        return memory[number][: math.prod(shape)].view(shape)

    for part, into in zip(frames.split(at_once), out.split(at_once), strict=True):
        some = len(part)
        source = table(0, some * rows.old, before)
        source.view(part.shape).copy_(part)
        a = torch.index_select(source, 1, left, out=table(1, some * rows.old, after))
        across = torch.index_select(source, 1, right, out=table(2, some * rows.old, after))
        across = across.sub_(a).mul_(across_share).add_(a).view(some, rows.old, after)
        a = torch.index_select(across, 1, upper, out=table(0, some, rows.new, after))
        down = torch.index_select(across, 1, lower, out=table(1, some, rows.new, after))
        down.sub_(a).mul_(down_share.view(-1, 1)).add_(a)
        into.view(down.shape).copy_(down.to(torch.int16))  # Torch has no fast conversion from floats to 8 bits.
    return out


def frames_at_once(count: int, values: int, device: torch.device) -> int:
    """How many of `count` frames of so many values each to work on at a time."""
    return min(count, FRAMES_ON_A_CARD if device.type != "cpu" else max(1, VALUES_AT_ONCE // values))


def packed(pixels: torch.Tensor) -> torch.Tensor:
    """The same in contiguous memory, as by `contiguous()`."""
    if pixels.is_contiguous() or pixels.device.type != "cpu":
        return pixels.contiguous()
    out = torch.empty(pixels.shape, dtype=pixels.dtype)
    copy_pixels(out, pixels)
    return out


def copy_pixels(into: torch.Tensor, pixels: torch.Tensor) -> None:
    """`into.copy_(pixels)`, which torch does slowly on a CPU where it takes channels apart."""
    if pixels.device.type == "cpu":
        np.copyto(into.numpy(), pixels.numpy())
    else:
        into.copy_(pixels)


class _Side(NamedTuple):
    """For the `new` pixels along one side: their two neighbours among `old` ones from number `first` on, int64, and the
    share of the second, float32. With channels, each pixel has one entry a channel. The arrays are shared: read only.
    """

    first: int
    old: int
    new: int
    lower: npt.NDArray[np.int64]
    upper: npt.NDArray[np.int64]
    share: npt.NDArray[np.float32]

    def on(self, device: torch.device) -> list[torch.Tensor]:
        """The neighbours and the share."""
        return [torch.as_tensor(each, device=device) for each in (self.lower, self.upper, self.share)]


@lru_cache(maxsize=256)
def _side(old: int, new: int, start: int, count: int, channels: int = 1) -> _Side:
    """The side of `count` pixels from `start` on, where `old` pixels become `new`; the slices of a clip share it."""
    centres = (np.arange(start, start + count, dtype=np.float32) + np.float32(0.5)) * np.float32(old / new)
    centres -= np.float32(0.5)
    lower, upper = np.floor(centres).astype(np.int64), np.ceil(centres).astype(np.int64)
    share = centres - lower.astype(np.float32)
    lower, upper = lower.clip(0), upper.clip(max=old - 1)
    first, last = int(lower[0]), int(upper[-1])
    lower, upper = (np.add.outer(channels * (each - first), np.arange(channels)).ravel() for each in (lower, upper))
    return _Side(first, last - first + 1, count, lower, upper, share.repeat(channels))
