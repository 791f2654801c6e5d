"""Which YAML is a recipe: scalars of YAML 1.2, no tags, anchors or duplicate keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_files import MINIMAL, WriteRecipe, errors_of, read

from sfa_dist.recipe.strict_yaml import format_value, resolve_scalar


@pytest.mark.fault(59)
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-3", -3),
        ("0x1F", 31),
        ("0o17", 15),
        ("010", 10),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("3.", 3.0),
        ("-.inf", float("-inf")),
        ("true", True),
        ("False", False),
        ("TRUE", True),
        ("", None),
        ("~", None),
        ("Null", None),
        *(
            (word, word)
            for word in ("on", "off", "yes", "no", "y", "tRue", "1_000", "2026-01-01", "1:30", "1e", ".", "+")
        ),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    got = resolve_scalar(text)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e999", "1e-05", "1e300"])
def test_numbers_are_written_as_they_are_read(text: str) -> None:
    value = resolve_scalar(text)
    assert repr(resolve_scalar(format_value(value))) == repr(value)


def test_quoted_scalars_stay_text() -> None:
    assert read("a: '1'\nb: \"true\"\nc: |\n  2\n") == {"a": "1", "b": "true", "c": "2\n"}


@pytest.mark.fault(59, 60)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed: !!int 3", "a.yaml:5: tag 'tag:yaml.org,2002:int' is not allowed"),
        ("seed: !!python/object/apply:os.system [x]", "a.yaml:5: tag"),
        ("seed: ! 3", "a.yaml:5: tag '!' is not allowed"),
        ("seed: &x 3", "a.yaml:5: anchor '&x' is not allowed"),
        ("seed: *x", "a.yaml:5: alias '*x' is not allowed"),
        ("log: {<<: *x}", "a.yaml:5: alias"),
        ("optimizer: {lr: 1}", "a.yaml:5: duplicate key 'optimizer'; it is already on line 2"),
        ("log: {every: 1, every: 2}", "a.yaml:5: duplicate key 'every'"),
        ("1: 2", "a.yaml:5: the key 1 is not text"),
        ("true: 2", "a.yaml:5: the key true is not text"),
        ("? [a]\n: 2", "a.yaml:5: a key must be text"),
        ("seed: [1", "a.yaml:6: while parsing a flow sequence that begins on line 5, "),
        ("seed: 'x", "a.yaml:7: while scanning a quoted scalar that begins on line 5, found unexpected end"),
        ("\tseed: 3", "a.yaml:5: "),
        ("seed: \x07", "a.yaml:5: the character #x07 is not allowed"),
        (
            "---\nseed: 3",
            "a.yaml:5: expected a single document in the stream that begins on line 1, but found another document",
        ),
    ],
)
def test_yaml_that_is_refused(write_recipe: WriteRecipe, line: str, message: str) -> None:
    error = errors_of(write_recipe(MINIMAL + line + "\n"))
    assert error.startswith(message)
    assert "\n" not in error


@pytest.mark.fault(60)
def test_files_that_are_refused(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    assert "larger than 1 MiB" in errors_of(write_recipe("# " + "x" * (1 << 20)))
    assert errors_of(write_recipe("- 1\n")) == "a.yaml:1: a recipe is a block of `key: value` lines"
    assert "nested too deeply" in errors_of(write_recipe("a: " + "[" * 5000))
    Path("b.yaml").write_bytes(b"seed: 1\nname: \xff\n")
    assert errors_of(Path("b.yaml")) == "b.yaml:2: not UTF-8 text"
    assert "cannot be read" in errors_of(tmp_path)


def test_missing_file_lists_what_is_near(write_recipe: WriteRecipe) -> None:
    write_recipe(MINIMAL, "recipes/h_96f.yaml")
    assert errors_of(Path("recipes/h96f.yaml")) == "recipes/h96f.yaml: no such recipe; did you mean h_96f.yaml?"
    assert errors_of(Path("recipes/zz.yaml")).endswith("recipes holds h_96f.yaml")
    assert errors_of(Path("nowhere/a.yaml")).endswith("there is no folder nowhere")
