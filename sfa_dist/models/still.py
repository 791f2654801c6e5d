"""What does not move in a clip, to be taken away from its pixels (`model.subtract`).

Each clip has its own, over its own frames. So a tubelet step depends on the clip that it is in.

Shape legend: B clips, C = 3, T frames, t tubelet, F = T / t tubelet steps, R = B * F rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Subtract = Literal["none", "mean", "median"]


def still_of(clips: Tensor, subtract: Subtract) -> Tensor | None:
    """uint8 clips (B, C, T, H, W) -> fp32 pixels (B, C, H, W), each the mean or the median over the clip's frames, on
    the clips' device; None for `none`.

    The median of an even number of frames is the lower one of the two in the middle, which is a pixel of the clip.
    """
    if subtract == "median":
        return clips.median(dim=2).values.float()
    if subtract == "mean":
        total = torch.zeros_like(clips[:, :, 0], dtype=torch.float32)
        for frame in clips.unbind(2):  # Without a copy of the clip in fp32; exact up to 65,000 frames.
            total += frame
        return total / clips.shape[2]
    return None


def still_rows(still: Tensor | None, span: slice, steps: int) -> Tensor | None:
    """(B, C, H, W) -> (r, C, H, W) for rows `span` of clips of `steps` tubelet steps."""
    if still is None:
        return None
    rows = torch.arange(span.start, span.stop, device=still.device)
    return still[rows.div(steps, rounding_mode="floor")]
