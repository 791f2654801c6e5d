"""A recipe is read strictly, and each of its values knows where it came from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_dist import recipe as schema
from sfa_dist.errors import RecipeError
from sfa_dist.recipe import dump_recipe, load_recipe, print_recipe
from sfa_dist.recipe_source import drop_marks, merge
from sfa_dist.recipe_yaml import Node, format_tree, format_value, parse, plain, resolve_scalar

ROOT = Path(__file__).resolve().parents[2]

MINIMAL = """\
model: {size: tiny, classes: 10}
optimizer: {lr: 0.1}
schedule: {epochs: 2}
stage1: {frames: 4}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a recipe and works in its folder, so that places read `a.yaml:3`. Gives MINIMAL a last line of data."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "a.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        needs_data = text.startswith(MINIMAL[:6]) and "\ndata:" not in text
        path.write_text(text + "data: {}\n" * needs_data, encoding="utf-8")
        return path

    return write


def errors_of(path: Path, *overrides: str, **environ: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, environ)
    assert caught.value.exit_code == 78
    return str(caught.value)


def read(text: str) -> Any:
    return plain(parse(text, place=lambda line: f"t:{line}"))


# ------------------------------------------------------------------------------------------------ strict YAML


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
        ("optimizer: {lr: 1}", "a.yaml:5: duplicate key 'optimizer'; it stands on line 2 already"),
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
def test_yaml_that_is_refused(write: Write, line: str, message: str) -> None:
    error = errors_of(write(MINIMAL + line + "\n"))
    assert error.startswith(message)
    assert "\n" not in error


@pytest.mark.fault(60)
def test_files_that_are_refused(write: Write, tmp_path: Path) -> None:
    assert "larger than 1 MiB" in errors_of(write("# " + "x" * (1 << 20)))
    assert errors_of(write("- 1\n")) == "a.yaml:1: a recipe is a block of `key: value` lines"
    assert "nested too deeply" in errors_of(write("a: " + "[" * 5000))
    Path("b.yaml").write_bytes(b"seed: 1\nname: \xff\n")
    assert errors_of(Path("b.yaml")) == "b.yaml:2: not UTF-8 text"
    assert "cannot be read" in errors_of(tmp_path)


def test_missing_file_lists_what_is_near(write: Write) -> None:
    write(MINIMAL, "recipes/h_96f.yaml")
    assert errors_of(Path("recipes/h96f.yaml")) == "recipes/h96f.yaml: no such recipe; did you mean h_96f.yaml?"
    assert errors_of(Path("recipes/zz.yaml")).endswith("recipes holds h_96f.yaml")
    assert errors_of(Path("nowhere/a.yaml")).endswith("there is no folder nowhere")


# ------------------------------------------------------------------------------------------------ typing errors


@pytest.mark.fault(59)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch: {size: many}", "a.yaml:5: batch.size: expected a whole number, got 'many'"),
        ("batch: {size: 2.0}", "a.yaml:5: batch.size: expected a whole number, got 2.0"),
        ("batch: {size: true}", "a.yaml:5: batch.size: expected a whole number, got true"),
        ("batch: {size: 0}", "a.yaml:5: batch.size: expected a number greater than 0, got 0"),
        ("batch: 3", "a.yaml:5: batch: expected a block of keys, got 3"),
        ("batch:", "a.yaml:5: batch: expected a block of keys, got null"),
        ("augment: {flip: 1.5}", "a.yaml:5: augment.flip: expected a number of at most 1.0, got 1.5"),
        ("augment: {color: .nan}", "a.yaml:5: augment.color: expected "),
        ("data: {mean: [0, 0, .inf]}", "a.yaml:5: data.mean[2]: expected a finite number, got inf"),
        ("data: {mean: [0, 0]}", "a.yaml:5: data.mean: expected a list of 3, got a list of 2"),
        ("data: {train: x.tar}", "a.yaml:5: data.train: expected a list, got 'x.tar'"),
        ("data: {train: [1]}", "a.yaml:5: data.train[0]: expected text, got 1"),
        ("data: {decoder: decord}", "a.yaml:5: data.decoder: expected 'auto', 'torchcodec' or 'pyav', got 'decord'"),
        ("test: {shuffled_frames: on}", "a.yaml:5: test.shuffled_frames: expected true or false, got 'on'"),
        ("deepspeed: {x: [.inf]}", "a.yaml:5: deepspeed: takes no .inf and no .nan"),
        ("stage2: {}", "a.yaml:5: stage2: 'frames' is missing"),
        ("stage2: {frames: 7}", "a.yaml:5: stage2.frames: 7 is not a multiple of model.tubelet (2)"),
        ("stage2: {frames: 8, chunk_frames: 3}", "a.yaml:5: stage2.chunk_frames: 3 is not a multiple of"),
        ("stage2: {chunk_frames: 0, frames: 8}", "a.yaml:5: stage2.chunk_frames: expected a number of frames greater"),
        ("activation: drop", "a.yaml:5: activation: expected 'keep', 'checkpoint', 'offload' or 'checkpoint_offload'"),
        (
            "activation: offload\nactivation_backend: fairscale",
            "a.yaml:5: activation: fairscale cannot offload without checkpoints: use torch",
        ),
        (
            "engine: {zero: 0}\nactivation: checkpoint\nactivation_backend: deepspeed",
            "a.yaml:7: activation_backend: deepspeed forgets the autocast that bf16 is here: use torch",
        ),
    ],
)
def test_wrong_values(write: Write, line: str, message: str) -> None:
    error = errors_of(write(MINIMAL + line + "\n"))
    assert error.startswith(message)
    assert "\n" not in error


@pytest.mark.fault(58)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch: {sise: 3}", "unknown key 'batch.sise'; did you mean 'size'?"),
        ("augment: {warmup_epochs: 3}", "unknown key 'augment.warmup_epochs'; 'warmup_epochs' belongs to schedule"),
        ("batch: {learning_rate: 3}", "unknown key 'batch.learning_rate'; did you mean 'optimizer.lr'?"),
        ("schedule2: {}", "unknown key 'schedule2'; did you mean 'schedule'?"),
        ("adapter: null", "unknown key 'adapter'; 'adapter' belongs to stage2"),
        ("hidden: 1", "unknown key 'hidden'; 'hidden' belongs to stage2.adapter"),
        ("test: {seed: 1}", "unknown key 'test.seed'; 'seed' belongs to the top level"),
        (
            "engine: {qqq: 1}",
            "unknown key 'engine.qqq'; known here: name, zero, precision, cpu_offload, reduction, shard_ranks",
        ),
        ("stage2: {frames: 8, optimiser: {}}", "unknown key 'stage2.optimiser'; did you mean 'optimizer'?"),
        ("stage2: {frames: 8, batch: {mirco: 1}}", "unknown key 'stage2.batch.mirco'; did you mean 'micro'?"),
    ],
)
def test_unknown_keys_come_with_a_suggestion(write: Write, line: str, message: str) -> None:
    assert errors_of(write(MINIMAL + line + "\n")) == f"a.yaml:5: {message}"


@pytest.mark.fault(42)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train: ['https://h/a?sig=1']", "data.train: 'https://h/a': https is off: set data.remote.allow: [https]"),
        ("val: [a.tar, http://h/a.tar]", "data.val: 'http://h/a.tar': http is off: set data.remote.allow: [http] if"),
        ("test: ['pipe:cat a']", "data.test: 'pipe:cat a': pipe is off: set data.remote.allow: [pipe] and data.remote"),
        ("train: [hf://a/b.tar]", "data.train: 'hf://a/b.tar': hf:// is not read, only local paths, s3://, https://, "),
        ("remote: {allow: [pipe]}", "data.remote.allow: what a pipe gives is kept on disk: set data.remote.cache_dir"),
        ("remote: {cache_gib: 9}", "data.remote.cache_gib: limits a cache that is off: set data.remote.cache_dir to a"),
        ("remote: {allow: [ftp]}", "data.remote.allow[0]: expected 'http', 'https' or 'pipe', got 'ftp'"),
        ("remote: {retrys: 1}", "unknown key 'data.remote.retrys'; did you mean 'retries'?"),
        ("remote: {cache_dir: x, cache_gib: 0}", "data.remote.cache_gib: expected a number greater than 0"),
    ],
)
def test_shards_from_elsewhere_are_allowed_by_name(write: Write, line: str, message: str) -> None:
    assert errors_of(write(MINIMAL + f"data:\n  {line}\n")).startswith(f"a.yaml:6: {message}")


def test_shards_from_elsewhere_that_are_allowed(write: Write) -> None:
    lines = (
        "data: {train: [s3://b/a.tar, https://h/a.tar], remote: {allow: [https, pipe], cache_dir: x, cache_gib: 9}}\n"
    )
    assert load_recipe(write(MINIMAL + lines)).recipe.stage1.data.remote.cache_gib == 9
    assert load_recipe(write(MINIMAL + "data: {train: [s3://b/a-*.tar]}\n")).recipe.stage1.data.remote.allow == []


def test_synonym_of_a_sibling(write: Write) -> None:
    error = errors_of(write(MINIMAL.replace("{lr: 0.1}", "\n  lr: 0.1\n  learning_rate: 1")))
    assert error == "a.yaml:4: unknown key 'optimizer.learning_rate'; did you mean 'lr'?"


def test_all_errors_are_listed_once_each(write: Write) -> None:
    text = MINIMAL + "batch: {size: x}\nseed: y\nstage2: {frames: 8}\nimage: {frames: 2}\n"
    assert errors_of(write(text)).splitlines() == [
        "a.yaml:6: seed: expected a whole number, got 'y'",
        "a.yaml:5: batch.size: expected a whole number, got 'x'",
    ]
    many = MINIMAL + "".join(f"q{i}: 1\n" for i in range(14))
    assert errors_of(write(many)).splitlines()[10:] == ["... and 4 more"]


def test_missing_blocks_and_stages(write: Write) -> None:
    text = "model: {size: tiny, classes: 10}\nschedule: {epochs: 2}\n"
    error = errors_of(write(text + "stage1: {frames: 4}\n"))
    assert error == "a.yaml:3: stage1: 'optimizer' is missing (it may also stand at the top level)"
    assert errors_of(write(text)) == "a.yaml: a recipe needs at least one of image, stage1, stage2"
    assert "no such recipe" not in errors_of(write(""))
    assert errors_of(write(MINIMAL.replace("stage1", "stage2"))).startswith("a.yaml:4: stage2: starts from stage1")
    error = errors_of(write(MINIMAL.replace("{frames: 4}", "{image_checkpoint: stage:image}")))
    assert error == "a.yaml:4: stage1: image_checkpoint is stage:image, but there is no image block"
    error = errors_of(write(MINIMAL.replace("lr: 0.1", "momentum: 0.1") + "stage2: {frames: 8}\n"))
    assert error == "a.yaml:2: optimizer: 'lr' is missing"


# ------------------------------------------------------------------------------------------------ bases


def test_bases_are_merged_in_order_and_lists_replaced(write: Write) -> None:
    write(MINIMAL + "data: {train: [x, y], stride: 4}\n", "_base_/one.yaml")
    write("seed: 5\ndata: {val: [v]}\nlog: {every: 1}\n", "_base_/two.yaml")
    path = write("_base_: [_base_/one.yaml, _base_/two.yaml]\nlog: {every: 7}\ndata: {train: [z]}\n")
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


def test_base_paths_are_relative_to_the_file_they_stand_in(write: Write) -> None:
    write(MINIMAL, "deep/er/root.yaml")
    write("_base_: er/root.yaml\n", "deep/mid.yaml")
    path = write("_base_: ../deep/mid.yaml\n", "top/a.yaml")
    assert load_recipe(path).origins["stage1.optimizer.lr"] == "deep/er/root.yaml:2"


def test_errors_in_a_base_name_the_base(write: Write) -> None:
    write(MINIMAL + "batch: {size: many}\n", "base.yaml")
    assert errors_of(write("_base_: base.yaml\n")).startswith("base.yaml:5: batch.size:")
    assert errors_of(write("_base_: bose.yaml\n")).startswith(
        "a.yaml:1: _base_: bose.yaml: no such recipe; did you mean"
    )
    assert errors_of(write("_base_: {a: 1}\n")).startswith("a.yaml:1: _base_: expected a path or a list of paths")


def test_delete_drops_what_the_base_had(write: Write) -> None:
    write(MINIMAL + "deepspeed: {a: 1}\n", "base.yaml")
    path = write(
        "_base_: base.yaml\noptimizer: {_delete_: true, lr: 0.2}\nstage1: {deepspeed: {_delete_: true, b: 2}}\n"
        "stage2: {frames: 8}\n"
    )
    recipe = load_recipe(path).recipe
    assert recipe.stage1 is not None
    assert recipe.stage2 is not None
    assert (recipe.stage1.deepspeed, recipe.stage2.deepspeed) == ({"b": 2}, {"a": 1})
    error = errors_of(write("_base_: base.yaml\noptimizer: {_delete_: x}\n"))
    assert error == "a.yaml:2: optimizer._delete_: expected true or false, got 'x'"


def test_circular_bases_are_named(write: Write) -> None:
    write("_base_: a.yaml\n", "b.yaml")
    error = errors_of(write("\n_base_: b.yaml\n"))
    assert error == "b.yaml:1: _base_ goes round in a circle: a.yaml -> b.yaml -> a.yaml"


def test_a_base_reached_twice_is_no_circle(write: Write) -> None:
    write(MINIMAL, "root.yaml")
    write("_base_: root.yaml\n", "b.yaml")
    assert load_recipe(write("_base_: [root.yaml, b.yaml]\n")).recipe.stage1


# ------------------------------------------------------------------------------------------------ stage defaults


def test_stage_values_win_over_the_top_level(write: Write) -> None:
    loaded = load_recipe(write(MINIMAL + "stage2:\n  frames: 8\n  optimizer:\n    momentum: 0.5\nimage: null\n"))
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


def test_overrides(write: Write) -> None:
    path = write(MINIMAL + "stage2: {frames: 8}\n")
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
def test_wrong_overrides(write: Write, override: str, message: str) -> None:
    path = write(MINIMAL + "seed: 3\ndata: {train: [a]}\n")
    assert errors_of(path, override).startswith(f"--set {override}: {message}")


def test_an_override_without_effect_is_an_error(write: Write) -> None:
    path = write(MINIMAL.replace("{frames: 4}", "{frames: 4, optimizer: {lr: 0.2}}"))
    error = errors_of(path, "optimizer.lr=1")
    assert error == "--set optimizer.lr=1: has no effect, each stage sets its own: write <stage>.optimizer.lr=..."
    assert load_recipe(path, ["stage1.optimizer.lr=1"]).recipe.stage1.optimizer.lr == 1.0  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ variables


def test_variables_come_from_the_argument_alone(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(MINIMAL + "data:\n  train: ['${D:-data}/${N}/x-{0..9}.tar']\n  val: ['$${D} $D']\n")
    monkeypatch.setenv("N", "elsewhere")
    error = errors_of(path)
    assert error.startswith("a.yaml:6: data.train[0]: the environment variable N is not set")
    stage = load_recipe(path, environ={"N": "k400"}).recipe.stage1
    assert stage is not None
    assert (stage.data.train, stage.data.val) == (["data/k400/x-{0..9}.tar"], ["${D} $D"])
    stage = load_recipe(path, ["name=${N}"], {"N": "k", "D": "/d"}).recipe.stage1
    assert stage is not None
    assert stage.data.train == ["/d/k/x-{0..9}.tar"]


def test_variables_are_filled_after_merging(write: Write) -> None:
    write(MINIMAL + "name: ${GONE}\n", "base.yaml")
    path = write("_base_: ${FOLDER:-.}/base.yaml\n")
    assert load_recipe(path, ["name=x"]).recipe.name == "x"
    assert "base.yaml:5: name: the environment variable GONE is not set" in errors_of(path)


@pytest.mark.parametrize("text", ["${", "${1X}", "${X", "${X:-${Y}}", "${X:+y}", "${}"])
def test_malformed_variables_are_refused(write: Write, text: str) -> None:
    assert errors_of(write(MINIMAL + f"name: '{text}'\n"), X="x").startswith("a.yaml:5: name: '${' opens no variable")


# ------------------------------------------------------------------------------------------------ writing and hashing


def test_dump_loads_back_and_print_names_origins(write: Write) -> None:
    text = MINIMAL + "deepspeed: {a: {}, b: [{c: 'on'}], 'x y': null}\nstage2: {frames: 8, adapter: null}\n"
    loaded = load_recipe(write(text), ["name=$${X}"])
    for again in (dump_recipe(loaded.recipe), print_recipe(loaded)):
        assert load_recipe(write(again, "other.yaml")).recipe == loaded.recipe
    printed = print_recipe(loaded).splitlines()
    assert 'name: "$${X}"  # --set name=$${X}' in printed
    assert "    lr: 0.1  # a.yaml:2" in printed
    assert "  adapter: null  # a.yaml:6" in printed
    assert all("  # " in line for line in printed if not line.endswith(":"))
    assert yaml.safe_load(dump_recipe(loaded.recipe))["stage1"]["optimizer"]["eps"] == 1e-8, "other tools read the same"


def test_loading_a_recipe_does_not_import_torch() -> None:
    code = "import sys; from sfa_dist.recipe import load_recipe; load_recipe('recipes/h_96f.yaml'); "
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


def tree(value: Any, place: str) -> Node:
    return parse(format_tree(value), place=lambda line: place)


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
    name=texts,
    deepspeed=st.dictionaries(texts, values, max_size=3),
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
