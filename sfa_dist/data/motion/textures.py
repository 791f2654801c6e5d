"""Textures: tiles of noise in octaves, looked up by coordinates, between two colours."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_dist.data.motion.draws import Draws, Numbers, tensor

TILE = 64  # Texels along a side; beyond its border a tile is mirrored.
_OCTAVES = (4, 8, 16, 32)
_APART = 0.35  # The smallest difference between the mean colours of a thing and of the ground.


def draw_tiles(draws: Draws, layers: int) -> Tensor:
    """Noise (B, layers, TILE, TILE) from 0 to 1, of varying roughness, from soft to nearly two values."""
    rough = tensor(draws.uniform(0.4, 1.1, layers))
    noise = torch.zeros(())
    for octave, side in enumerate(_OCTAVES):
        grid = tensor(draws.uniform(-1.0, 1.0, layers, side, side))
        fine = F.interpolate(grid, size=(TILE, TILE), mode="bilinear", align_corners=False)
        noise = noise + fine * (rough**octave)[..., None, None]
    spread = noise.std(dim=(2, 3), keepdim=True)
    hard = tensor(draws.logarithmic(0.2, 1.5, layers))[..., None, None]
    return (0.5 + (noise - noise.mean(dim=(2, 3), keepdim=True)) / spread * hard).clamp(0, 1)


def look_up(tiles: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The noise (B, ...) of each clip's tile (B, TILE, TILE) at places (B, ..., H, W) in texels, bilinear."""
    grid = torch.stack([x, y], dim=-1).flatten(1, -3) * (2 / TILE) - 1
    seen = F.grid_sample(tiles[:, None], grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return seen.reshape(x.shape)


def draw_colours(draws: Draws, things: int) -> tuple[Tensor, Tensor]:
    """Two colours of each layer, (B, things + 1, 2, 3) from 0 to 1, the ground first; gain and offset of all pixels,
    (B, 2).

    A third of the clips are grey, a sixth have a flat ground, an eighth a black one; half of the things are bright.
    """
    layers = things + 1
    middles, apart = draws.uniform(0.0, 1.0, layers, 1, 3), draws.uniform(-0.5, 0.5, layers, 1, 3)
    bright, grey = draws.chance(0.5, layers), draws.chance(0.33)
    flat = draws.uniform(0.0, 1.0)
    middles[:, 1:] = np.where(bright[:, 1:, None, None], 0.8 + 0.2 * middles[:, 1:], middles[:, 1:])
    apart[:, 1:] *= np.where(bright[:, 1:, None, None], 0.3, 1.0)
    middles, apart = (np.where(grey[:, None, None, None], v.mean(axis=-1, keepdims=True), v) for v in (middles, apart))
    apart[:, 0] *= (flat > 1 / 6)[:, None, None]
    black = (flat < 1 / 8)[:, None, None]
    middles[:, 0] = np.where(black, 0.05 * middles[:, 0], middles[:, 0])
    middles[:, 1:] = _away(middles[:, 1:], middles[:, :1])
    colours = np.concatenate([middles - apart, middles + apart], axis=2)
    gain = draws.uniform(0.4, 1.0)
    return tensor(np.clip(colours, 0, 1)), tensor(np.stack([gain, draws.uniform(0.0, 1.0) * (1 - gain)], -1))


def _away(middles: Numbers, ground: Numbers) -> Numbers:
    """Moves colours that are too close to the ground's away from it."""
    difference = (middles - ground).mean(axis=-1, keepdims=True)
    room = np.where(ground.mean(axis=-1, keepdims=True) > 0.5, -1.0, 1.0)
    near = np.abs(difference) < _APART
    return np.where(near, ground + room * _APART * 1.2 + (middles - ground) * 0.2, middles)
