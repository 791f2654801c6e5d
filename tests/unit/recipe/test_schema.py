"""A recipe reads back from what is written of it; properties that hold for any."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from recipe_files import MINIMAL, WriteRecipe, read

from sfa_dist.errors import RecipeError
from sfa_dist.recipe import schema
from sfa_dist.recipe.blocks import FolderName
from sfa_dist.recipe.schema import dump_recipe, load_recipe, print_recipe
from sfa_dist.recipe.source import drop_marks, merge
from sfa_dist.recipe.strict_yaml import Node, format_tree, format_value, parse, plain

ROOT = Path(__file__).resolve().parents[3]


# ------------------------------------------------------------------------------------------------ writing and hashing


def test_dump_loads_back_and_print_names_origins(write_recipe: WriteRecipe) -> None:
    text = MINIMAL + "deepspeed: {a: {}, b: [{c: 'on'}], 'x y': null}\nstage2: {frames: 8, adapter: null}\n"
    loaded = load_recipe(write_recipe(text), ["name=$${X}"])
    for again in (dump_recipe(loaded.recipe), print_recipe(loaded)):
        assert load_recipe(write_recipe(again, "other.yaml")).recipe == loaded.recipe
    printed = print_recipe(loaded).splitlines()
    assert 'name: "$${X}"  # --set name=$${X}' in printed
    assert "    lr: 0.1  # a.yaml:2" in printed
    assert "  adapter: null  # a.yaml:6" in printed
    assert all("  # " in line for line in printed if not line.endswith(":"))
    assert yaml.safe_load(dump_recipe(loaded.recipe))["stage1"]["optimizer"]["eps"] == 1e-8, "other tools read the same"


def test_loading_a_recipe_does_not_import_torch() -> None:
    code = "import sys; from sfa_dist.recipe.schema import load_recipe; load_recipe('recipes/h_96f.yaml'); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ properties

scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "on",
        "1e-3",
        ".5",
        "null",
        "~",
        "${A}",
        "$${",
        "a: b",
        "#x",
        "'",
        "x\ny",
        "-",
        "---",
        "",
        "timm:x.y",
        "a,b",
        "\x85",
    ]
)
words = st.sampled_from("abcd")
values = st.recursive(
    scalars | texts, lambda child: st.lists(child, max_size=3) | st.dictionaries(texts, child, max_size=3), max_leaves=8
)
blocks = st.recursive(
    st.dictionaries(words, scalars, max_size=3), lambda child: st.dictionaries(words, child | scalars, max_size=3)
)


NAME = TypeAdapter(FolderName)


def is_name(text: str) -> bool:
    """Whether it is a folder's name."""
    try:
        NAME.validate_python(text)
    except ValueError:
        return False
    return True


def tree(value: Any, place: str) -> Node:
    return parse(format_tree(value), source=lambda line: place)


@given(value=values)
@settings(max_examples=150, deadline=None)
def test_any_value_is_written_so_that_it_reads_back(value: Any) -> None:
    assert read(f"k: {format_value(value)}") == {"k": value}
    assert read(format_tree({"k": value, "z": 1})) == {"k": value, "z": 1}


@pytest.mark.fault(60)
@given(text=st.text(st.sampled_from("a1 -:[]{}#&*!|>'\"%@,?\n\t.~_$\x00é"), max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_text_ends_in_anything_but_a_recipe_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError):
        load_recipe(path, ["a.b=1"])
    with pytest.raises(RecipeError):
        load_recipe(path, [text])


def same_kinds(one: Any, two: Any) -> bool:
    """Whether no key is a block in one and a plain value in the other."""
    if not isinstance(one, dict) or not isinstance(two, dict):
        return not isinstance(one, dict) and not isinstance(two, dict)
    return all(same_kinds(one[key], two[key]) for key in one.keys() & two.keys())


def test_a_block_after_a_plain_value_starts_anew() -> None:
    base, off, again = (tree(value, "x") for value in ({"b": {"a": 1}}, {"b": None}, {"b": {"c": 2}}))
    assert plain(merge(merge(base, off), again)) == {"b": {"c": 2}}


@given(one=blocks, two=blocks, three=blocks)
@settings(max_examples=100, deadline=None)
def test_merging_is_associative_and_the_last_wins(one: Any, two: Any, three: Any) -> None:
    a, b, c = (
        tree(value, place) if value else Node({}, place) for value, place in ((one, "a"), (two, "b"), (three, "c"))
    )
    # A plain value in the middle (`adapter: null`) cuts a block off from what its bases had, so order matters there.
    if same_kinds(one, two) and same_kinds(two, three) and same_kinds(one, three):
        assert plain(merge(merge(a, b), c)) == plain(merge(a, merge(b, c)))
    assert plain(merge(a, a)) == plain(a) == plain(merge(Node({}, "x"), a))
    merged = plain(merge(a, b))
    for key, value in two.items():
        assert merged[key] == value or isinstance(value, dict)
    for key in set(one) - set(two):
        assert merged[key] == one[key]
    assert plain(drop_marks(merge(a, merge(b, tree({"_delete_": True}, "d"))))) == {}


@given(
    lr=st.floats(0, 1e6),
    seeds=st.lists(st.integers(0, 10**9), min_size=1, max_size=3),
    name=texts.filter(is_name),
    deepspeed=st.dictionaries(texts, values, max_size=3).filter(lambda value: "\\u0000" not in json.dumps(value)),
    adapter=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_overrides_and_dump_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    lr: float,
    seeds: list[int],
    name: str,
    deepspeed: dict[str, Any],
    adapter: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "property.yaml"
    path.write_text(MINIMAL + "data: {}\nstage2: {frames: 8}\n")
    overrides = [f"optimizer.lr={format_value(lr)}", *(f"seed={seed}" for seed in seeds)]
    recipe = load_recipe(path, overrides + ["stage2.adapter=null"] * (not adapter)).recipe
    assert recipe.stage1 is not None
    assert recipe.stage2 is not None
    assert (recipe.stage1.optimizer.lr, recipe.seed, recipe.stage2.adapter is None) == (lr, seeds[-1], not adapter)
    stage = schema.Stage1(**{**dict(recipe.stage1), "deepspeed": deepspeed})
    recipe = schema.Recipe(**{**dict(recipe), "name": name, "stage1": stage})
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(path).recipe
    assert again == recipe
