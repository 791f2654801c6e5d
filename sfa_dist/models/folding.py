"""The tubelet embedding of a frozen trunk with the pixels' normalisation folded into its weights: it takes uint8.

    W ((x / 255 - mean) / std) + b  =  W' (x - 128) + b'
    W' = W / (255 std)              b' = b + sum over the voxels of W (128 / 255 - mean) / std

Every x - 128 is a whole number from -128 to 127, which bf16 holds exactly, so the pixels are not rounded. Without the
shift the products would be larger and mostly cancel against b', and the rounding of W' to bf16 would count twice.
The folded weights are derived from the trunk's own: they are never saved, and the trunk's hash leaves them out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_dist.models.vivit import TubeletEmbed

SHIFT = 128


class FoldedEmbed(nn.Module):
    """Normalises by `mean` and `std`, then embeds as `embed` does: uint8 (R, C, t, H, W) -> tokens (R, N, D).

    The weights and tokens have the dtype of `embed`'s weights; the folding is computed in fp32.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, embed: TubeletEmbed, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self._patches = embed.patches
        own = embed.weight.detach()
        weight = own.float()  # (D, C, t, p, p)
        scale = torch.tensor(std).mul(255.0).view(1, -1, 1, 1, 1)
        centre = torch.tensor([SHIFT / 255.0 - m for m in mean]).div(torch.tensor(std)).view(1, -1, 1, 1, 1)
        bias = embed.bias.detach().float() + (weight * centre.to(own.device)).sum(dim=(1, 2, 3, 4))
        folded = (weight / scale.to(own.device)).to(own.dtype)
        self.register_buffer("weight", folded.flatten(1), persistent=False)
        self.register_buffer("bias", bias.to(own.dtype), persistent=False)

    def forward(self, tubelets: Tensor) -> Tensor:
        """uint8 (R, C, t, H, W) -> (R, N, D)."""
        return F.linear(self._patches(tubelets).to(self.weight.dtype).sub_(SHIFT), self.weight, self.bias)
