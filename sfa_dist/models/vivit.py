"""ViViT with a factorised encoder, cut into trunk and tail.

    clip (B, C, T, H, W) uint8
      -> normalise -> tubelet embedding -> spatial encoder            Trunk:  what stage 2 freezes
         (after `model.subtract`, where the recipe sets it)
      -> pooled (B, F, D), or tokens (B, F, L, D)
      -> adapter -> temporal encoder -> head -> logits (B, classes)   Tail:   what stage 2 trains

In stage 1 the engine trains `ViViT` (trunk and tail), in stage 2 `Tail` alone.

Shape legend: B clips, C = 3, T frames, t tubelet, F = T / t tubelet steps, R = B * F tubelets, N patches, L tokens,
D width.
Source: "ViViT" (arXiv 2103.15691), model 2; scenic projects/vivit/model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_dist.models.adapter import Adapter
from sfa_dist.models.chunked import ChunkedFeatures
from sfa_dist.models.still import still_of, still_of_tubelets
from sfa_dist.models.vit import GELU, LAYER_NORM_EPS, Encoder, init_encoder, init_lecun_normal
from sfa_dist.recipe.blocks import AdapterBlock, ModelBlock


@dataclass(frozen=True)
class Dims:
    """Width D, spatial depth, attention heads, MLP width and patch side in pixels of a model size."""

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int


SIZES = {
    "tiny": Dims(96, 4, 3, 384, 8),
    "B": Dims(768, 12, 12, 3072, 16),
    "L": Dims(1024, 24, 16, 4096, 16),
    "H": Dims(1280, 32, 16, 5120, 14),
    "g": Dims(1408, 40, 16, 6144, 14),
}


def dims_of(model: ModelBlock) -> Dims:
    """The dimensions of a recipe's model: those of its size, overridden where the recipe sets them."""
    base = SIZES[model.size]
    return Dims(
        width=model.width or base.width,
        depth=model.depth or base.depth,
        heads=model.heads or base.heads,
        mlp=model.mlp or base.mlp,
        patch=model.patch or base.patch,
    )


def normalise(
    clips: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, still: Tensor | None = None
) -> Tensor:
    """uint8 pixels (R, C, ...) -> (x / 255 - mean) / std in `dtype`, computed in fp32.

    With still images (R, C, H, W) for tubelets (R, C, t, H, W), it is the difference of both, normalised:
    (x - still) / 255 / std, where the mean cancels out.
    """
    x = clips.float()
    if still is not None:
        x.sub_(still.unsqueeze(2))
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        x[:, channel].mul_(1.0 / (255.0 * s))
        if still is None:
            x[:, channel].sub_(m / s)
    return x.to(dtype)


class TubeletEmbed(nn.Module):
    """Embeds non-overlapping t x p x p tubelets as tokens. `weight` has the layout of a Conv3d, (D, C, t, p, p).

    The stride is the size of the kernel, so this is one matrix product over unfolded patches, which is faster than a 3D
    convolution.
    """

    def __init__(self, width: int, tubelet: int, patch: int) -> None:
        super().__init__()
        self.tubelet, self.patch = tubelet, patch
        self.weight = nn.Parameter(torch.empty(width, 3, tubelet, patch, patch))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, t, H, W) -> (R, N, D)."""
        return F.linear(self.patches(x), self.weight.flatten(1), self.bias)

    def patches(self, x: Tensor) -> Tensor:
        """(R, C, t, H, W) -> (R, N, C t p p): the voxels of each tubelet, in the order of the weights."""
        count, channels, tubelet, height, width = x.shape
        p = self.patch
        patches = x.view(count, channels, tubelet, height // p, p, width // p, p)
        return patches.permute(0, 3, 5, 1, 2, 4, 6).reshape(count, (height // p) * (width // p), -1)


class Trunk(nn.Module):
    """Tubelet embedding and spatial encoder. Each tubelet step is encoded by itself.

    Raises ValueError for an image size that is not a multiple of the patch.
    """

    def __init__(self, model: ModelBlock) -> None:
        super().__init__()
        dims = dims_of(model)
        if model.image_size % dims.patch:
            raise ValueError(f"model.image_size {model.image_size} is not a multiple of the patch {dims.patch}")
        self.tubelet = model.tubelet
        self.width = dims.width
        self.position_std, self.subtract = model.position_std, model.subtract
        self.tubelet_init = model.tubelet_init
        # Whether the recipe states what a weights file may not say.
        self.function_is_stated = model.gelu is not None and model.norm_eps is not None
        self.embed = TubeletEmbed(dims.width, model.tubelet, dims.patch)
        tokens = (model.image_size // dims.patch) ** 2
        self.encoder = Encoder(
            dims.width,
            dims.depth,
            dims.heads,
            dims.mlp,
            tokens,
            model.pooling,
            drop_path=model.drop_path,
            gelu=model.gelu or GELU,
            norm_eps=model.norm_eps or LAYER_NORM_EPS,
            positions=model.positions,
        )

    @property
    def tokens(self) -> int:
        """L, the number of tokens that the encoder outputs for one tubelet step."""
        return self.encoder.pos_embed.shape[1]

    def cut_tubelets(self, clips: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B * F, C, t, H, W): the tubelets of each clip in turn."""
        clips = clips.unflatten(2, (-1, self.tubelet))
        return clips.permute(0, 2, 1, 3, 4, 5).flatten(0, 1)

    def forward_tubelets(self, tubelets: Tensor, tubelets_per_clip: int = 1, pooled: bool = True) -> Tensor:
        """Normalised tubelets (R, C, t, H, W) -> (R, D), or tokens (R, L, D)."""
        tokens = self.encoder(self.embed(tubelets), tubelets_per_clip)
        return self.encoder.pool(tokens) if pooled else tokens

    def init_weights(self) -> None:
        """Random weights, as in scenic, with positions N(0, `model.position_std`), and `model.tubelet_init`."""
        init_lecun_normal(self.embed.weight, fan_in=self.embed.weight[0].numel())
        if self.tubelet_init == "difference":
            init_differences(self.embed.weight)
        nn.init.zeros_(self.embed.bias)
        init_encoder(self.encoder, self.position_std)


@torch.no_grad()
def init_differences(kernel: Tensor) -> None:
    """Makes the first half of the filters (D, C, t, p, p) differences of two frames.

    They are w at frame t // 2, -w at the one before, and zero elsewhere; w keeps the variance of the outputs.
    """
    half, tubelet = kernel[: len(kernel) // 2], kernel.shape[2]
    later = half[:, :, tubelet // 2] * (tubelet / 2) ** 0.5
    half.zero_()
    half[:, :, tubelet // 2] = later
    half[:, :, tubelet // 2 - 1] = -later


class Tail(nn.Module):
    """Adapter (optional), temporal encoder and head. With a temporal depth of 0 the mean over time is the encoder.

    With `model.centre` the mean over a clip's tubelet steps is taken from its pooled vectors first.
    """

    def __init__(self, model: ModelBlock, frames: int, adapter: AdapterBlock | None = None) -> None:
        super().__init__()
        dims = dims_of(model)
        self.centre = model.centre
        self.adapter = (
            Adapter(dims.width, adapter.hidden, adapter.residual, adapter.placement, model.pooling) if adapter else None
        )
        steps = frames // model.tubelet
        self.temporal = (
            Encoder(
                dims.width, model.temporal_depth, dims.heads, dims.mlp, steps, model.pooling, drop_path=model.drop_path
            )
            if model.temporal_depth
            else None
        )
        self.head = nn.Linear(dims.width, model.classes)

    @property
    def takes_tokens(self) -> bool:
        """Whether the tail takes all tokens (B, F, L, D) instead of pooled vectors (B, F, D)."""
        return self.adapter is not None and self.adapter.placement == "tokens"

    def forward(self, features: Tensor | ChunkedFeatures) -> Tensor:
        """Pooled (B, F, D) or tokens (B, F, L, D) in any float dtype -> logits (B, classes) in fp32.

        Tokens may be held outside the device: the adapter then takes them chunk by chunk. Raises TypeError for chunks
        where no adapter takes tokens.
        """
        return self.over_time(self.adapted(features))

    def adapted(self, features: Tensor | ChunkedFeatures) -> Tensor:
        """The input of the temporal encoder, (B, F, D). Each tubelet step is taken by itself, except for centring.

        Raises as `forward`.
        """
        if isinstance(features, Tensor):
            x = centred(features) if self.centre else features
            x = x.to(self.head.bias.dtype)
            return x if self.adapter is None else self.adapter(x)
        if self.adapter is None or not self.takes_tokens:
            raise TypeError("features in chunks are for an adapter on tokens")
        return self.adapter.over_chunks(features)

    def over_time(self, x: Tensor) -> Tensor:
        """Adapted steps (B, F, D) -> logits (B, classes) in fp32."""
        x = x.mean(dim=1) if self.temporal is None else self.temporal.pool(self.temporal(x))
        return self.head(x).float()

    def init_weights(self) -> None:
        """A random temporal encoder, a head of zeros, an adapter that is the identity."""
        if self.adapter is not None:
            self.adapter.init_weights()
        if self.temporal is not None:
            init_encoder(self.temporal)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


def centred(features: Tensor) -> Tensor:
    """Pooled vectors (B, F, D) -> in fp32, with the mean over each clip's steps taken from them."""
    x = features.float()
    return x - x.mean(dim=1, keepdim=True)


class ViViT(nn.Module):
    """Trunk and tail end to end, as stage 1 trains them."""

    def __init__(
        self,
        model: ModelBlock,
        frames: int,
        adapter: AdapterBlock | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        self.trunk = Trunk(model)
        self.tail = Tail(model, frames, adapter)

    def forward(self, clips: Tensor) -> Tensor:
        """uint8 clips (B, C, T, H, W) -> logits (B, classes) in fp32."""
        batch, steps = clips.shape[0], clips.shape[2] // self.trunk.tubelet
        still = still_of_tubelets(still_of(clips, self.trunk.subtract), slice(0, batch * steps), steps)
        tubelets = normalise(self.trunk.cut_tubelets(clips), self.mean, self.std, self.trunk.embed.bias.dtype, still)
        features = self.trunk.forward_tubelets(tubelets, steps, pooled=not self.tail.takes_tokens)
        return self.tail(features.unflatten(0, (batch, steps)))

    def init_weights(self) -> None:
        """Random weights for both parts, from torch's global generator."""
        self.trunk.init_weights()
        self.tail.init_weights()


def build(module: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Gives a module that was built on the meta device storage and random weights; returns the module.

    Memory is filled with NaN first, so that a weight which is never initialised shows in the first loss.
    """
    module.to_empty(device=device)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.fill_(float("nan"))
    module.init_weights()  # type: ignore[operator]
    return module
