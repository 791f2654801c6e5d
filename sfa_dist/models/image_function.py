"""What tensors do not say about the model they were trained in: GELU, epsilon, heads, pooling, positions, and what is
done to the pixels and to the pooled vectors.

Where their source says it, it is compared with the recipe, and a difference is refused.
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

Pixels = tuple[Sequence[float], Sequence[float]]  # Mean and standard deviation of each channel, of pixels from 0 to 1.

# timm's tags of weights that Google's JAX code trained with tanh, although timm's own forward has erf.
JAX_TAGS = re.compile(r"(augreg_|orig_|sam_|(v2_)?webli)")
PIXELS_APART = 0.002  # Recipes round 0.48145466 to 0.481.
EPS_APART = 1e-3  # Relative.


@dataclass(frozen=True)
class ImageFunction:
    """What the tensors of a trunk do not say; `pixels` is None where their source does not say it either."""

    gelu: tuple[Gelu, ...]  # Any of these fits; the first is the one to recommend.
    norm_eps: float
    heads: int
    pooling: str
    pixels: Pixels | None = None
    subtract: str = "none"
    positions: str = "learned"

    def refuse_other(self, trunk: Trunk, pixels: Pixels | None, source: str) -> None:
        """Raises RecipeError, with the keys to set in the recipe, where `trunk` would compute another function."""
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
    """Raises RecipeError where a block has a key that the recipe has to set otherwise."""
    blocks = [f"{block}: {_braces(keys)}" for block, keys in (("model", model), ("data", data)) if keys]
    if blocks:
        raise RecipeError(
            f"weights from {source} were trained with other settings than the recipe's; "
            f"put theirs into the recipe: {' and '.join(blocks)} (docs/weights.md)"
        )


def _braces(keys: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in keys.items()) + "}"


def function_of_timm(model: nn.Module, name: str) -> ImageFunction:
    """The function of a timm model, which may be on the meta device. Raises RecipeError unless it is a plain ViT."""
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
        raise pooled_norm_error(name)
    norms = [model.norm, *(norm for b in blocks for norm in (b.norm1, b.norm2))]
    if model.global_pool == "map":
        norms.append(model.attn_pool.norm)
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms) or len({norm.eps for norm in norms}) > 1:
        raise _other(name, "its norms are not LayerNorm of one eps")
    config: Any = getattr(model, "pretrained_cfg", {})
    gelu = _gelu_of(blocks[0].mlp.act, name)
    by_jax = gelu == "erf" and JAX_TAGS.match(str(config.get("tag") or ""))
    pixels = (config["mean"], config["std"]) if config.get("mean") and config.get("std") else None
    pooling = {"token": "cls", "": "cls", "avg": "gap", "map": "attention"}.get(model.global_pool)
    if pooling is None or (pooling != "cls" and model.cls_token is not None):
        with_cls = " beside a cls token" if model.cls_token is not None else ""
        raise _other(name, f"it pools its tokens by {model.global_pool!r}{with_cls}")
    return ImageFunction(
        ("tanh", "erf") if by_jax else (gelu,), norms[0].eps, blocks[0].attn.num_heads, pooling, pixels
    )


def _gelu_of(act: Callable[[torch.Tensor], torch.Tensor], name: str) -> Gelu:
    """The GELU that `act` computes: timm has several classes for each. Raises RecipeError for another activation."""
    x = torch.linspace(-4, 4, 65)
    kinds: tuple[Gelu, ...] = ("tanh", "erf", "quick")
    for kind in kinds:
        if torch.allclose(act(x), apply_gelu(x, kind), rtol=0, atol=1e-5):
            return kind
    raise _other(name, f"its activation is {type(act).__name__}")


def _other(name: str, why: str) -> RecipeError:
    return RecipeError(f"{name} does not fit a trunk: {why}; take a plain ViT (docs/weights.md)")


def pooled_norm_error(source: str) -> RecipeError:
    """The error for weights whose final norm comes after the mean over the tokens."""
    return RecipeError(
        f"{source} averages its tokens first and normalises their mean (fc_norm), while a trunk normalises each token "
        f"(norm): it would compute another function; take weights that were trained with `norm` (docs/weights.md)"
    )


def function_of_own(path: Path) -> ImageFunction | None:
    """The function of weights that a stage has saved, by their metadata; None without any. Raises CheckpointError."""
    saved = _saved_settings(path)
    if saved is None:
        return None
    model, pixels = saved
    gelu, eps = model.gelu or GELU, model.norm_eps or LAYER_NORM_EPS
    return ImageFunction((gelu,), eps, dims_of(model).heads, model.pooling, pixels, model.subtract, model.positions)


def refuse_other_centring(model: ModelBlock, path: Path) -> None:
    """Checks that the tail in a stage's weights file was trained with the `model.centre` of `model`.

    Raises RecipeError where it was not, CheckpointError as `function_of_own`.
    """
    saved = _saved_settings(path)
    if saved is not None and saved[0].centre != model.centre:
        _refuse_differences(str(path), {"centre": str(saved[0].centre).lower()}, {})


def _saved_settings(path: Path) -> tuple[ModelBlock, Pixels | None] | None:
    """The model and the pixel statistics in the metadata of a stage's weights file; None where they have no model."""
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
        raise CheckpointError(f"the metadata of {path} does not describe its model") from error
    return model, tuple(pixels) if pixels else None


def timm_config_beside(path: Path) -> Path | None:
    """The folder of a weights file, where it holds a config.json as published with timm's weights; else None."""
    file = path.parent / "config.json"
    try:
        with file.open("rb") as stream:
            config = json.loads(stream.read(1 << 20))
    except (OSError, ValueError, RecursionError):
        return None  # Another program's file: the names of the tensors decide.
    return path.parent if isinstance(config, dict) and isinstance(config.get("architecture"), str) else None
