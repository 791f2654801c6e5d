"""The still image of a clip: the mean or the median over its frames, which `model.subtract` takes from its pixels.

It is computed over the clip's own frames, so a tubelet's pixels then depend on the clip that it is in.

Shape legend: B clips, C = 3, T frames, r tubelets of a chunk.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Subtract = Literal["none", "mean", "median"]


def still_of(clips: Tensor, subtract: Subtract) -> Tensor | None:
    """uint8 clips (B, C, T, H, W) -> their still images (B, C, H, W) in fp32, on the clips' device; None for `none`.

    The median of an even number of frames is the lower of the two middle values.
    """
    if subtract == "median":
        return clips.median(dim=2).values.float()
    if subtract == "mean":
        total = torch.zeros_like(clips[:, :, 0], dtype=torch.float32)
        for frame in clips.unbind(2):  # This makes no fp32 copy of the clip. It is exact up to 65,000 frames.
            total += frame
        return total / clips.shape[2]
    return None


def still_of_tubelets(still: Tensor | None, span: slice, steps: int) -> Tensor | None:
    """(B, C, H, W) -> (r, C, H, W): the still image of each of the tubelets `span`, with `steps` of them in a clip."""
    if still is None:
        return None
    tubelets = torch.arange(span.start, span.stop, device=still.device)
    return still[tubelets.div(steps, rounding_mode="floor")]
