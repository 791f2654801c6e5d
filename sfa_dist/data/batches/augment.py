"""Augmentation of whole clips: uint8 (T, H, W, 3) in, contiguous uint8 (3, T, S, S) out.

Training follows the order of the official ViViT recipes: resize the short side, scale height and width by two
independent factors, crop, flip, then either RandAugment, or colour and grey. Parameters are drawn once per clip and are
the same for all its frames. A clip that already has the target size is not resampled; `antialias` does both resizes in
one. Colour is rounded to 8 bits; the official code continues in float.

Resize, crop and flip treat each frame on its own (`shrink`), so frames can be processed a few at a time as they are
decoded, and a clip is never held in memory at its stored size. Colour needs the whole clip (`finish`).

Sources: DMVR processors.py (`resize_smallest`, `scale_jitter_augm`, `crop_image`, `color_default_augm`), scenic
dataset_lib/video_ops.py (`additional_augmentations`, `three_spatial_crops`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sfa_dist.data.batches.rand_augment import GRAY_WEIGHTS, rand_augment
from sfa_dist.data.batches.resizing import PixelWindow, frames_at_once, official, packed, resized
from sfa_dist.data.sampling.randomness import below, uniform
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.recipe.blocks import AugmentBlock, Resize

REVISION = 2  # Raise it when the same settings give other pixels: features stored before are then refused.
MAX_BRIGHTNESS = 32 / 255
SATURATION = CONTRAST = (0.6, 1.4)
MAX_HUE = 0.2  # of a full turn
_SLICE = 8  # Frames, as a decoder hands them on.


@dataclass(frozen=True)
class Color:
    """One draw of the colour augmentation: brightness is added to pixels in 0..1, hue is a fraction of a full turn."""

    brightness: float
    saturation: float
    contrast: float
    hue: float


@dataclass(frozen=True)
class _Draw:
    """The random parameters of one view, for frames of one size."""

    frame: tuple[int, int]  # Height and width of the stored frames.
    short: tuple[int, int]  # After the first resize.
    scaled: tuple[int, int]  # After the second.
    window: PixelWindow
    flip: bool
    color: Color | None
    gray: bool


class TrainView:
    """One random training view of a clip; its parameters are drawn when the first frames show their size."""

    def __init__(self, resize: int, crop: int, augment: AugmentBlock, rng: np.random.Generator) -> None:
        self._resize, self._crop, self._augment, self._rng = resize, crop, augment, rng
        self._draw: _Draw | None = None

    def shrink(self, frames: torch.Tensor) -> torch.Tensor:
        """Resizes, crops and flips some of the clip's frames: uint8 (T, H, W, 3) -> (T, crop, crop, 3).

        Raises BadSample where the frames differ in size from earlier ones.
        """
        if self._draw is None:
            self._draw = self._draw_parameters(frames.shape[1], frames.shape[2])
        draw = self._draw
        if draw.frame != tuple(frames.shape[1:3]):
            raise BadSample("the size of the frames changes inside the video")
        if self._augment.resize == "official":
            frames = official(frames, (draw.short, draw.scaled), draw.window)
        else:
            frames = resized(frames, *draw.scaled, self._augment.resize, draw.window)
        return frames.flip(2) if draw.flip else frames

    def finish(self, clip: torch.Tensor) -> torch.Tensor:
        """Colours all frames that `shrink` returned, in order: uint8 (T, crop, crop, 3) -> (3, T, crop, crop)."""
        assert self._draw is not None
        frames = clip.permute(0, 3, 1, 2)
        rand = self._augment.rand_augment
        if rand is not None:
            frames = rand_augment(frames, rand.layers, rand.magnitude, self._rng)
        return packed(adjust_color(frames, self._draw.color, self._draw.gray).transpose(0, 1))

    def _draw_parameters(self, height: int, width: int) -> _Draw:
        augment, crop, rng = self._augment, self._crop, self._rng
        low, high = augment.scale_jitter or (1.0, 1.0)
        short = _short_side(height, width, self._resize, crop)
        scaled = (_scaled(short[0], uniform(rng, low, high), crop), _scaled(short[1], uniform(rng, low, high), crop))
        top, left = below(rng, scaled[0] - crop + 1), below(rng, scaled[1] - crop + 1)
        flip = rng.random() < augment.flip
        color = Color(
            brightness=uniform(rng, -MAX_BRIGHTNESS, MAX_BRIGHTNESS),
            saturation=uniform(rng, *SATURATION),
            contrast=uniform(rng, *CONTRAST),
            hue=uniform(rng, -MAX_HUE, MAX_HUE),
        )
        has_color, has_gray = rng.random() < augment.color, rng.random() < augment.gray
        window = PixelWindow(top, left, crop, crop)
        return _Draw((height, width), short, scaled, window, flip, color if has_color else None, has_gray)


@dataclass(frozen=True)
class SpatialViews:
    """The spatial test views of a clip.

    One view is the centre crop. Three are left, centre and right of a landscape clip, or top, centre and bottom of a
    portrait one.
    """

    resize: int
    crop: int
    how: Resize = "official"
    views: int = 1

    def shrink(self, frames: torch.Tensor) -> torch.Tensor:
        """Resizes some of the clip's frames, uint8 (T, H, W, 3): the short side becomes `resize`, at least `crop`."""
        return resized(frames, *_short_side(frames.shape[1], frames.shape[2], self.resize, self.crop), self.how)

    def cut(self, clip: torch.Tensor, view: int = 0) -> torch.Tensor:
        """One view, uint8 (3, T, crop, crop), of the frames that `shrink` returned."""
        spare = (clip.shape[1] - self.crop, clip.shape[2] - self.crop)
        if self.views == 1:  # tf.image.resize_with_crop_or_pad rounds down, scenic's three crops round up.
            top, left = spare[0] // 2, spare[1] // 2
        else:
            top, left = -(-spare[0] // 2), -(-spare[1] // 2)
            if clip.shape[1] > clip.shape[2]:
                top = (0, top, spare[0])[view]
            else:
                left = (0, left, spare[1])[view]
        return PixelWindow(top, left, self.crop, self.crop).of(clip).permute(3, 0, 1, 2)


def train_transform(
    clip: torch.Tensor, resize: int, crop: int, augment: AugmentBlock, rng: np.random.Generator
) -> torch.Tensor:
    """One random training view: uint8 (T, H, W, 3) -> uint8 (3, T, crop, crop); `resize` and `crop` are in pixels."""
    view = TrainView(resize, crop, augment, rng)
    return view.finish(torch.cat([view.shrink(part) for part in clip.split(_SLICE)]))


def adjust_color(frames: torch.Tensor, color: Color | None, gray: bool) -> torch.Tensor:
    """uint8 (T, 3, H, W) -> the same, computed in float32, clipped and rounded; None and False change nothing.

    The result is a view of memory in the order (3, T, H, W).
    """
    if color is None and not gray:
        return frames
    count, _, height, width = frames.shape
    out = frames.new_empty((3, count, height, width))
    at_once = frames_at_once(count, 3 * height * width, frames.device)
    # Memory is new to the process when first written to, which takes longer than the arithmetic, so it is used again.
    memory = frames.new_empty((3, at_once, 3, height, width), dtype=torch.float32)
    for part, into in zip(frames.split(at_once), out.split(at_once, dim=1), strict=True):
        pixels, *spare = memory[:, : len(part)]
        pixels.copy_(packed(part)).div_(255)
        if color is not None:
            pixels = _adjusted(pixels, color, spare)
        if gray:
            pixels = _gray(pixels)
        into.transpose(0, 1).copy_(pixels.mul_(255).round_().to(torch.int16))  # Floats to 8 bits directly are slow.
    return out.transpose(0, 1)


def _adjusted(pixels: torch.Tensor, color: Color, spare: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 (T, 3, H, W) in 0..1 -> the same, with brightness, saturation, contrast and hue as in tf.image.

    Overwrites `pixels` and two `spare` tensors of the same size, and returns one of the latter. The operations and
    their order decide the last bits, and with them the rounding.
    """
    pixels.add_(color.brightness)
    _saturate(pixels, color.saturation, *spare)
    mean = pixels.mean(dim=(-2, -1), keepdim=True)  # Of each frame and channel.
    pixels.sub_(mean).mul_(color.contrast).add_(mean)
    return _hue_rotated(pixels, color.hue, *spare).clamp_(0, 1)


def _saturate(pixels: torch.Tensor, factor: float, spare: torch.Tensor, distance: torch.Tensor) -> None:
    """Multiplies the HSV saturation by `factor`, up to a saturation of 1.

    With hue and value fixed, a change of saturation scales each channel's distance from the largest one, so no
    conversion to HSV is needed.
    """
    value, spread, most = spare.split(1, dim=-3)
    _extremes(pixels, value, spread)
    torch.sub(value, spread, out=spread)
    # The factor that takes saturation = spread / value to 1.
    torch.div(value, spread.clamp_min_(1e-12), out=most).clamp_(0, factor)
    torch.sub(value, pixels, out=distance).mul_(most)
    torch.sub(value, distance, out=pixels)


def _hue_rotated(pixels: torch.Tensor, turn: float, spare: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Adds `turn`, a fraction of a full turn from -0.8 to 0.8, to the HSV hue; the result is `out`.

    The largest and the smallest channel keep their values even outside 0..1: the official code clips only the result.
    """
    red, green, blue = pixels.split(1, dim=-3)
    low, spread, sixths = spare.split(1, dim=-3)
    high, other, mask = out.split(1, dim=-3)
    _extremes(pixels, high, low)
    torch.sub(high, low, out=spread).clamp_min_(1e-30)  # Grey has no hue: 0 / 0.
    # The first of red, green and blue that is the largest tells the hue. It is selected by factors of 0 and 1: they are
    # exact, and take a tenth of the time of torch.where.
    torch.sub(red, green, out=sixths).div_(spread).add_(4).mul_(torch.ne(high, green, out=mask))
    torch.sub(blue, red, out=other).div_(spread).add_(2).mul_(torch.eq(high, green, out=mask))
    sixths.add_(other).mul_(torch.ne(high, red, out=mask))
    torch.sub(green, blue, out=other).div_(spread).mul_(torch.eq(high, red, out=mask))
    sixths.add_(other).add_(6 * turn)
    sixths.add_(torch.lt(sixths, 0, out=mask).mul_(6))
    sixths.sub_(torch.ge(sixths, 6, out=mask).mul_(6))
    torch.sub(sixths, 3, out=high).abs_().sub_(1)
    torch.sub(sixths, 2, out=other).abs_().neg_().add_(2)
    torch.sub(sixths, 4, out=mask).abs_().neg_().add_(2)
    return out.clamp_(0, 1).mul_(spread).add_(low)


def _extremes(pixels: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """Writes each pixel's largest and smallest channel, (T, 1, H, W), to `high` and `low`."""
    red, green, blue = pixels.split(1, dim=-3)
    torch.maximum(torch.maximum(red, green, out=high), blue, out=high)
    torch.minimum(torch.minimum(red, green, out=low), blue, out=low)


def _gray(pixels: torch.Tensor) -> torch.Tensor:
    weights = pixels.new_tensor(GRAY_WEIGHTS).view(3, 1, 1)
    return (pixels * weights).sum(dim=-3, keepdim=True).clamp_(0, 1).expand_as(pixels).contiguous()


def _short_side(height: int, width: int, resize: int, crop: int) -> tuple[int, int]:
    """(height, width) of the same aspect, rounded down, whose short side is the larger of `resize` and `crop`."""
    short = max(resize, crop)
    return max(short, height * short // width), max(short, width * short // height)


def _scaled(size: int, factor: float, crop: int) -> int:
    return max(crop, int(size * factor))
