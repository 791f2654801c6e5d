"""Augmentation of whole clips: uint8 (T, H, W, 3) in, contiguous uint8 (3, T, S, S) out.

The training order is that of the official ViViT recipes: resize the short side, scale height and width by two
independent factors, crop, flip, then either RandAugment, or colour and grey. Parameters are drawn once a clip and are
the same for all its frames.
The two resizes are done as one. A clip that already has the wanted size is not resampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import adjust_hue

from sfa_dist.data.rand_augment import GRAY_WEIGHTS, rand_augment
from sfa_dist.data.randomness import below, uniform
from sfa_dist.recipe_blocks import AugmentBlock

MAX_BRIGHTNESS = 32 / 255
SATURATION = CONTRAST = (0.6, 1.4)
MAX_HUE = 0.2  # of a full turn
_FRAMES_AT_ONCE = 8  # colour works in float32: a few frames at a time stay in the cache


@dataclass(frozen=True)
class Color:
    """One draw of the colour augmentation: brightness is added (pixels in 0..1), hue is a part of a full turn."""

    brightness: float
    saturation: float
    contrast: float
    hue: float


def train_transform(
    clip: torch.Tensor, resize: int, crop: int, augment: AugmentBlock, rng: np.random.Generator
) -> torch.Tensor:
    """One random training view. clip uint8 (T, H, W, 3) -> uint8 (3, T, crop, crop); resize, crop in pixels."""
    low, high = augment.scale_jitter or (1.0, 1.0)
    height, width = _short_side(clip, resize, crop)
    size = (_scaled(height, uniform(rng, low, high), crop), _scaled(width, uniform(rng, low, high), crop))
    frames = resized(clip, *size)
    top, left = below(rng, size[0] - crop + 1), below(rng, size[1] - crop + 1)
    frames = frames[..., top : top + crop, left : left + crop]
    if rng.random() < augment.flip:
        frames = frames.flip(-1)
    color = Color(
        brightness=uniform(rng, -MAX_BRIGHTNESS, MAX_BRIGHTNESS),
        saturation=uniform(rng, *SATURATION),
        contrast=uniform(rng, *CONTRAST),
        hue=uniform(rng, -MAX_HUE, MAX_HUE),
    )
    has_color, has_gray = rng.random() < augment.color, rng.random() < augment.gray
    if augment.rand_augment is not None:
        frames = rand_augment(frames, augment.rand_augment.layers, augment.rand_augment.magnitude, rng)
    frames = adjust_color(frames, color if has_color else None, has_gray)
    return frames.transpose(0, 1).contiguous()


def eval_transform(clip: torch.Tensor, resize: int, crop: int, view: int = 0, views: int = 1) -> torch.Tensor:
    """One spatial test view. clip uint8 (T, H, W, 3) -> uint8 (3, T, crop, crop).

    views 1 is the centre crop; views 3 are left, centre, right of a landscape clip, top, centre, bottom of a portrait.
    """
    height, width = _short_side(clip, resize, crop)
    top, left = (height - crop) // 2, (width - crop) // 2
    if views == 3 and width >= height:
        left = (width - crop) * view // 2
    elif views == 3:
        top = (height - crop) * view // 2
    frames = resized(clip, height, width)[..., top : top + crop, left : left + crop]
    return frames.transpose(0, 1).contiguous()


def resized(clip: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 (T, H, W, 3) -> uint8 (T, 3, height, width), bilinear with antialias; the same size is not resampled."""
    frames = clip.permute(0, 3, 1, 2)  # channels_last in memory, which has the fast uint8 kernel
    if frames.shape[-2:] == (height, width):
        return frames
    if frames.device.type == "cpu":
        return F.interpolate(frames, (height, width), mode="bilinear", antialias=True)
    return resized_in_float(frames, height, width)


def resized_in_float(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """As `resized`, uint8 (T, 3, H, W) -> (T, 3, height, width), for cards, which have no uint8 kernel: within one
    level of it."""
    size, parts = (height, width), frames.split(_FRAMES_AT_ONCE)
    sized = (F.interpolate(part.float(), size, mode="bilinear", antialias=True) for part in parts)
    return torch.cat([pixels.round_().clamp_(0, 255).to(torch.uint8) for pixels in sized])


def adjust_color(frames: torch.Tensor, color: Color | None, gray: bool) -> torch.Tensor:
    """uint8 (T, 3, H, W) -> the same shape. float32 inside, clipped and rounded back; None and False change nothing."""
    if color is None and not gray:
        return frames
    parts = []
    for part in frames.split(_FRAMES_AT_ONCE):
        pixels = part.to(torch.float32, memory_format=torch.contiguous_format) / 255
        if color is not None:
            pixels = _adjusted(pixels, color)
        if gray:
            pixels = _gray(pixels)
        parts.append(pixels.mul_(255).round_().to(torch.uint8))
    return torch.cat(parts)


def _adjusted(pixels: torch.Tensor, color: Color) -> torch.Tensor:
    """float32 (T, 3, H, W) in 0..1 -> the same; brightness, saturation, contrast, hue as in tf.image."""
    pixels = pixels + color.brightness
    pixels = _saturated(pixels, color.saturation)
    mean = pixels.mean(dim=(-2, -1), keepdim=True)  # of each frame and channel
    pixels = (pixels - mean) * color.contrast + mean
    return adjust_hue(pixels.clamp_(0, 1), color.hue).clamp_(0, 1)


def _saturated(pixels: torch.Tensor, factor: float) -> torch.Tensor:
    """HSV saturation times `factor`, at most 1. With hue and value fixed, a change of saturation moves each channel on
    a line from the largest one, so no conversion to HSV is needed."""
    value = pixels.amax(dim=-3, keepdim=True)
    spread = value - pixels.amin(dim=-3, keepdim=True)
    most = (value / spread.clamp_min(1e-12)).clamp_min(0)  # what takes saturation = spread / value to 1
    return value - (value - pixels) * most.clamp_max(factor)


def _gray(pixels: torch.Tensor) -> torch.Tensor:
    weights = pixels.new_tensor(GRAY_WEIGHTS).view(3, 1, 1)
    return (pixels * weights).sum(dim=-3, keepdim=True).expand_as(pixels).clamp(0, 1)


def _short_side(clip: torch.Tensor, resize: int, crop: int) -> tuple[int, int]:
    """(height, width) with the short side at `resize`, or at `crop` if that is more, and the same aspect."""
    height, width = clip.shape[1:3]
    short = max(resize, crop)
    if height <= width:
        return short, max(short, round(width * short / height))
    return max(short, round(height * short / width)), short


def _scaled(size: int, factor: float, crop: int) -> int:
    return max(crop, round(size * factor))
