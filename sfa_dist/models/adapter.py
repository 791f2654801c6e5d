"""The adapter between spatial and temporal encoder: "a two layer MLP" (SFA, section 3.2, equation 2).

It starts as the identity (a residual and a last layer of zeros), so that stage 2 begins as the function of stage 1.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sfa_dist.models.chunked import ChunkedFeatures, Recompute, over_chunks
from sfa_dist.models.vit import Pooling

Placement = Literal["pooled", "tokens"]


class Adapter(nn.Module):
    """x + W2 gelu(W1 x), where `hidden` is the width of W1 as a multiple of D.

    `pooled` takes the one vector of each tubelet step. `tokens` takes every token of the spatial encoder and adds the
    mean of its outputs to the pooled vector, so that it can weigh regions of the image; without a residual its output
    is that mean alone. (An MLP on the cls token alone would be the pooled adapter again.)
    """

    def __init__(self, width: int, hidden: float, residual: bool, placement: Placement, pooling: Pooling) -> None:
        super().__init__()
        self.residual, self.placement, self.pooling = residual, placement, pooling
        self.recompute: Recompute = "function"
        inner = max(1, round(width * hidden))
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled (..., D) or tokens (..., L, D) -> (..., D)."""
        change = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        if self.placement == "tokens":
            change = change.mean(dim=-2)
            x = x[..., 0, :] if self.pooling == "cls" else x.mean(dim=-2)
        return x + change if self.residual else change

    def over_chunks(self, features: ChunkedFeatures) -> Tensor:
        """Tokens (R, L, D) in chunks -> (B, F, D). `recompute` sets how backward gets them again."""
        dtype = self.fc1.bias.dtype
        return over_chunks(lambda x: self(x.to(dtype)), features, tuple(self.parameters()), self.recompute)

    def init_weights(self) -> None:
        """Xavier weights and zero biases. With a residual the last layer is zero: the adapter is the identity."""
        nn.init.xavier_uniform_(self.fc1.weight)
        nn.init.zeros_(self.fc1.bias)
        if self.residual:
            nn.init.zeros_(self.fc2.weight)
        else:
            nn.init.xavier_uniform_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)
