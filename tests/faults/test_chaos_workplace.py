"""The workplace of `sfa chaos`: small, and nothing of the user's is written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfa_dist.chaos import injectors
from sfa_dist.chaos.builtin import write_builtin
from sfa_dist.chaos.workplace import make_workplace
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.errors import RecipeError
from sfa_dist.recipe.schema import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_the_users_shards_are_only_read(tmp_path: Path) -> None:
    """No index is written beside them, and their clips are in the trials' shards byte for byte."""
    recipe = write_builtin(tmp_path / "mine")
    for folder in ("train", "val"):
        injectors.forget_index(tmp_path / "mine" / folder)
    before = snapshot(tmp_path / "mine")
    place = make_workplace(tmp_path / "place", load_recipe(recipe), "mine", 12, False)
    assert snapshot(tmp_path / "mine") == before
    assert place.real_shards == []
    copied = load_index(expand_shards(place.recipe.stage1.data.train))
    theirs = load_index(expand_shards([str(tmp_path / "mine" / "train" / "*.tar")]))
    assert sorted(copied.crc32) == sorted(theirs.crc32)
    assert any("copied from 3 of 3 shards" in note for note in place.notes)


def test_what_is_set_stays(tmp_path: Path) -> None:
    recipe = write_builtin(tmp_path / "mine")
    loaded = load_recipe(recipe, ["batch.size=6", "checkpoint.keep=5"])
    place = make_workplace(tmp_path / "place", loaded, "mine", 13, False)
    for stage in place.stages.values():
        assert (stage.batch.size, stage.batch.micro, stage.checkpoint.keep) == (6, 2, 5)
        assert stage.checkpoint.every_steps == 2
        assert stage.schedule.max_steps == 13
    assert (place.recipe.log.every, place.recipe.log.wandb) == (1, "off")


@pytest.mark.parametrize("name", ["h_96f", "g_48f", "b_32f"])
def test_a_large_recipe_is_refused_and_told_the_way_out(tmp_path: Path, name: str) -> None:
    loaded = load_recipe(ROOT / "recipes" / f"{name}.yaml", environ={"SFA_DATA": str(tmp_path)})
    with pytest.raises(RecipeError, match=r"too large for a CPU.*--tiny-model"):
        make_workplace(tmp_path / "place", loaded, name, 12, False)


def test_a_large_recipe_with_a_tiny_model(tmp_path: Path) -> None:
    write_builtin(tmp_path / "mine")
    shards = f"['{tmp_path}/mine/train/*.tar']"
    overrides = [f"data.{split}={shards}" for split in ("train", "val", "test")]
    loaded = load_recipe(ROOT / "recipes" / "h_96f.yaml", overrides, {"SFA_DATA": str(tmp_path)})
    place = make_workplace(tmp_path / "place", loaded, "h_96f", 12, True)
    stage1, stage2 = place.stages["stage1"], place.stages["stage2"]
    assert (stage1.model.width, stage2.model.width, stage2.frames) == (24, 24, 96)
    assert stage1.model.classes == stage2.model.classes == 400
    assert any("tiny model" in note for note in place.notes)
