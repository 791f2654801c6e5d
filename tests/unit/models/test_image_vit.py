"""Image ViTs in a trunk: the same function as in timm, or refused with the lines for the recipe."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.models.image_function import ImageFunction, function_of_own, function_of_timm
from sfa_dist.models.image_vit import load_image_vit
from sfa_dist.models.vivit import Trunk, build
from sfa_dist.recipe.blocks import ModelBlock

DIMS = {"width": 48, "depth": 2, "heads": 3, "mlp": 96, "patch": 8}
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def trunk_for(**changes: Any) -> Trunk:
    with torch.device("meta"):
        trunk = Trunk(ModelBlock.model_validate({"size": "tiny", "classes": 2, "image_size": 32, **DIMS, **changes}))
    return build(trunk)  # type: ignore[return-value]


def image_vit(**changes: Any) -> Any:
    """A model of timm with weights that are all different, large enough for every part of it to matter."""
    torch.manual_seed(3)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2, num_classes=7, **changes
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def refuse_another(trunk: Trunk, function: ImageFunction, pixels: Any = HALF) -> str:
    with pytest.raises(RecipeError) as caught:
        function.refuse_other(trunk, pixels, "it")
    return str(caught.value)


NORM_5 = partial(nn.LayerNorm, eps=1e-5)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {"gelu": "erf"}),
        ({"act_layer": "gelu_tanh"}, {}),
        ({"act_layer": "quick_gelu"}, {"gelu": "quick"}),
        ({"norm_layer": NORM_5}, {"gelu": "erf", "norm_eps": 1e-5}),
        ({"init_values": 0.1}, {"gelu": "erf"}),
        ({"no_embed_class": True}, {"gelu": "erf"}),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, {"gelu": "erf", "pooling": "gap"}),
        (
            {"class_token": False, "global_pool": "map", "act_layer": "quick_gelu", "norm_layer": NORM_5},
            {"pooling": "attention", "gelu": "quick", "norm_eps": 1e-5},
        ),
    ],
    ids=[
        "erf",
        "tanh",
        "quick",
        "eps",
        "layer scale",
        "cls without position",
        "mean of normalised tokens",
        "attention",
    ],
)
def test_a_trunk_computes_what_timm_computes(tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    model = image_vit(**theirs)
    trunk = trunk_for(**ours)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    load_image_vit(trunk, str(tmp_path / "vit.safetensors"))
    function_of_timm(model, "it").refuse_other(trunk, None, "it")  # Knows it for the same.
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(image), pre_logits=True)
        given = trunk.forward_tubelets(torch.stack([torch.zeros_like(image), image], dim=2))
    torch.testing.assert_close(given, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "model: {gelu: erf}"),
        ({"act_layer": "quick_gelu", "norm_layer": NORM_5}, "model: {gelu: quick, norm_eps: 1.0e-05}"),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "model: {gelu: erf, pooling: gap}"),
        ({"class_token": False, "global_pool": "map"}, "model: {gelu: erf, pooling: attention}"),
    ],
)
def test_another_function_is_refused_with_the_lines_for_the_recipe(changes: dict[str, Any], line: str) -> None:
    assert line in refuse_another(trunk_for(), function_of_timm(image_vit(**changes), "it"))


def test_other_heads_and_pixels_are_refused() -> None:
    trunk = trunk_for()
    text = refuse_another(trunk, ImageFunction(("tanh",), 1e-6, 6, "cls", IMAGENET))
    assert "model: {heads: 6} and data: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}" in text
    rounded = ((0.481, 0.458, 0.408), (0.269, 0.261, 0.276))
    clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    ImageFunction(("tanh",), 1e-6, 3, "cls", clip).refuse_other(trunk, rounded, "it")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"global_pool": "avg"}, "fc_norm"),
        ({"global_pool": "avg", "class_token": False}, "fc_norm"),
        ({"fc_norm": True}, "fc_norm"),
    ],
)
def test_a_norm_after_the_mean_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    model = image_vit(**changes)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    for pooling in ("cls", "gap"):
        with pytest.raises(RecipeError, match=why):
            load_image_vit(trunk_for(pooling=pooling), str(tmp_path / "vit.safetensors"))
    with pytest.raises(RecipeError, match=why):
        function_of_timm(model, "it")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"block_fn": timm.models.vision_transformer.ResPostBlock}, "its blocks have a ResPostBlock"),
        ({"global_pool": "avg", "fc_norm": False}, "beside a cls token"),
        ({"global_pool": "map"}, "it pools its tokens by 'map' beside a cls token"),
        ({"global_pool": "max", "fc_norm": False}, "it pools its tokens by 'max'"),
        ({"act_layer": "silu"}, "its activation is SiLU"),
        ({"norm_layer": "rmsnorm"}, "its norms are not LayerNorm"),
    ],
)
def test_what_has_the_names_of_a_vit_and_is_none_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        function_of_timm(image_vit(**changes), "it")


def test_a_cls_token_is_not_dropped(tmp_path: Path) -> None:
    save_file(image_vit().state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(RecipeError, match=r"set model\.pooling: cls"):
        load_image_vit(trunk_for(pooling="gap"), str(tmp_path / "vit.safetensors"))


@pytest.mark.parametrize(
    ("own", "pooling", "wanted"),
    [
        ("map", "gap", "attention"),
        ("map", "cls", "attention"),
        ("avg", "attention", "gap"),
        ("token", "attention", "cls"),
    ],
)
def test_another_pooling_is_refused_by_its_key(tmp_path: Path, own: str, pooling: str, wanted: str) -> None:
    """Of a file that says nothing but its tensors."""
    model = image_vit(class_token=own == "token", global_pool=own, fc_norm=False)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(RecipeError, match=rf"set model\.pooling: {wanted}$"):
        load_image_vit(trunk_for(pooling=pooling), str(tmp_path / "vit.safetensors"))


def test_what_was_done_is_told(tmp_path: Path) -> None:
    save_file(image_vit(init_values=0.1).state_dict(), tmp_path / "vit.safetensors")
    loaded = load_image_vit(trunk_for(image_size=48), str(tmp_path / "vit.safetensors"), HALF)
    assert loaded.text.endswith(
        "loaded 30 tensors, resized positions 4x4 -> 6x6, multiplied 4 LayerScale tensors into the layers before them, "
        "left out head.bias, head.weight"
    )
    assert "model.gelu tanh, model.norm_eps 1e-06, 3 heads, data.mean [0.5, 0.5, 0.5]" in loaded.doubt
    stated = load_image_vit(trunk_for(gelu="erf", norm_eps=1e-6), str(tmp_path / "vit.safetensors"))
    assert (stated.doubt, "resized" in stated.text) == ("", False)


def test_the_config_beside_a_file_tells_its_function(tmp_path: Path) -> None:
    config = {"architecture": "deit_tiny_patch16_224", "num_classes": 5, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(timm.create_model("deit_tiny_patch16_224").state_dict(), tmp_path / "model.safetensors")
    size = {"image_size": 224, "width": 192, "depth": 12, "heads": 3, "mlp": 768, "patch": 16}
    with pytest.raises(RecipeError, match=r"model: {gelu: erf} and data: {mean: \[0.1, 0.2, 0.3\], std: \[0.229"):
        load_image_vit(trunk_for(**size), str(tmp_path / "model.safetensors"), HALF)
    right = ((0.1, 0.2, 0.3), IMAGENET[1])
    assert not load_image_vit(trunk_for(**size, gelu="erf"), str(tmp_path / "model.safetensors"), right).doubt


@pytest.mark.parametrize("content", ["[1]", "{", '{"architectures": ["ViTModel"]}', "[" * 100_000, ""])
def test_a_config_of_another_program_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    save_file(image_vit().state_dict(), tmp_path / "vit.safetensors")
    assert load_image_vit(trunk_for(), str(tmp_path / "vit.safetensors")).doubt


def test_weights_of_ours_tell_their_function(tmp_path: Path) -> None:
    trunk = trunk_for()
    model = {"size": "tiny", "classes": 2, "image_size": 32, **DIMS, "gelu": "erf"}
    state = {f"trunk.{key}": value for key, value in trunk.state_dict().items()}
    metadata = {"model": json.dumps(model), "pixels": json.dumps(IMAGENET)}
    save_file(state, tmp_path / "own.safetensors", metadata)
    with pytest.raises(RecipeError, match=r"model: {gelu: erf} and data: {mean: \[0.485"):
        load_image_vit(trunk, str(tmp_path / "own.safetensors"), HALF)
    save_file(state, tmp_path / "old.safetensors", {"model": json.dumps({**model, "gelu": None})})
    assert not load_image_vit(trunk, str(tmp_path / "old.safetensors"), HALF).doubt
    save_file(state, tmp_path / "odd.safetensors", {"model": "[]"})
    with pytest.raises(CheckpointError, match="does not describe its model"):
        function_of_own(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("name", "size", "pixels", "changes"),
    [
        ("vit_large_patch16_224.augreg_in21k", "L", HALF, {}),
        ("vit_huge_patch14_224.orig_in21k", "H", HALF, {}),
        ("vit_base_patch16_224.augreg_in21k", "B", HALF, {}),
        ("vit_base_patch16_siglip_224.webli", "B", HALF, {"pooling": "attention"}),
        ("vit_base_patch14_dinov2.lvd142m", "B", IMAGENET, {"patch": 14, "gelu": "erf"}),
    ],
)
def test_names_of_the_recipes_and_docs_are_of_our_function(name: str, size: str, pixels: Any, changes: Any) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        trunk = Trunk(ModelBlock.model_validate({"size": size, "classes": 2, **changes}))
    function_of_timm(model, name).refuse_other(trunk, pixels, name)


def test_without_network_a_name_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    size = {"image_size": 224, "width": 192, "depth": 12, "heads": 3, "mlp": 768, "patch": 16}
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"it does not answer.*timm:vit_tiny_patch16_224@FILE"):
        load_image_vit(trunk_for(**size), "timm:vit_tiny_patch16_224")
    assert time.monotonic() - started < 20  # Of the client's own retries there are 90 seconds.
    assert constants.HF_HUB_OFFLINE is False
