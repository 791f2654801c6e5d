"""What each kind of stage answers about its trunk, cache, adapter and weights."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from sfa_dist.recipe.schema import ImageStage, Recipe, Stage1, Stage2, StageBlock

MODEL = {"size": "tiny", "classes": 3, "temporal_depth": 1}
COMMON = {
    "frames": 8,
    "model": MODEL,
    "data": {"stride": 2},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "schedule": {"epochs": 1},
}
POOLED = {"adapter": {"placement": "pooled"}}


def of(kind: type[StageBlock], **own: Any) -> StageBlock:
    return kind.model_validate({**COMMON, **own})


@pytest.mark.parametrize("kind", [ImageStage, Stage1])
def test_a_stage_that_trains_everything_freezes_and_caches_nothing(kind: type[StageBlock]) -> None:
    stage = of(kind)
    assert {stage.freezes_trunk, stage.runs_frozen_trunk, stage.reads_features} == {False}
    assert (stage.adapter_block, stage.cache_block, stage.given_weights) == (None, None, None)
    assert stage.own_seed(7) == 7


@pytest.mark.parametrize(
    ("cache", "runs", "reads"),
    [
        (None, True, False),
        ({"views": 2}, False, True),
        ({"views": 2, "live_fraction": 0.5}, True, False),
        ({"views": 2, "refresh": 0.5}, True, False),
    ],
)
def test_stage_2_runs_its_trunk_or_reads_features(cache: Any, runs: bool, reads: bool) -> None:
    stage = of(Stage2, **POOLED, cache=cache)
    assert stage.freezes_trunk
    assert (stage.runs_frozen_trunk, stage.reads_features) == (runs, reads)
    assert (stage.cache_block is None) == (cache is None)
    assert stage.adapter_block is not None


def test_given_weights_and_seeds_are_the_stages_own() -> None:
    assert of(Stage1, weights="w.safetensors").given_weights == "w.safetensors"
    assert of(Stage2, adapter=None).adapter_block is None
    assert [of(Stage2, **POOLED, seed=seed).own_seed(7) for seed in (None, 0, 3)] == [7, 0, 3]


def test_a_stage_2_that_trains_its_trunk_runs_and_caches_no_frozen_one() -> None:
    stage = of(Stage2, **POOLED, freeze_trunk=False)
    assert {stage.freezes_trunk, stage.runs_frozen_trunk, stage.reads_features} == {False}
    for own in ({"cache": {"views": 1}}, {"trunk_precision": "int8"}, {"offload": "on"}, {"overlap": "on"}):
        (key,) = own
        with pytest.raises(ValidationError, match="is for a frozen trunk") as error:
            of(Stage2, **POOLED, freeze_trunk=False, **own)
        assert error.value.errors()[0]["ctx"]["field"] == key


def test_stage_1_alone_may_have_no_epochs() -> None:
    none = {"schedule": {"epochs": 0}}
    assert of(Stage1, **none).schedule.epochs == 0
    for kind in (ImageStage, Stage2):
        with pytest.raises(ValidationError, match="trains nothing"):
            of(kind, **none)
    with pytest.raises(ValidationError, match="no stage2 starts from it"):
        Recipe.model_validate({"name": "none", "stage1": {**COMMON, **none}})
