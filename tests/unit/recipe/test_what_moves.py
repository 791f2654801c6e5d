"""Keys of the model that let it see motion are refused where they would leave nothing, or cannot be kept."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from sfa_dist.recipe.schema import Recipe

STAGE = {
    "frames": 8,
    "data": {"stride": 2},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "schedule": {"epochs": 1},
}


def recipe_of(first: dict[str, Any], second: dict[str, Any] | None = None, stage: str = "stage1", **own: Any) -> Recipe:
    """A stage with the keys `first` of its model, and a stage 2 with `second` and the keys `own`."""
    model = {"size": "tiny", "classes": 3}
    blocks: dict[str, Any] = {stage: {**STAGE, "model": {**model, **first}, **(own if second is None else {})}}
    if second is not None:
        blocks["stage2"] = {**STAGE, "model": {**model, **second}, **own}
    return Recipe.model_validate({"name": "moves", **blocks})


SUBTRACT, CENTRE, ATTENTION = {"subtract": "median"}, {"centre": True}, {"pooling": "attention"}
DIFFERENCE = {"tubelet_init": "difference"}


@pytest.mark.parametrize(
    ("first", "second", "own", "why"),
    [
        (
            SUBTRACT,
            SUBTRACT,
            {"cache": {"views": 2}},
            "holds the steps of whole videos.*cache: null, or model.subtract",
        ),
        (SUBTRACT, {}, {}, "model.subtract has to be the same in both"),
        (CENTRE, {}, {}, "model.centre has to be the same in both"),
        (CENTRE, CENTRE, {"adapter": {"placement": "tokens"}}, "model.centre works on pooled vectors"),
        (SUBTRACT, None, {"data": {"stride": 0}}, "leaves nothing of a static clip: set model.subtract: none"),
        (SUBTRACT | {"tubelet": 1}, None, {"frames": 1}, "leaves nothing of a static clip"),
        (CENTRE, None, {"data": {"stride": 0}}, "set model.centre: false"),
        (CENTRE, None, {"frames": 2}, "or of one tubelet step"),
        (ATTENTION, {"pooling": "gap"}, {}, "model.pooling has to be the same in both"),
        (ATTENTION, ATTENTION, {"adapter": {"placement": "tokens"}}, "model.pooling: attention pools them in the froz"),
        (DIFFERENCE | {"tubelet": 1}, None, {}, "difference needs two frames in a tubelet"),
        (DIFFERENCE, None, {"data": {"stride": 0}}, "of frames that differ"),
        (DIFFERENCE, None, {"image_checkpoint": "sfa:motion-tiny"}, "image_checkpoint gives the kernel"),
    ],
)
def test_refused(first: dict[str, Any], second: dict[str, Any] | None, own: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        recipe_of(first, second, **own)


def test_taken() -> None:
    """Centring works on stored features and without an adapter, and a subtraction with an adapter on tokens."""
    assert recipe_of(CENTRE, CENTRE, cache={"views": 2}).stage2
    assert recipe_of(CENTRE, CENTRE, adapter=None).stage2
    assert recipe_of(SUBTRACT, SUBTRACT, adapter={"placement": "tokens"}).stage2
    assert recipe_of({}, None, stage="image", data={"stride": 0}).image
    assert recipe_of(ATTENTION, ATTENTION, cache={"views": 2}).stage2


def test_given_weights_say_their_own_pooling() -> None:
    """Stage 1 is not trained then, and the weights are compared with stage 2 when they are loaded."""
    blocks = {
        name: {**STAGE, "model": {"size": "tiny", "classes": 3, "pooling": pooling}}
        for name, pooling in (("stage1", "cls"), ("stage2", "attention"))
    }
    with pytest.raises(ValidationError, match=r"model\.pooling has to be the same"):
        Recipe.model_validate({"name": "given", **blocks})
    blocks["stage1"]["weights"] = "stage1.safetensors"
    assert Recipe.model_validate({"name": "given", **blocks})
