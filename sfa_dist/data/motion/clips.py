"""The pixels and labels of generated clips.

Shape legend: B clips, N things, T frames, H = W pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_dist.data.motion.draws import Draws, tensor
from sfa_dist.data.motion.paths import Paths, draw_paths
from sfa_dist.data.motion.shapes import Shapes
from sfa_dist.data.motion.textures import draw_colours, draw_tiles, look_up

THINGS = 4  # The most things in a clip, including the labelled one.
PLAIN = 0.6  # The fraction of clips with one thing over a ground that does not move.
SHOWN = (1.0, 0.6, 0.4, 0.3)  # The fraction of the other clips that show each thing.
CELLS = 4  # The frame is divided into CELLS x CELLS for `cover` and `flow`.
_TEXELS = (14.0, 56.0)  # Texels of the ground along a frame's side.
_ON_A_THING = (4.0, 16.0)  # Texels of a thing along its radius.
_NOISE = 0.05  # The largest amplitude of sensor noise, of pixels from 0 to 1.


class MotionLabels(NamedTuple):
    """The labels of B clips of T frames, in float32; lengths are fractions of the side.

    The labelled thing is the largest of those that move by themselves.

    - `centres` (B, T, 2): its centre.
    - `steps` (B, T - 1, 2): its displacement between frames, which does not jump where it wraps around a border.
    - `pan` (B, T - 1, 2): the displacement of the ground.
    - `cover` (B, T, CELLS, CELLS): the fraction of each cell covered by things that move by themselves.
    - `flow` (B, T - 1, CELLS, CELLS, 2): their displacement times the cover of the later frame.
    """

    centres: Tensor
    steps: Tensor
    pan: Tensor
    cover: Tensor
    flow: Tensor


def motion_clip(seed: int, index: int, frames: int, size: int) -> tuple[npt.NDArray[np.uint8], MotionLabels]:
    """One clip, uint8 (T, H, W, 3), and its labels without the axis B: a pure function of its arguments."""
    clips, labels = motion_clips(seed, [index], frames, size)
    pixels = np.ascontiguousarray(clips[0].permute(1, 2, 3, 0).numpy())
    return pixels, MotionLabels(*(value[0] for value in labels))


def motion_clips(seed: int, indices: Sequence[int], frames: int, size: int) -> tuple[Tensor, MotionLabels]:
    """Clips as a model takes them, uint8 (B, 3, T, H, W), and their labels. Each clip equals that of `motion_clip`."""
    draws = Draws(seed, indices)
    plain = draws.chance(PLAIN)
    paths = draw_paths(draws, frames, THINGS, plain)
    shown = draws.uniform(0.0, 1.0, THINGS) < np.array(SHOWN)
    shown[:, 1:] &= ~plain[:, None]
    shapes, tiles = Shapes(draws, THINGS), draw_tiles(draws, 2)
    colours, light = draw_colours(draws, THINGS)
    behind = tensor(draws.chance(0.3) & ~plain)[:, None, None, None]  # Whether the labelled thing is behind the others.
    x, y = _own_places(paths, size)
    covers = shapes.cover(x, y, tensor(paths.radii * size)) * tensor(shown)[..., None, None, None]
    density, offset = tensor(draws.uniform(*_ON_A_THING, THINGS)), tensor(draws.uniform(0, 64, THINGS, 2))
    inside = _inside(tiles[:, 1], x, y, density, offset)
    ground = _ground(draws, tiles[:, 0], paths, size)
    pixels = _between(colours[:, 0], ground)
    for thing in (0, *range(THINGS - 1, 0, -1), 0):
        cover = covers[:, thing]
        if thing == 0:  # Painted first where it is behind, and last otherwise.
            cover = cover * behind
            behind = 1 - behind
        pixels = pixels + (_between(colours[:, thing + 1], inside[:, thing]) - pixels) * cover[:, None]
    pixels = pixels * light[:, :1, None, None, None] + light[:, 1:, None, None, None]
    noise = draws.uniform(-1.0, 1.0, frames, size, size) * draws.uniform(0.0, _NOISE, 1, 1, 1)
    pixels = (pixels + tensor(noise)[:, None]).clamp(0, 1)
    return (pixels * 255 + 0.5).to(torch.uint8), _labels(paths, covers, moving=~paths.still)


def _places(size: int) -> Tensor:
    """The middles of the pixels along a side."""
    return (torch.arange(size, dtype=torch.float32) + 0.5) / size


def _own_places(paths: Paths, size: int) -> tuple[Tensor, Tensor]:
    """Each pixel (B, N, T, H, W) in each thing's own coordinates, in which its radius is 1."""
    centres, places = tensor(paths.centres), _places(size)
    dx, dy = places - centres[..., :1], places - centres[..., 1:]  # (B, N, T, size) both
    wraps = torch.from_numpy(paths.wraps)[:, None, None, None]
    dx, dy = (torch.where(wraps, torch.remainder(d + 0.5, 1.0) - 0.5, d) for d in (dx, dy))
    dx, dy = dx[..., None, :], dy[..., None]
    cos, sin = (tensor(f(paths.angles) / paths.radii)[..., None, None] for f in (np.cos, np.sin))
    return dx * cos + dy * sin, dy * cos - dx * sin


def _inside(tiles: Tensor, x: Tensor, y: Tensor, density: Tensor, offset: Tensor) -> Tensor:
    density = density[..., None, None, None]
    x_off, y_off = (value[..., None, None, None] for value in offset.unbind(-1))
    return look_up(tiles, x * density + x_off, y * density + y_off)


def _ground(draws: Draws, tiles: Tensor, paths: Paths, size: int) -> Tensor:
    """The ground's noise (B, T, H, W), as the camera moves over it."""
    texels, offset = tensor(draws.logarithmic(*_TEXELS, 1)), tensor(draws.uniform(0, 64, 2))
    pan, zoom = tensor(paths.pan), tensor(paths.zoom)[..., None]
    # A place of the ground is seen at 0.5 + (place - 0.5 - pan) * zoom, like the things that stand on it.
    x, y = ((_places(size) - 0.5) / zoom + 0.5 + way[..., None] for way in pan.unbind(-1))
    x, y = (v * texels[..., None] + o[:, None, None] for v, o in zip((x, y), offset.unbind(-1), strict=True))
    frames = pan.shape[1]
    whole = (len(pan), frames, size, size)
    return look_up(tiles, x[:, :, None].expand(whole), y[..., None].expand(whole))


def _between(colours: Tensor, share: Tensor) -> Tensor:
    """Colours (B, 2, 3) mixed by (B, T, H, W): (B, 3, T, H, W)."""
    low, high = (colour[..., None, None, None] for colour in colours.unbind(1))
    return low + (high - low) * share[:, None]


def _labels(paths: Paths, covers: Tensor, moving: npt.NDArray[np.bool_]) -> MotionLabels:
    steps = tensor(paths.steps)
    own = F.adaptive_avg_pool2d((covers * tensor(moving)[..., None, None, None]).flatten(0, 1), CELLS)
    own = own.unflatten(0, covers.shape[:2])  # (B, N, T, CELLS, CELLS)
    flow = (own[:, :, 1:, :, :, None] * steps[:, :, :, None, None]).sum(dim=1)
    pan = tensor(-np.diff(paths.pan, axis=1))
    return MotionLabels(tensor(paths.centres[:, 0]), steps[:, 0], pan, own.sum(dim=1).clamp(max=1), flow)
