"""What a recipe is put together from: bases, defaults of stages, overrides, variables."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_files import MINIMAL, WriteRecipe, errors_of

from sfa_dist.recipe.schema import load_recipe
from sfa_dist.recipe.shipped import shipped

# ------------------------------------------------------------------------------------------------ bases


def test_bases_are_merged_in_order_and_lists_replaced(write_recipe: WriteRecipe) -> None:
    write_recipe(MINIMAL + "data: {train: [x, y], stride: 4}\n", "_base_/one.yaml")
    write_recipe("seed: 5\ndata: {val: [v]}\nlog: {every: 1}\n", "_base_/two.yaml")
    path = write_recipe("_base_: [_base_/one.yaml, _base_/two.yaml]\nlog: {every: 7}\ndata: {train: [z]}\n")
    loaded = load_recipe(path)
    stage = loaded.recipe.stage1
    assert stage is not None
    assert (stage.data.train, stage.data.val, stage.data.stride) == (["z"], ["v"], 4)
    assert (loaded.recipe.seed, loaded.recipe.log.every, loaded.recipe.name) == (5, 7, "a")
    assert {key: loaded.origins[key] for key in ("name", "seed", "log.every", "log.wandb")} == {
        "name": "default",
        "seed": "_base_/two.yaml:1",
        "log.every": "a.yaml:2",
        "log.wandb": "default",
    }
    assert loaded.origins["stage1.data.train"] == "a.yaml:3"
    assert loaded.origins["stage1.data.stride"] == "_base_/one.yaml:5"


def test_base_paths_are_relative_to_the_file_they_stand_in(write_recipe: WriteRecipe) -> None:
    write_recipe(MINIMAL, "deep/er/root.yaml")
    write_recipe("_base_: er/root.yaml\n", "deep/mid.yaml")
    path = write_recipe("_base_: ../deep/mid.yaml\n", "top/a.yaml")
    assert load_recipe(path).origins["stage1.optimizer.lr"] == "deep/er/root.yaml:2"


@pytest.mark.parametrize("folder", [".", "recipes"])
def test_a_shipped_base_is_found_from_any_folder(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    path = write_recipe("_base_: recipes/demo.yaml\nmodel: {classes: 7}\n", "mine.yaml").resolve()
    for place in (tmp_path, shipped("recipes").parent / folder):  # The clone itself is a folder like any other.
        monkeypatch.chdir(place)
        recipe = load_recipe(path, [], {}).recipe
        assert recipe.stage1 is not None
        assert (recipe.stage1.model.classes, recipe.stage1.model.size) == (7, "tiny")


def test_errors_in_a_base_name_the_base(write_recipe: WriteRecipe) -> None:
    write_recipe(MINIMAL + "batch: {size: many}\n", "base.yaml")
    assert errors_of(write_recipe("_base_: base.yaml\n")).startswith("base.yaml:5: batch.size:")
    assert errors_of(write_recipe("_base_: bose.yaml\n")).startswith(
        "a.yaml:1: _base_: bose.yaml: no such recipe; did you mean"
    )
    assert errors_of(write_recipe("_base_: {a: 1}\n")).startswith(
        "a.yaml:1: _base_: expected a path or a list of paths"
    )


def test_delete_drops_what_the_base_had(write_recipe: WriteRecipe) -> None:
    write_recipe(MINIMAL + "deepspeed: {a: 1}\n", "base.yaml")
    path = write_recipe(
        "_base_: base.yaml\noptimizer: {_delete_: true, lr: 0.2}\nstage1: {deepspeed: {_delete_: true, b: 2}}\n"
        "stage2: {frames: 8}\n"
    )
    recipe = load_recipe(path).recipe
    assert recipe.stage1 is not None
    assert recipe.stage2 is not None
    assert (recipe.stage1.deepspeed, recipe.stage2.deepspeed) == ({"b": 2}, {"a": 1})
    error = errors_of(write_recipe("_base_: base.yaml\noptimizer: {_delete_: x}\n"))
    assert error == "a.yaml:2: optimizer._delete_: expected true or false, got 'x'"


def test_circular_bases_are_named(write_recipe: WriteRecipe) -> None:
    write_recipe("_base_: a.yaml\n", "b.yaml")
    error = errors_of(write_recipe("\n_base_: b.yaml\n"))
    assert error == "b.yaml:1: _base_ leads back to the same file: a.yaml -> b.yaml -> a.yaml"


def test_a_base_reached_twice_is_no_circle(write_recipe: WriteRecipe) -> None:
    write_recipe(MINIMAL, "root.yaml")
    write_recipe("_base_: root.yaml\n", "b.yaml")
    assert load_recipe(write_recipe("_base_: [root.yaml, b.yaml]\n")).recipe.stage1


# ------------------------------------------------------------------------------------------------ stage defaults


def test_stage_values_win_over_the_top_level(write_recipe: WriteRecipe) -> None:
    loaded = load_recipe(write_recipe(MINIMAL + "stage2:\n  frames: 8\n  optimizer:\n    momentum: 0.5\nimage: null\n"))
    recipe = loaded.recipe
    assert recipe.stage1 is not None
    assert recipe.stage2 is not None
    assert recipe.image is None
    assert (recipe.stage1.optimizer.momentum, recipe.stage2.optimizer.momentum) == (0.9, 0.5)
    assert recipe.stage2.optimizer.lr == recipe.stage1.optimizer.lr == 0.1
    assert loaded.origins["stage2.optimizer.momentum"] == "a.yaml:8"
    assert loaded.origins["stage2.optimizer.lr"] == "a.yaml:2"
    assert loaded.origins["stage2.optimizer.eps"] == "default"
    assert loaded.origins["image"] == "a.yaml:9"


# ------------------------------------------------------------------------------------------------ overrides


def test_overrides(write_recipe: WriteRecipe) -> None:
    path = write_recipe(MINIMAL + "stage2: {frames: 8}\n")
    overrides = ["seed=1", "seed=2", "stage2.adapter=null", "data.train=[a, b]", "log.wandb=off", "name=1e"]
    loaded = load_recipe(path, [*overrides, "optimizer={momentum: 0.1}", "deepspeed.a.b=1e-3"])
    recipe = loaded.recipe
    assert recipe.stage2 is not None
    assert (recipe.seed, recipe.stage2.adapter, recipe.log.wandb, recipe.name) == (2, None, "off", "1e")
    assert (recipe.stage2.data.train, recipe.stage2.optimizer.lr) == (["a", "b"], 0.1)
    assert recipe.stage2.deepspeed == {"a": {"b": 1e-3}}
    assert loaded.origins["seed"] == "--set seed=2"
    assert loaded.origins["stage2.adapter"] == "--set stage2.adapter=null"
    assert loaded.origins["stage1.optimizer.momentum"] == "--set optimizer={momentum: 0.1}"
    assert load_recipe(path, ["stage2="]).recipe.stage2 is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key.path=value"),
        ("=1", "expected key.path=value"),
        ("a..b=1", "expected key.path=value"),
        ("seed.x=1", "'seed' is 3 (a.yaml:5), not a block"),
        ("data.train.0=x", "'data.train' is a list (a.yaml:6), not a block"),
        ("seed=x", "seed: expected a whole number, got 'x'"),
        ("stage1.framse=4", "unknown key 'stage1.framse'; did you mean 'frames'?"),
        ("seed=a: 1", "give a single value, [a, b] or {key: value}"),
        ("seed=!!int 3", "tag 'tag:yaml.org,2002:int' is not allowed (quote text that starts with '!')"),
        ("_base_=b.yaml", "unknown key '_base_'"),
    ],
)
def test_wrong_overrides(write_recipe: WriteRecipe, override: str, message: str) -> None:
    path = write_recipe(MINIMAL + "seed: 3\ndata: {train: [a]}\n")
    assert errors_of(path, override).startswith(f"--set {override}: {message}")


def test_an_override_without_effect_is_an_error(write_recipe: WriteRecipe) -> None:
    path = write_recipe(MINIMAL.replace("{frames: 4}", "{frames: 4, optimizer: {lr: 0.2}}"))
    error = errors_of(path, "optimizer.lr=1")
    assert error == "--set optimizer.lr=1: has no effect, each stage sets its own: write <stage>.optimizer.lr=..."
    assert load_recipe(path, ["stage1.optimizer.lr=1"]).recipe.stage1.optimizer.lr == 1.0  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ variables


def test_variables_come_from_the_argument_alone(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(MINIMAL + "data:\n  train: ['${D:-data}/${N}/x-{0..9}.tar']\n  val: ['$${D} $D']\n")
    monkeypatch.setenv("N", "elsewhere")
    error = errors_of(path)
    assert error.startswith("a.yaml:6: data.train[0]: the environment variable N is not set")
    stage = load_recipe(path, environ={"N": "k400"}).recipe.stage1
    assert stage is not None
    assert (stage.data.train, stage.data.val) == (["data/k400/x-{0..9}.tar"], ["${D} $D"])
    stage = load_recipe(path, ["name=${N}"], {"N": "k", "D": "/d"}).recipe.stage1
    assert stage is not None
    assert stage.data.train == ["/d/k/x-{0..9}.tar"]


def test_variables_are_filled_after_merging(write_recipe: WriteRecipe) -> None:
    write_recipe(MINIMAL + "data: {decoder: '${GONE}'}\n", "base.yaml")
    path = write_recipe("_base_: ${FOLDER:-.}/base.yaml\n")
    stage = load_recipe(path, ["data.decoder=pyav"]).recipe.stage1
    assert stage is not None
    assert stage.data.decoder == "pyav"
    assert "base.yaml:5: data.decoder: the environment variable GONE is not set" in errors_of(path)


def test_a_name_is_not_inherited(write_recipe: WriteRecipe) -> None:
    """Or a recipe of one's own would train into the run directory of the one that it starts from."""
    write_recipe(MINIMAL + "name: theirs\n", "base.yaml")
    assert load_recipe(write_recipe("_base_: base.yaml\n", "mine.yaml")).recipe.name == "mine"
    assert load_recipe(write_recipe("_base_: mine.yaml\nname: own\n", "other.yaml")).recipe.name == "own"


@pytest.mark.parametrize("text", ["${", "${1X}", "${X", "${X:-${Y}}", "${X:+y}", "${}"])
def test_malformed_variables_are_refused(write_recipe: WriteRecipe, text: str) -> None:
    assert errors_of(write_recipe(MINIMAL + f"name: '{text}'\n"), X="x").startswith(
        "a.yaml:5: name: '${' opens no variable"
    )
