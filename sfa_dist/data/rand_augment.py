"""RandAugment of whole clips, as the official ViViT code does it for Something-Something and EPIC-Kitchens.

Its frames are stacked into one tall image before an image library's RandAugment sees them, so every operation has one
draw and one set of statistics a clip (equalize and autocontrast by the histogram of all frames), the 80 x 80 hole of
cutout is in one place of one frame, and sharpness reaches over the seam of two frames by a pixel. Twelve operations,
none of them geometric, each as likely; an operation has no probability of its own.

Magnitudes above 10, which the official settings have (15 and 20), go beyond what the operations were made for: the
blends extrapolate, and posterize and solarize do nothing. Contrast blends with white, not with the mean grey: the
library takes the number of pixels / 256 for the mean, which is over 255 for any clip; the accuracies of the paper were
made with it.

Sources: scenic projects/vivit (video_ops), RandAugment (Cubuk et al. 2020) in TensorFlow's autoaugment.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from sfa_dist.data.randomness import below

MAX_LEVEL = 10
CUTOUT_PIXELS = 40  # half a side of the hole
CUTOUT_VALUE = 128
GRAY_WEIGHTS = (0.2989, 0.5870, 0.1140)  # ITU-R 601, as tf.image.rgb_to_grayscale
_SMOOTH = ((1.0, 1.0, 1.0), (1.0, 5.0, 1.0), (1.0, 1.0, 1.0))

Operation = Callable[[torch.Tensor, int, np.random.Generator], torch.Tensor]


def rand_augment(frames: torch.Tensor, layers: int, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """uint8 (T, 3, H, W) -> the same shape: `layers` operations one after the other, each drawn from OPERATIONS."""
    steps, channels, height, width = frames.shape
    image = frames.transpose(0, 1).reshape(channels, steps * height, width)
    names = list(OPERATIONS)
    for _ in range(layers):
        image = OPERATIONS[names[below(rng, len(names))]](image, magnitude, rng)
    return image.view(channels, steps, height, width).transpose(0, 1)


def _auto_contrast(image: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """Stretches each channel to 0..255."""
    low, high = image.amin(dim=(1, 2), keepdim=True).float(), image.amax(dim=(1, 2), keepdim=True).float()
    scale = 255 / (high - low).clamp_min(1)
    stretched = (image.float() * scale - low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, image)


def _equalize(image: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """Makes each channel's histogram flat, by PIL's integer arithmetic."""
    return torch.stack([_equalized(channel) for channel in image])


def _equalized(channel: torch.Tensor) -> torch.Tensor:
    histogram = torch.bincount(channel.flatten(), minlength=256)
    filled = histogram[histogram > 0]
    step = int(filled.sum() - filled[-1]) // 255
    if step == 0:
        return channel
    table = torch.cat([histogram.new_zeros(1), (histogram.cumsum(0)[:-1] + step // 2) // step])
    table[0] = 0
    return table.clamp(0, 255).to(torch.uint8)[channel.long()]


def _invert(image: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    return 255 - image


def _posterize(image: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """Keeps the upper magnitude / 10 * 4 bits."""
    shift = 8 - min(8, int(magnitude / MAX_LEVEL * 4))
    return image >> shift << shift


def _solarize(image: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """Inverts what is at or above a threshold of magnitude / 10 * 256."""
    return torch.where(image.int() < int(magnitude / MAX_LEVEL * 256), image, 255 - image)


def _solarize_add(image: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """Adds magnitude / 10 * 110 to what is below 128."""
    added = (image.int() + int(magnitude / MAX_LEVEL * 110)).clamp(0, 255).to(torch.uint8)
    return torch.where(image < 128, added, image)


def _color(image: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    return _blend(_gray(image).expand_as(image), image, magnitude)


def _contrast(image: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    mean = min(255.0, image[0].numel() / 256)  # see the head of this file
    return _blend(torch.full_like(image, int(mean)), image, magnitude)


def _brightness(image: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    return _blend(torch.zeros_like(image), image, magnitude)


def _sharpness(image: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    kernel = torch.tensor(_SMOOTH, device=image.device).div_(13).expand(3, 1, 3, 3)
    smooth = image.clone()  # the outermost pixels stay
    inner = F.conv2d(image.float().unsqueeze(0), kernel, groups=3)[0]
    smooth[:, 1:-1, 1:-1] = inner.clamp_(0, 255).to(torch.uint8)
    return _blend(smooth, image, magnitude)


def _cutout(image: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """A grey square around a random place, cut off at the border."""
    row, column = below(rng, image.shape[1]), below(rng, image.shape[2])
    image = image.clone()
    rows = slice(max(0, row - CUTOUT_PIXELS), row + CUTOUT_PIXELS)
    image[:, rows, max(0, column - CUTOUT_PIXELS) : column + CUTOUT_PIXELS] = CUTOUT_VALUE
    return image


def _identity(image: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    return image


def _gray(image: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(GRAY_WEIGHTS, device=image.device).view(3, 1, 1)
    return (image.float() * weights).sum(dim=0, keepdim=True).round_().clamp_(0, 255).to(torch.uint8)


def _blend(first: torch.Tensor, second: torch.Tensor, magnitude: int) -> torch.Tensor:
    """first + factor * (second - first), with factor = magnitude / 10 * 1.8 + 0.1; beyond 1 it extrapolates."""
    factor = magnitude / MAX_LEVEL * 1.8 + 0.1
    return torch.lerp(first.float(), second.float(), factor).clamp_(0, 255).to(torch.uint8)


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "posterize": _posterize,
    "solarize": _solarize,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "cutout": _cutout,
    "solarize_add": _solarize_add,
    "identity": _identity,
}
