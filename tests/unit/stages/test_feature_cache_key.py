"""What stored features depend on, beside what the tests of whole runs refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_samples import write_shards

from sfa_dist.data.batches import rand_augment
from sfa_dist.data.shards.shard_index import SampleIndex, load_index
from sfa_dist.recipe.schema import Stage2, load_recipe
from sfa_dist.stages.feature_cache import Key, plan_cache

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "l_128f_cached.yaml"
RAND_AUGMENT = ("augment.color=0", "augment.gray=0", "augment.rand_augment={layers: 2, magnitude: 15}")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return load_index(write_shards(tmp_path_factory.mktemp("shards"), [2]))


def key(index: SampleIndex, *overrides: str) -> Key:
    recipe = load_recipe(RECIPE, overrides, {"SFA_DATA": "data"}).recipe
    assert isinstance(recipe.stage2, Stage2)
    return plan_cache(recipe, recipe.stage2, Path("cache"), "trunk", index, None)[0].key


@pytest.mark.parametrize(("overrides", "differs"), [((), False), (RAND_AUGMENT, True)], ids=["colours", "RandAugment"])
def test_features_made_by_another_randaugment_are_of_something_else(
    index: SampleIndex, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], differs: bool
) -> None:
    now = key(index, *overrides)
    monkeypatch.setattr(rand_augment, "REVISION", rand_augment.REVISION - 1)
    assert (key(index, *overrides) != now) == differs
