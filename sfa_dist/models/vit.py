"""The pre-LN transformer encoder that is both the spatial and the temporal encoder of ViViT.

Follows ViViT's official code (scenic, projects/vivit/model.py): learned positions that include the cls token, no
norm before the first block, a final LayerNorm, tanh-GELU, LayerNorm eps 1e-6, and a drop-path that drops a branch for
all frames of a clip at once and does not rescale the branches that it keeps.

Shape legend: R sequences, N tokens of a sequence without cls, L = N + 1 with cls, D width, h heads.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_dist.recipe.blocks.model import POSITION_STD

Pooling = Literal["cls", "gap", "attention"]
Positions = Literal["learned", "sincos"]
Gelu = Literal["tanh", "erf", "quick"]
GELU: Gelu = "tanh"  # As in the official code; the encoder of an image checkpoint may need another.
LAYER_NORM_EPS = 1e-6


def drop_branch(branch: Tensor, rate: float, per_clip: int) -> Tensor:
    """Zeroes a residual branch (R, L, D) for a random share `rate` of the clips, each of `per_clip` sequences.

    Kept branches are not divided by 1 - rate (scenic, `stochastic_droplayer`).
    """
    clips = branch.shape[0] // per_clip
    keep = torch.rand(clips, 1, 1, device=branch.device) >= rate
    return branch * keep.repeat_interleave(per_clip, dim=0).to(branch.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with biases, (R, L, D) -> (R, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        qkv = self.qkv(x).view(count, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (R, h, L, D/h)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(count, length, width))


class Mlp(nn.Module):
    """Linear, GELU, linear, (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int, gelu: Gelu = GELU) -> None:
        super().__init__()
        self.gelu = gelu
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(apply_gelu(self.fc1(x), self.gelu))


def apply_gelu(x: Tensor, kind: Gelu) -> Tensor:
    """GELU: its tanh approximation (flax), exact (`erf`, timm's default), or x sigmoid(1.702 x) (`quick`, CLIP)."""
    if kind == "quick":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if kind == "tanh" else "none")


class AttentionPool(nn.Module):
    """Tokens (R, L, D) -> one vector each, (R, D): the MAP head of big_vision's models/vit.py.

    A learned probe attends to all tokens, then comes an MLP with a residual: x + mlp(norm(x)). Tensors have the names
    of timm's AttentionPoolLatent.
    """

    def __init__(self, width: int, heads: int, mlp: int, gelu: Gelu = GELU, norm_eps: float = LAYER_NORM_EPS) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, mlp, gelu)

    def forward(self, tokens: Tensor) -> Tensor:
        """(R, L, D) -> (R, D)."""
        count, length, width = tokens.shape
        k, v = self.kv(tokens).view(count, length, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.q(self.latent).view(1, self.heads, 1, -1).expand(count, -1, -1, -1)  # One for all sequences.
        x = self.proj(F.scaled_dot_product_attention(q, k, v).reshape(count, width))
        return x + self.mlp(self.norm(x))


class TransformerBlock(nn.Module):
    """One pre-LN transformer block. LayerNorm computes its statistics in fp32 whatever the dtype of the input."""

    def __init__(
        self, width: int, heads: int, mlp: int, drop_path: float, gelu: Gelu = GELU, norm_eps: float = LAYER_NORM_EPS
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, mlp, gelu)

    def forward(self, x: Tensor, per_clip: int) -> Tensor:
        x = x + self._maybe_drop(self.attn(self.norm1(x)), per_clip)
        return x + self._maybe_drop(self.mlp(self.norm2(x)), per_clip)

    def _maybe_drop(self, branch: Tensor, per_clip: int) -> Tensor:
        if self.training and self.drop_path > 0:
            return drop_branch(branch, self.drop_path, per_clip)
        return branch


class Encoder(nn.Module):
    """A cls token (with `cls` pooling), positions, `depth` blocks, a final norm, and what pools the tokens.

    The rate of drop-path grows linearly from 0 in the first block to `drop_path` in the last.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        tokens: int,
        pooling: Pooling = "cls",
        drop_path: float = 0.0,
        gelu: Gelu = GELU,
        norm_eps: float = LAYER_NORM_EPS,
        positions: Positions = "learned",
    ) -> None:
        super().__init__()
        self.pooling, self.heads, self.gelu = pooling, heads, gelu
        if pooling == "cls":
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        if positions == "sincos" and width % 4:
            raise ValueError(f"model.positions: sincos needs a width that is a multiple of 4, not {width}")
        self.positions: Positions = positions
        table = torch.empty(1, tokens + (pooling == "cls"), width)
        if positions == "learned":
            self.pos_embed = nn.Parameter(table)
        else:  # It follows from the shape, so weights files do not hold it.
            self.register_buffer("pos_embed", table, persistent=False)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, mlp, rate, gelu, norm_eps) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        # In a list, whose entries are units of the engines, of activation checkpoints and of compilation, as blocks.
        pools = [AttentionPool(width, heads, mlp, gelu, norm_eps)] if pooling == "attention" else []
        self.attn_pool = nn.ModuleList(pools)

    def forward(self, x: Tensor, per_clip: int = 1) -> Tensor:
        """(R, N, D) -> normalised tokens (R, L, D), with L = N except for `cls`. A clip is `per_clip` sequences."""
        if self.pooling == "cls":
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        # Engines leave a buffer in fp32.
        x = x + (self.pos_embed if self.positions == "learned" else self.pos_embed.to(self.norm.weight.dtype))
        for block in self.blocks:
            x = block(x, per_clip)
        return self.norm(x)

    def pool(self, tokens: Tensor) -> Tensor:
        """(R, L, D) -> (R, D): the cls token, the mean over all tokens, or what attention gathers from them."""
        if self.pooling == "attention":
            return self.attn_pool[0](tokens)
        return tokens[..., 0, :] if self.pooling == "cls" else tokens.mean(dim=-2)


@torch.no_grad()
def init_encoder(encoder: Encoder, position_std: float = POSITION_STD) -> None:
    """Initialises an encoder as the official code does (scenic, projects/vivit/model.py).

    Xavier for each D -> D matrix, a cls token of zeros, and learned positions N(0, `position_std`), with the official
    code's 0.02 as the default. Fixed positions are computed. An attention pool starts as big_vision's: Xavier, its
    probe included.
    """
    if encoder.pooling == "cls":
        encoder.cls_token.zero_()
    if encoder.positions == "learned":
        encoder.pos_embed.normal_(std=position_std)
    else:
        encoder.pos_embed.copy_(sincos_positions(encoder.pos_embed.shape[1], encoder.pos_embed.shape[2]))
    for module in encoder.modules():
        if isinstance(module, Attention):
            for third in module.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(third)
            nn.init.xavier_uniform_(module.proj.weight)
            module.qkv.bias.zero_()
            module.proj.bias.zero_()
        elif isinstance(module, AttentionPool):
            nn.init.xavier_uniform_(module.latent[0])
            for matrix in (module.q.weight, *module.kv.weight.chunk(2), module.proj.weight):
                nn.init.xavier_uniform_(matrix)
            for linear in (module.q, module.kv, module.proj):
                linear.bias.zero_()
        elif isinstance(module, Mlp):
            init_mlp(module)
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()


def sincos_positions(tokens: int, width: int) -> Tensor:
    """Fixed positions (1, tokens, width) of a square grid, after a zero for the cls token where there is one.

    A quarter of the width each is sine and cosine of the column, then of the row, at frequencies from 1 to 1/10000
    (MAE, arXiv 2111.06377).
    """
    side = math.isqrt(tokens)
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, D / 4)
    along = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    rows, columns = along[:, None].expand(-1, side, -1), along[None].expand(side, -1, -1)
    table = torch.cat([columns, rows], dim=2).reshape(1, side * side, width).float()
    return torch.cat([table.new_zeros(1, tokens - side * side, width), table], dim=1)


@torch.no_grad()
def init_mlp(mlp: Mlp) -> None:
    """Xavier matrices and biases N(0, 1e-6), as in flax's MlpBlock."""
    for linear in (mlp.fc1, mlp.fc2):
        nn.init.xavier_uniform_(linear.weight)
        linear.bias.normal_(std=1e-6)


@torch.no_grad()
def init_lecun_normal(weight: Tensor, fan_in: int) -> None:
    """Truncated normal with variance 1 / fan_in, flax's default for convolutions.

    0.8796 is the standard deviation of a unit normal cut at two deviations.
    """
    std = math.sqrt(1.0 / fan_in) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
