"""Recipes that take the run elsewhere, or would be read for ever, are refused by name and at once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from recipe_files import MINIMAL, WriteRecipe, errors_of

from sfa_dist import train
from sfa_dist.recipe.blocks import FolderName
from sfa_dist.recipe.schema import load_recipe

NAME = TypeAdapter(FolderName)
NO_NAMES = (
    *('".."', '"."', '""', "../../x", "/tmp/x", "a/b", "a/", '"-x"', '" x"', '"x "', '"\\t"'),
    *('"a\\nb"', '"a\\x1b[31mb"', '"a\\x7f"', '"a\\x85b"', '"a\\u2028b"', "x" * 256, "é" * 128),
)


@pytest.mark.parametrize("name", NO_NAMES)
def test_the_name_of_a_run_is_one_folders_name(write_recipe: WriteRecipe, name: str) -> None:
    error = errors_of(write_recipe(MINIMAL + f"name: {name}\n"))
    assert error.startswith("a.yaml:5: name: ")
    assert "\n" not in error
    assert errors_of(write_recipe(MINIMAL), f"name={name}").startswith(f"--set name={name}: name: ")


@settings(max_examples=50, deadline=None)
@given(name=st.text(max_size=8) | st.text(st.sampled_from("./\\- a~é\t"), max_size=4))
def test_a_name_that_is_taken_stays_in_its_folder(name: str) -> None:
    try:
        NAME.validate_python(name)
    except ValueError:
        return
    path = Path(os.path.normpath(Path("/runs") / name))
    assert (path.parent, path.name) == (Path("/runs"), name)


def test_a_file_whose_name_is_no_runs_name(write_recipe: WriteRecipe) -> None:
    assert "a.yaml: name: " not in errors_of(write_recipe(MINIMAL, "-x.yaml")), "there is no such line"
    assert "'-x'" in errors_of(write_recipe(MINIMAL, "-x.yaml"))


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('name: "a\\0b"', "name"),
        ('data: {train: ["a\\0b.tar"]}', "data.train[0]"),
        ('data: {remote: {cache_dir: "\\0"}}', "data.remote.cache_dir"),
        ('data: {train: ["a\\ud800"]}', "data.train[0]"),
        ('deepspeed: {"a\\0": 1}', "deepspeed"),
        ('_base_: "a\\0.yaml"', "_base_"),
    ],
)
def test_text_that_no_path_can_hold(write_recipe: WriteRecipe, line: str, key: str) -> None:
    text = MINIMAL + line + "\n" + ("data: {}\n" if "data" not in line else "")
    assert errors_of(write_recipe(text)).startswith(f"a.yaml:5: {key}: the character '\\")


def test_bases_that_double_are_refused_at_once(write_recipe: WriteRecipe) -> None:
    for number in range(25):
        write_recipe(f"_base_: [b{number + 1}.yaml, b{number + 1}.yaml]\n", f"b{number}.yaml")
    write_recipe(MINIMAL, "b25.yaml")
    start = time.process_time()
    assert "_base_: the recipe is put together from more than 100 files" in errors_of(Path("b0.yaml"))
    write_recipe(f"_base_: [{'b25.yaml, ' * 101}]\n", "wide.yaml")
    assert "more than 100 files" in errors_of(Path("wide.yaml"))
    for number in range(150):
        write_recipe(f"_base_: c{number + 1}.yaml\n", f"c{number}.yaml")
    assert "more than 100 files" in errors_of(Path("c0.yaml"))
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [" + "x, " * 21_000 + "]", "more than 20,000 keys and values"),
        ("[" * 20_000, "nested too deeply"),
        ("a: " * 10_000, "mapping values are not allowed here"),
        ("- " * 60_000, "nested too deeply"),
        ("a: &a [x]\nb: *a\n", "anchor '&a' is not allowed"),
        ("#" * (1 << 20) + "\n", "larger than 1 MiB"),
    ],
    ids=["list", "brackets", "colons", "dashes", "aliases", "bytes"],
)
def test_texts_that_expand_or_have_no_end(write_recipe: WriteRecipe, text: str, says: str) -> None:
    start = time.process_time()
    assert says in errors_of(write_recipe(text))
    assert time.process_time() - start < 20


@pytest.mark.parametrize("override", ["a." * 5000 + "b=1", "seed=" + "[" * 5000, "deepspeed=" + "{a: " * 100])
def test_overrides_that_go_too_deep(write_recipe: WriteRecipe, override: str) -> None:
    error = errors_of(write_recipe(MINIMAL), override)
    assert "keys deep" in error or "nested too deeply" in error


@pytest.mark.parametrize(
    "line",
    ["batch: {size: 99999999999999999999}", f"seed: {'9' * 100}", "stage2: {frames: 8, chunk_frames: 0x7ffffffffffe}"],
)
def test_numbers_that_no_machine_counts_to(write_recipe: WriteRecipe, line: str) -> None:
    assert errors_of(write_recipe(MINIMAL + line + "\n")).startswith("a.yaml:5: ")


def test_what_is_no_regular_file_is_not_waited_for(
    write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe("_base_: pipe\n")
    os.mkfifo("pipe")
    Path("folder.yaml").mkdir()
    assert errors_of(Path("pipe")) == "pipe: not a regular file but a pipe or a device"
    assert errors_of(path) == "a.yaml:1: _base_: pipe: not a regular file but a pipe or a device"
    assert errors_of(Path("/dev/zero")) == "/dev/zero: not a regular file but a pipe or a device"
    assert errors_of(Path("folder.yaml")) == "folder.yaml: cannot be read: Is a directory"
    assert train.main(["--recipe", "pipe", "--print-recipe"]) == 78
    assert capsys.readouterr().err.count("\n") == 1


def test_a_recipe_within_the_limits_is_read(write_recipe: WriteRecipe) -> None:
    shards = ", ".join(f"s{number}.tar" for number in range(5000))
    loaded = load_recipe(write_recipe(MINIMAL + f"data: {{train: [{shards}]}}\nname: Größe 1 (b).2\n"))
    assert loaded.recipe.name == "Größe 1 (b).2"
