"""The shapes of things: ellipses, boxes, rings and bent strokes like those of handwriting, with soft edges.

A shape is a signed distance in the thing's own coordinates, in which its radius is 1; it is negative inside.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sfa_dist.data.motion.draws import Draws, tensor

KINDS = 4  # Ellipses, boxes, rings, strokes.
_POINTS = 5  # Points of a stroke.
_LEAST = 1e-6


class Shapes:
    """The shapes of B clips with N things each."""

    def __init__(self, draws: Draws, things: int) -> None:
        kinds = np.floor(draws.uniform(0.0, KINDS, things)).astype(np.int64)
        self.kinds = torch.from_numpy(kinds)
        self.aspects = tensor(draws.uniform(0.45, 1.0, things))
        self.widths = tensor(draws.uniform(0.2, 0.4, things))  # Of strokes and rings.
        angles, lengths = draws.uniform(0.0, 2 * np.pi, things, _POINTS), draws.uniform(0.3, 0.9, things, _POINTS)
        points = lengths[..., None] * np.stack([np.cos(angles), np.sin(angles)], -1)
        self.points = tensor(points - points.mean(axis=2, keepdims=True))

    def cover(self, x: Tensor, y: Tensor, radii: Tensor) -> Tensor:
        """The fraction of each pixel that a thing covers, (B, N, T, H, W).

        `x` and `y` are the pixels' positions in the thing's own coordinates, `radii` (B, N, T) its radius in pixels.
        """
        aspects, widths = self.aspects[..., None, None, None], self.widths[..., None, None, None]
        long_y = y / aspects
        ellipse = ((x * x + long_y * long_y).sqrt() - 1) * aspects
        box = torch.maximum(x.abs() - 0.85, y.abs() - 0.85 * aspects)
        ring = ((x * x + y * y).sqrt() - 0.8).abs() - widths * 0.6
        stroke = self._from_points(x, y) - widths
        kinds = self.kinds[..., None, None, None]
        distance = torch.where(kinds == 0, ellipse, torch.where(kinds == 1, box, torch.where(kinds == 2, ring, stroke)))
        return (0.5 - distance * radii[..., None, None]).clamp(0, 1)

    def _from_points(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance to the nearest segment of the stroke."""
        nearest = torch.full_like(x, torch.inf)
        for first, second in zip(self.points.unbind(2)[:-1], self.points.unbind(2)[1:], strict=True):
            ax, ay = (value[..., None, None, None] for value in first.unbind(-1))
            bx, by = (value[..., None, None, None] for value in (second - first).unbind(-1))
            dx, dy = x - ax, y - ay
            along = ((dx * bx + dy * by) / (bx * bx + by * by + _LEAST)).clamp(0, 1)
            dx, dy = dx - along * bx, dy - along * by
            nearest = torch.minimum(nearest, dx * dx + dy * dy)
        return nearest.sqrt()
