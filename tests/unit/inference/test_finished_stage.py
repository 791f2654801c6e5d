"""Weights found by a run or by their file: the stage that was asked for, or one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfa_dist.errors import CheckpointError, RecipeError, SfaError, UsageError
from sfa_dist.inference.finished_stage import finished_of_run, finished_of_weights, recipe_of_run
from sfa_dist.recipe.schema import Recipe, load_recipe

RECIPE = """\
model: {size: tiny, classes: 3}
data: {train: [a.tar]}
optimizer: {lr: 0.1}
schedule: {epochs: 1}
stage1: {frames: 8}
stage2: {frames: 16}
"""


def write(folder: Path, *stages: str, recipe: str = RECIPE) -> Recipe:
    """A run with the weights of some stages, each of which tells its stage."""
    (folder / "recipe.yaml").write_text(recipe)
    for name in stages:
        file = folder / name / "weights.safetensors"
        file.parent.mkdir(parents=True)
        save_file({"a": torch.zeros(1)}, file, {"stage": name.partition("/")[0]})
    return load_recipe(folder / "recipe.yaml", (), {}).recipe


def refused(error: type[SfaError], said: str) -> pytest.RaisesExc[SfaError]:
    return pytest.raises(error, match=said)


class TestRun:
    def test_the_last_stage_with_its_trunk(self, tmp_path: Path) -> None:
        recipe = write(tmp_path, "stage1", "stage2")
        found = finished_of_run(recipe, tmp_path, None)
        assert (found.stage, found.run_dir, found.recipe_file) == ("stage2", tmp_path, recipe_of_run(tmp_path))
        assert found.weights == tmp_path / "stage2" / "weights.safetensors"
        assert found.trunk_weights == tmp_path / "stage1" / "weights.safetensors"
        first = finished_of_run(recipe, tmp_path, "stage1")
        assert (first.weights, first.trunk_weights) == (found.trunk_weights, None)

    def test_no_stage_stands_in_for_one_that_is_not_done(self, tmp_path: Path) -> None:
        recipe = write(tmp_path, "stage1")
        with refused(CheckpointError, "stage2 of .* train it to the end first or --stage stage1"):
            finished_of_run(recipe, tmp_path, None)
        assert finished_of_run(recipe, tmp_path, "stage1").stage == "stage1"

    def test_a_stage_that_it_has_not(self, tmp_path: Path) -> None:
        with refused(UsageError, "no such stage .it has stage1, stage2"):
            finished_of_run(write(tmp_path), tmp_path, "image")

    def test_a_trunk_that_is_gone(self, tmp_path: Path) -> None:
        with refused(CheckpointError, "no weights file .*stage1"):
            finished_of_run(write(tmp_path, "stage2"), tmp_path, None)

    def test_the_member_that_a_sweeps_test_chose(self, tmp_path: Path) -> None:
        text = RECIPE.replace("16}", "16, cache: {views: 1}}") + "sweep: {seed: [0, 1]}\n"
        recipe = write(tmp_path, "stage1", "stage2/members/m1", recipe=text)
        with refused(CheckpointError, "not been tested yet"):
            finished_of_run(recipe, tmp_path, None)
        (tmp_path / "result.json").write_text(json.dumps({"best": "m1"}))
        found = finished_of_run(recipe, tmp_path, None)
        assert found.weights.parent == found.recipe_file.parent == tmp_path / "stage2" / "members" / "m1"

    def test_a_folder_that_is_no_run(self, tmp_path: Path) -> None:
        with refused(UsageError, "not a run directory"):
            recipe_of_run(tmp_path)


class TestFiles:
    def test_they_tell_their_stage(self, tmp_path: Path) -> None:
        recipe, file = write(tmp_path, "stage1", "stage2"), tmp_path / "recipe.yaml"
        one, two = (tmp_path / name / "weights.safetensors" for name in ("stage1", "stage2"))
        assert finished_of_weights(recipe, file, one, None, None).stage == "stage1"
        assert finished_of_weights(recipe, file, two, one, None).trunk_weights == one
        with refused(UsageError, "holds no trunk"):
            finished_of_weights(recipe, file, two, None, None)

    def test_the_trunk_of_the_recipe(self, tmp_path: Path) -> None:
        write(tmp_path, "stage1", "stage2")
        one, two = (tmp_path / name / "weights.safetensors" for name in ("stage1", "stage2"))
        recipe = load_recipe(tmp_path / "recipe.yaml", [f"stage1.weights={one}"], {}).recipe
        assert finished_of_weights(recipe, tmp_path / "recipe.yaml", two, None, None).trunk_weights == one

    def test_files_that_are_not_there(self, tmp_path: Path) -> None:
        recipe, file = write(tmp_path, "stage2"), tmp_path / "recipe.yaml"
        two = tmp_path / "stage2" / "weights.safetensors"
        for weights, trunk in ((tmp_path / "x", None), (two, tmp_path / "x")):
            for stage in ("stage2", None):
                with refused(CheckpointError, "no weights file .*x"):
                    finished_of_weights(recipe, file, weights, trunk, stage)

    def test_weights_that_tell_nothing_or_do_not_fit(self, tmp_path: Path) -> None:
        recipe, file = write(tmp_path), tmp_path / "recipe.yaml"
        save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
        with refused(UsageError, "give --stage"):
            finished_of_weights(recipe, file, tmp_path / "w.safetensors", None, None)
        with refused(RecipeError, "of image, and the recipe has no such stage"):
            finished_of_weights(recipe, file, tmp_path / "w.safetensors", None, "image")
