"""The positions of things in each frame: straight and reflected by the borders, wrapping around them, or circling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sfa_dist.data.motion.draws import Draws, Numbers

SPEED = (0.01, 0.16)  # Of a thing, in sides per frame.
RADIUS = (0.05, 0.3)
LESS = 0.6  # The largest radius of other moving things, as a fraction of the labelled thing's.
_LEAST_RADIUS, _MOST_RADIUS = 0.03, 0.4
_ORBIT = (0.08, 0.35)
_PAN, _ZOOM, _GROWTH, _TURN = 0.06, 0.03, 0.04, 0.35  # The most per frame: sides, relative, relative, radians.


@dataclass(frozen=True)
class Paths:
    """The paths of N things in B clips of T frames. Thing 0 is the labelled one: the largest that moves by itself.

    `centres` (B, N, T, 2); `steps` (B, N, T - 1, 2) between frames; `radii` and `angles` (B, N, T). `wraps` (B,) marks
    clips whose things reappear on the other side, `still` (B, N) things that stand on the ground. `pan` (B, T, 2) and
    `zoom` (B, T) are the camera's.
    """

    centres: Numbers
    steps: Numbers
    radii: Numbers
    angles: Numbers
    wraps: npt.NDArray[np.bool_]
    still: npt.NDArray[np.bool_]
    pan: Numbers
    zoom: Numbers


def draw_paths(draws: Draws, frames: int, things: int, plain: npt.NDArray[np.bool_]) -> Paths:
    """Draws the paths of `things` things; the camera stands still in `plain` clips (B,).

    Except for the first, half of the things stand on the ground and have any size; the others move and are smaller.
    """
    times = np.arange(frames)
    pan, zoom = _camera(draws, times, plain)
    radii = draws.logarithmic(*RADIUS, things)
    still = draws.chance(0.5, things)
    still[:, 0] = False
    largest = np.where(np.arange(things) == 0, 1.0, LESS) * radii[:, :1]
    radii = np.where(still, radii, np.minimum(radii, largest))
    starts = draws.uniform(0.0, 1.0, things, 2)
    speeds, courses = draws.logarithmic(*SPEED, things), draws.uniform(0.0, 2 * np.pi, things)
    orbits, sides = draws.uniform(*_ORBIT, things), draws.chance(0.5, things)
    kinds = draws.uniform(0.0, 1.0)  # Of all the things of a clip.
    wraps, circles = kinds < 0.25, kinds > 0.6
    velocity = speeds[..., None] * np.stack([np.cos(courses), np.sin(courses)], -1)
    straight = starts[:, :, None] + velocity[:, :, None] * times[:, None]
    margin = np.minimum(radii, 0.25)[..., None, None]
    reflected = margin + _triangle((straight - margin) / (1 - 2 * margin)) * (1 - 2 * margin)
    turned = courses[..., None] + np.where(sides, 1, -1)[..., None] * (speeds / orbits)[..., None] * times
    middles = orbits[..., None] + starts * (1 - 2 * orbits[..., None])
    circling = middles[:, :, None] + orbits[..., None, None] * np.stack([np.cos(turned), np.sin(turned)], -1)
    wrapping, in_circles = (kind[:, None, None, None] for kind in (wraps, circles))
    centres = np.where(in_circles, circling, np.where(wrapping, straight, reflected))
    fixed = 0.5 + (starts[:, :, None] - 0.5 - pan[:, None]) * zoom[:, None, :, None]
    centres = np.where(still[..., None, None], fixed, centres)
    growth = draws.uniform(-_GROWTH, _GROWTH, things) * draws.chance(0.5, things)
    sizes = np.where(still[..., None], zoom[:, None], (1 + growth)[..., None] ** times)
    turning = draws.uniform(-_TURN, _TURN, things) * draws.chance(0.5, things) * ~still
    angles = draws.uniform(0.0, 2 * np.pi, things)[..., None] + turning[..., None] * times
    return Paths(
        np.where(wrapping, centres % 1.0, centres),
        np.diff(centres, axis=2),
        np.clip(radii[..., None] * sizes, _LEAST_RADIUS, _MOST_RADIUS),
        angles,
        wraps,
        still,
        pan,
        zoom,
    )


def _camera(draws: Draws, times: npt.NDArray[np.int64], plain: npt.NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
    """Pan (B, T, 2) and zoom (B, T); a quarter of the cameras that move also zoom."""
    moves, zooms = ~plain, draws.chance(0.25)
    pan = draws.uniform(-_PAN, _PAN, 2) * moves[:, None]
    zoom = 1 + draws.uniform(-_ZOOM, _ZOOM) * (moves & zooms)
    return pan[:, None] * times[:, None], zoom[:, None] ** times


def _triangle(x: Numbers) -> Numbers:
    """A triangle wave, 0 to 1 and back to 0 for x from 0 to 2: a straight path that is reflected at 0 and at 1."""
    return 1 - np.abs(1 - x % 2)
