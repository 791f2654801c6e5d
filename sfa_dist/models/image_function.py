"""What no tensor tells of the model that it was trained in: GELU, epsilon, heads, pooling, and what becomes of the
pixels and of the pooled vectors.

Where a source tells them, they are compared with the recipe, and what differs is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.models.vit import GELU, LAYER_NORM_EPS, Gelu, apply_gelu
from sfa_dist.models.vivit import Trunk, dims_of
from sfa_dist.recipe.blocks import ModelBlock

Pixels = tuple[Sequence[float], Sequence[float]]  # Mean and standard deviation by channel, of pixels from 0 to 1.

# timm's tags of weights that Google's JAX code trained, with tanh, while timm's own forward has erf.
JAX_TAGS = re.compile(r"(augreg_|orig_|sam_)")
PIXELS_APART = 0.002  # People round 0.48145466 to 0.481.
EPS_APART = 1e-3  # Relative.


@dataclass(frozen=True)
class ImageFunction:
    """What the tensors of a trunk do not tell; None where the source does not tell it either."""

    gelu: tuple[Gelu, ...]  # One of these; the first is what it is called by.
    norm_eps: float
    heads: int
    pooling: str
    pixels: Pixels | None = None
    subtract: str = "none"
    positions: str = "learned"

    def refuse_other(self, trunk: Trunk, pixels: Pixels | None, source: str) -> None:
        """Raises RecipeError with the lines for the recipe, where the trunk would compute something else."""
        encoder = trunk.encoder
        model: dict[str, Any] = {}
        if encoder.gelu not in self.gelu:
            model["gelu"] = self.gelu[0]
        if abs(encoder.norm.eps - self.norm_eps) > EPS_APART * self.norm_eps:
            model["norm_eps"] = f"{self.norm_eps:.1e}"
        if encoder.heads != self.heads:
            model["heads"] = self.heads
        if encoder.pooling != self.pooling:
            model["pooling"] = self.pooling
        if encoder.positions != self.positions:
            model["positions"] = self.positions
        if trunk.subtract != self.subtract:
            model["subtract"] = self.subtract
        data = {}
        for name, own, given in zip(("mean", "std"), self.pixels or ((), ()), pixels or ((), ()), strict=True):
            if own and given and any(abs(a - b) > PIXELS_APART for a, b in zip(own, given, strict=True)):
                data[name] = [round(value, 4) for value in own]
        _refuse_differences(source, model, data)


def _refuse_differences(source: str, model: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Raises RecipeError where one of the blocks has a key that has to be another."""
    blocks = [f"{block}: {_braces(keys)}" for block, keys in (("model", model), ("data", data)) if keys]
    if blocks:
        raise RecipeError(
            f"weights from {source} are of another function than the recipe's; "
            f"put their values into the recipe: {' and '.join(blocks)} (docs/weights.md)"
        )


def _braces(keys: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in keys.items()) + "}"


def function_of_timm(model: nn.Module, name: str) -> ImageFunction:
    """Of a model of timm, which may be on the meta device. Raises RecipeError for what is no plain ViT."""
    from timm.layers import Attention, Mlp
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(model) is not VisionTransformer:
        raise _other(name, f"it is a {type(model).__name__}")
    blocks: list[Any] = list(model.blocks)
    for wanted, found in ((Block, blocks), (Mlp, [b.mlp for b in blocks]), (Attention, [b.attn for b in blocks])):
        odd = next((type(each).__name__ for each in found if type(each) is not wanted), None)
        if odd is not None:
            raise _other(name, f"its blocks have a {odd}")
    if not isinstance(model.fc_norm, nn.Identity):
        raise refuse_pooled_norm(name)
    norms = [model.norm, *(norm for b in blocks for norm in (b.norm1, b.norm2))]
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms) or len({norm.eps for norm in norms}) > 1:
        raise _other(name, "its norms are not LayerNorm of one eps")
    config: Any = getattr(model, "pretrained_cfg", {})
    gelu = _gelu_of(blocks[0].mlp.act, name)
    by_jax = gelu == "erf" and JAX_TAGS.match(str(config.get("tag") or ""))
    pixels = (config["mean"], config["std"]) if config.get("mean") and config.get("std") else None
    pooling = {"token": "cls", "": "cls", "avg": "gap"}.get(model.global_pool)
    if pooling is None or (pooling == "gap" and model.cls_token is not None):
        with_cls = ", with a cls token beside" if model.cls_token is not None else ""
        raise _other(name, f"it pools its tokens by {model.global_pool!r}{with_cls}")
    return ImageFunction(
        ("tanh", "erf") if by_jax else (gelu,), norms[0].eps, blocks[0].attn.num_heads, pooling, pixels
    )


def _gelu_of(act: Callable[[torch.Tensor], torch.Tensor], name: str) -> Gelu:
    """By what it computes: timm has a handful of classes for each."""
    x = torch.linspace(-4, 4, 65)
    kinds: tuple[Gelu, ...] = ("tanh", "erf", "quick")
    for kind in kinds:
        if torch.allclose(act(x), apply_gelu(x, kind), rtol=0, atol=1e-5):
            return kind
    raise _other(name, f"its activation is {type(act).__name__}")


def _other(name: str, why: str) -> RecipeError:
    return RecipeError(f"{name} is not the image ViT that a trunk is: {why}; take a plain ViT (docs/weights.md)")


def refuse_pooled_norm(source: str) -> RecipeError:
    """The error for weights whose last norm comes after the mean over the tokens."""
    return RecipeError(
        f"{source} averages its tokens first and normalises their mean (fc_norm), while a trunk normalises each token "
        f"(norm): it would compute another function; take weights that were trained with `norm` (docs/weights.md)"
    )


def function_of_own(path: Path) -> ImageFunction | None:
    """Of a weights file of one of our stages, by its metadata; None where it has none. Raises CheckpointError."""
    told = _told_by(path)
    if told is None:
        return None
    model, pixels = told
    gelu, eps = model.gelu or GELU, model.norm_eps or LAYER_NORM_EPS
    return ImageFunction((gelu,), eps, dims_of(model).heads, model.pooling, pixels, model.subtract, model.positions)


def refuse_other_centring(model: ModelBlock, path: Path) -> None:
    """Raises RecipeError where the tail in a weights file of one of our stages was trained on vectors that `model` does
    not centre, or centres and they were not; CheckpointError as `function_of_own`."""
    told = _told_by(path)
    if told is not None and told[0].centre != model.centre:
        _refuse_differences(str(path), {"centre": str(told[0].centre).lower()}, {})


def _told_by(path: Path) -> tuple[ModelBlock, Pixels | None] | None:
    """The model and the pixel statistics in the metadata of a weights file, None where it tells no model."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if "model" not in metadata:
            return None
        model = ModelBlock.model_validate(json.loads(metadata["model"]))
        pixels = json.loads(metadata.get("pixels", "null"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"the metadata of {path} does not tell what model it is of") from error
    return model, tuple(pixels) if pixels else None


def timm_config_beside(path: Path) -> Path | None:
    """The folder of a weights file, where it holds the config.json that timm's weights are published with."""
    file = path.parent / "config.json"
    try:
        with file.open("rb") as stream:
            config = json.loads(stream.read(1 << 20))
    except (OSError, ValueError, RecursionError):
        return None  # Another program's: the file's own names of tensors decide.
    return path.parent if isinstance(config, dict) and isinstance(config.get("architecture"), str) else None
