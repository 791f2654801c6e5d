"""Weights that were trained on what moves do not load into a model of whole pixels or vectors, nor the other way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sfa_dist.errors import RecipeError
from sfa_dist.models.image_vit import load_image_vit
from sfa_dist.models.vivit import ViViT, build
from sfa_dist.recipe.schema import Stage1, Stage2
from sfa_dist.stages.assemble import assemble_stage2, load_for_test, load_tail_for_test

MODEL = {"size": "tiny", "classes": 3, "temporal_depth": 1, "image_size": 16, "width": 24, "depth": 1, "mlp": 32}
STAGE = {"frames": 8, "optimizer": {"lr": 0.1}, "schedule": {"epochs": 1}, "engine": {"precision": "fp32"}}
DATA: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3}
NONE: dict[str, Any] = {}
KEYS = [
    ({"subtract": "mean"}, "subtract: mean"),
    ({"centre": True}, "centre: true"),
    ({"positions": "sincos"}, "positions: sincos"),
    ({"pooling": "attention"}, "pooling: attention"),
]


def stage1(**keys: Any) -> Stage1:
    return Stage1.model_validate({**STAGE, "model": {**MODEL, **keys}, "data": DATA})


def stage2(**keys: Any) -> Stage2:
    return Stage2.model_validate({**STAGE, "model": {**MODEL, **keys}, "data": DATA})


def trained(folder: Path, stage: Stage1, told: dict[str, Any] | None = None) -> Path:
    """A stage 1's weights, whose metadata tell the keys of its model, or `told` alone."""
    with torch.device("meta"):
        model = ViViT(stage.model, stage.frames)
    build(model)
    metadata = {"model": json.dumps(told or stage.model.model_dump())}
    save_file(model.state_dict(), folder / "weights.safetensors", metadata)
    return folder / "weights.safetensors"


@pytest.mark.parametrize(("keys", "line"), KEYS)
def test_stage_2_starts_at_stage_1s_function_or_not_at_all(tmp_path: Path, keys: dict[str, Any], line: str) -> None:
    weights = trained(tmp_path, stage1(**keys))
    assert assemble_stage2(stage2(**keys), weights, "").frozen
    with pytest.raises(RecipeError, match=f"put theirs into the recipe: model: {{{line}}}"):
        assemble_stage2(stage2(), weights, "")
    plain = trained(tmp_path, stage1())
    with pytest.raises(RecipeError, match=r"model: {(subtract: none|centre: false|positions: learned|pooling: cls)}"):
        assemble_stage2(stage2(**keys), plain, "")


@pytest.mark.parametrize(("keys", "line"), KEYS)
def test_finished_weights_are_tested_as_they_were_trained(tmp_path: Path, keys: dict[str, Any], line: str) -> None:
    weights = trained(tmp_path, stage1(**keys))
    assert load_for_test(stage1(**keys), weights, None)
    with pytest.raises(RecipeError, match=line):
        load_for_test(stage1(), weights, None)


def test_a_tail_on_stored_features_is_too(tmp_path: Path) -> None:
    centred = assemble_stage2(stage2(centre=True), None, "", "hash").trainable
    weights = tmp_path / "tail.safetensors"
    metadata = {"model": json.dumps(stage2(centre=True).model.model_dump()), "trunk_sha256": "hash"}
    save_file({f"tail.{key}": value for key, value in centred.state_dict().items()}, weights, metadata)
    assert load_tail_for_test(stage2(centre=True), weights, "hash")
    with pytest.raises(RecipeError, match="centre: true"):
        load_tail_for_test(stage2(), weights, "hash")


def test_weights_of_before_mean_whole_pixels_and_vectors(tmp_path: Path) -> None:
    """Their metadata have neither key."""
    weights = trained(tmp_path, stage1(), told=MODEL)
    assert assemble_stage2(stage2(), weights, "").frozen
    for keys, _ in KEYS:
        with pytest.raises(RecipeError, match="trained with other settings"):
            assemble_stage2(stage2(**keys), weights, "")


def test_an_image_checkpoint_of_what_moves_is_one_of_a_trunk_alone(tmp_path: Path) -> None:
    """The trunk is taken, so its pixels have to be the same; the tail with its centring is not."""
    weights = trained(tmp_path, stage1(subtract="median", centre=True))
    with torch.device("meta"):
        plain, median = (ViViT(stage1(**keys).model, 8).trunk for keys in (NONE, {"subtract": "median"}))
    with pytest.raises(RecipeError, match="subtract: median"):
        load_image_vit(build(plain), str(weights), (DATA["mean"], DATA["std"]))  # type: ignore[arg-type]
    assert load_image_vit(build(median), str(weights)).text  # type: ignore[arg-type]
