"""Every key of a recipe says by its type whether a run may go on with another value of it."""

from __future__ import annotations

from typing import Any

import pytest

from sfa_dist.recipe.blocks import RecipeBlock
from sfa_dist.recipe.blocks.base import Fixed, Mark, free_keys, key_marks
from sfa_dist.recipe.schema import STAGE_NAMES, Recipe
from sfa_dist.recipe.stages import FREE_KEYS, ImageStage, Stage1, Stage2
from sfa_dist.run.record import flatten, stage_inputs

STAGES = (ImageStage, Stage1, Stage2)

# What run directories of 0.3 leave out of the inputs they compare, blocks with all that is in them.
FREE_IN_0_3 = (
    *("engine", "checkpoint", "deepspeed", "batch.micro", "batch.eval_micro", "data.workers", "data.train", "data.val"),
    *("data.test", "data.remote", "data.decoder", "data.max_bad_fraction", "data.limits.decoded_mib"),
    *("data.limits.seconds", "schedule.max_steps", "chunk_frames", "offload", "overlap", "compile", "activation"),
    *("activation_backend", "cache.dir", "weights", "image_checkpoint"),
)
FREE_SINCE: tuple[str, ...] = ()  # Keys that came later: a new `Free` one is added here.


# No stage can have all of them: fixed positions have no scale, and a cache refuses `subtract`.
MOTION_KEYS = {"position_std", "positions", "subtract", "centre", "tubelet_init"}
MOTION: dict[str, dict[str, Any]] = {
    "image": {"position_std": 0.5, "subtract": "mean"},
    "stage1": {"positions": "sincos", "subtract": "mean", "centre": True, "tubelet_init": "difference"},
    "stage2": {"position_std": 0.5, "centre": True},
}


def is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_IN_0_3 + FREE_SINCE)


def test_every_key_is_marked_once() -> None:
    undecided = [key for key, marks in key_marks(Recipe).items() if len(marks) != 1]
    assert undecided == [], "say Fixed[...] or Free[...] of each key"


def test_a_key_without_a_mark_is_seen() -> None:
    class Inner(RecipeBlock):
        new: int = 0

    class Outer(RecipeBlock):
        inner: Inner | None = None
        known: Fixed[int | None] = None

    assert key_marks(Outer) == {"inner.new": (), "known": (Mark.FIXED,)}
    assert free_keys(Outer) == frozenset()


@pytest.mark.parametrize("stage", STAGES)
def test_the_free_keys_are_those_of_0_3_and_the_later_ones(stage: type[RecipeBlock]) -> None:
    assert free_keys(stage) == {key for key in key_marks(stage) if is_free(key)}


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_a_stage_is_made_from_its_fixed_keys(name: str) -> None:
    """With blocks that are null by default, and a block of free keys of any depth."""
    settings: dict[str, Any] = {
        "frames": 8,
        "model": {"size": "tiny", "classes": 5, "gelu": "erf", "norm_eps": 1e-5, **MOTION[name]},
        "data": {"resize": 128, "decode_device": "cuda", "workers": 0},
        "augment": {"resize": "antialias"},
        "optimizer": {"lr": 0.1},
        "schedule": {"epochs": 1},
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 1}},
    }
    own: dict[str, Any] = {"cache": {"views": 1}, "trunk_precision": "int8"} if name == "stage2" else {}
    before = {"stage1": settings} if name == "stage2" else {}
    recipe = Recipe.model_validate({"name": "marks", **before, name: {**settings, **own}})
    made = getattr(recipe, name)
    added = {"seed", "train clips (sha256)", "starting weights (sha256)"}
    kept = {key for key in flatten(made.model_dump(mode="json")) if not is_free(key)}
    official = {f"model.{key}" for key in MOTION_KEYS - MOTION[name].keys()}
    left_out = official | {"seed", "freeze_trunk"}  # A default that older runs did not record; a cache needs it.
    assert set(stage_inputs(recipe, made, "a", "b")) == (kept - left_out) | added
    assert not FREE_KEYS & kept
