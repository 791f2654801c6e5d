"""RandAugment of whole clips, as the official ViViT code does it for Something-Something and EPIC-Kitchens.

The official code stacks the frames into one tall image and applies an image library's RandAugment to it. Each operation
therefore has one draw and one set of statistics per clip (equalize and autocontrast use the histogram of all frames),
and sharpness reaches one pixel across the seam between two frames. Cutout is scenic's own: a black square at the same
position in all frames. There are twelve operations, none of them geometric, all equally likely and always applied.

The official magnitudes, 15 and 20, lie beyond the range of 0 to 10 that the operations are made for. Blends
extrapolate, posterize keeps 6 of 8 bits or all, and cutout's square has a side of 120 or 160 pixels. TensorFlow wraps
arguments that do not fit into uint8: solarize's threshold of 384 (magnitude 15) becomes 128, and thresholds of 256 and
512 become 0, which inverts everything. Contrast blends with white instead of the mean grey, because the library takes
the number of pixels / 256 for the mean, which is over 255 for any clip. All of this is reproduced: the paper's
accuracies depend on it.

Sources: scenic dataset_lib/video_ops.py (`distort_image_with_randaugment`, `cutout`), and RandAugment (Cubuk et al.
2020) in TensorFlow's model garden (image_classification/augment.py).

Operations take and return uint8 (3, T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from sfa_dist.data.batches.resizing import packed
from sfa_dist.data.sampling.randomness import below

REVISION = 3  # Raise it when the same settings give other pixels: features stored before are then refused.
MAX_LEVEL = 10
CUTOUT_PIXELS = 40  # Half the side of the square at magnitude 10.
GRAY_WEIGHTS = (0.2989, 0.5870, 0.1140)  # ITU-R 601, as tf.image.rgb_to_grayscale.
_SMOOTH = ((1.0, 1.0, 1.0), (1.0, 5.0, 1.0), (1.0, 1.0, 1.0))

Operation = Callable[[torch.Tensor, int, np.random.Generator], torch.Tensor]


def rand_augment(frames: torch.Tensor, layers: int, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """uint8 (T, 3, H, W) -> the same shape: applies `layers` operations in turn, each drawn from OPERATIONS."""
    clip = packed(frames.transpose(0, 1))
    names = list(OPERATIONS)
    for _ in range(layers):
        clip = OPERATIONS[names[below(rng, len(names))]](clip, magnitude, rng)
    return clip.transpose(0, 1)


def _auto_contrast(clip: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """Stretches each channel to 0..255."""
    low, high = clip.amin(dim=(1, 2, 3), keepdim=True).float(), clip.amax(dim=(1, 2, 3), keepdim=True).float()
    scale = 255 / (high - low).clamp_min(1)
    stretched = (clip.float() * scale - low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, clip)


def _equalize(clip: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """Equalizes each channel's histogram in PIL's integer arithmetic."""
    return torch.stack([_equalized(channel) for channel in clip])


def _equalized(channel: torch.Tensor) -> torch.Tensor:
    histogram = torch.bincount(channel.flatten(), minlength=256)
    filled = histogram[histogram > 0]
    step = int(filled.sum() - filled[-1]) // 255
    if step == 0:
        return channel
    table = torch.cat([histogram.new_zeros(1), (histogram.cumsum(0)[:-1] + step // 2) // step])
    table[0] = 0
    return table.clamp(0, 255).to(torch.uint8)[channel.long()]


def _invert(clip: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    return 255 - clip


def _posterize(clip: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """Keeps the upper magnitude / 10 * 4 bits; one bit where that gives 0, or over 8 (the shift wraps)."""
    bits = int(magnitude / MAX_LEVEL * 4)
    shift = min(7, (8 - bits) % 256)
    return clip >> shift << shift


def _solarize(clip: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """Inverts pixels at or above a threshold of magnitude / 10 * 256 as uint8, which wraps from magnitude 10 on."""
    return torch.where(clip < int(magnitude / MAX_LEVEL * 256) % 256, clip, 255 - clip)


def _solarize_add(clip: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """Adds magnitude / 10 * 110 to pixels below 128."""
    added = (clip.int() + int(magnitude / MAX_LEVEL * 110)).clamp(0, 255).to(torch.uint8)
    return torch.where(clip < 128, added, clip)


def _color(clip: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    return _blend(_gray(clip).expand_as(clip), clip, magnitude)


def _contrast(clip: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    mean = min(255.0, clip[0].numel() / 256)  # Not a mean; see the module docstring.
    return _blend(torch.full_like(clip, int(mean)), clip, magnitude)


def _brightness(clip: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    return _blend(torch.zeros_like(clip), clip, magnitude)


def _sharpness(clip: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """Blends with a smoothed copy, truncated to whole levels: some flat areas lose a level, as in TensorFlow."""
    kernel = torch.tensor(_SMOOTH, device=clip.device).div_(13).expand(3, 1, 3, 3)
    stacked = clip.flatten(1, 2)  # One tall image.
    smooth = stacked.clone()  # The outermost pixels stay.
    inner = F.conv2d(stacked.float().unsqueeze(0), kernel, groups=3)[0]
    smooth[:, 1:-1, 1:-1] = inner.clamp_(0, 255).to(torch.uint8)
    return _blend(smooth.reshape(clip.shape), clip, magnitude)


def _cutout(clip: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """A black square around a random point, the same in all frames, clipped at the border."""
    half = int(magnitude / MAX_LEVEL * CUTOUT_PIXELS)
    row, column = below(rng, clip.shape[2]), below(rng, clip.shape[3])
    clip = clip.clone()
    clip[:, :, max(0, row - half) : row + half, max(0, column - half) : column + half] = 0
    return clip


def _identity(clip: torch.Tensor, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    return clip


def _gray(clip: torch.Tensor) -> torch.Tensor:
    """tf.image.rgb_to_grayscale of uint8: weighted in 0..1, then times 255.5 and truncated."""
    weights = torch.tensor(GRAY_WEIGHTS, device=clip.device).view(3, 1, 1, 1)
    weighted = (clip.float() * (1 / 255) * weights).sum(dim=0, keepdim=True)
    return weighted.mul_(255.5).clamp_(0, 255).to(torch.uint8)


def _blend(first: torch.Tensor, second: torch.Tensor, magnitude: int) -> torch.Tensor:
    """first + factor * (second - first), with factor = magnitude / 10 * 1.8 + 0.1; beyond 1 it extrapolates."""
    factor = magnitude / MAX_LEVEL * 1.8 + 0.1
    base = first.float()
    return second.float().sub_(base).mul_(factor).add_(base).clamp_(0, 255).to(torch.uint8)


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
