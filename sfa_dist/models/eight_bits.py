"""The linear layers of a frozen trunk's blocks in eight bits.

Nothing else changes: norms, attention, positions, the patch embedding, attention pooling and the features stay in bf16.

    int8   y = (x W8) s + b       the weights only, with one symmetric scale s for each output channel; the product is
                                  in the dtype of x, which holds every int8 exactly
    fp8    y = (x8 W8) sx s + b   weights as above, in e4m3; x is rounded to e4m3 with one scale sx for each token

int8 halves the memory of the weights and runs anywhere; it saves no arithmetic. fp8 needs a card with fp8 units. An
int8 scale is rounded to the dtype of x before the weights are divided by it, so that the same number multiplies.

Shape legend: R tokens, I input width, O output width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_dist.errors import RecipeError
from sfa_dist.models.vivit import Trunk

EightBits = Literal["int8", "fp8"]
FP8 = torch.float8_e4m3fn
LARGEST_INT8, LARGEST_FP8 = 127.0, torch.finfo(FP8).max
FP8_MULTIPLE = 16  # Both widths must be multiples of it: the matrix units require that.
SMALLEST_SCALE = 1e-12  # For a channel of zeros.


class Int8Linear(nn.Module):
    """A linear layer whose weights (O, I) are int8; `scale` (O,) has the original layer's dtype."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        own = linear.weight.detach()
        largest = own.float().abs().amax(dim=1)
        scale = (largest / LARGEST_INT8).clamp(min=SMALLEST_SCALE).to(own.dtype)
        rounded = (own.float() / scale.float().unsqueeze(1)).round().clamp(-LARGEST_INT8, LARGEST_INT8)
        self.weight = nn.Parameter(rounded.to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return torch.addcmul(self.bias, F.linear(x, self.weight.to(x.dtype)), self.scale)


class Fp8Linear(nn.Module):
    """A linear layer that multiplies in e4m3; weights (O, I), `scale` (1, O) in fp32."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = to_fp8(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale.t().contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) in bf16 -> (..., O) in bf16."""
        tokens, scale = to_fp8(x.flatten(0, -2))
        out = torch._scaled_mm(
            tokens, self.weight.t(), scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=x.dtype
        )
        return out.unflatten(0, x.shape[:-1])


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (R, I) in e4m3, and the scale of each of its rows, (R, 1), in fp32."""
    wide = x.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST_FP8).clamp(min=SMALLEST_SCALE)
    return (wide / scale).to(FP8), scale


def to_eight_bits(trunk: Trunk, kind: EightBits) -> None:
    """Replaces the linear layers of the trunk's blocks in place, one at a time.

    Raises RecipeError for widths that fp8 units do not take.
    """
    make = Int8Linear if kind == "int8" else Fp8Linear
    for parent in list(trunk.encoder.blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                if kind == "fp8" and (child.in_features % FP8_MULTIPLE or child.out_features % FP8_MULTIPLE):
                    raise RecipeError(
                        f"stage2.trunk_precision: fp8 needs widths that are multiples of {FP8_MULTIPLE}, but the model "
                        f"has a linear layer from {child.in_features} to {child.out_features}: use int8 or bf16"
                    )
                setattr(parent, name, make(child))
