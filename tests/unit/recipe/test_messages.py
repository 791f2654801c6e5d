"""What is wrong in a recipe is told by place and key, with a suggestion."""

from __future__ import annotations

import pytest
from recipe_files import MINIMAL, WriteRecipe, errors_of

from sfa_dist.recipe.schema import load_recipe


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
        ("data: {mean: [0, 0, .inf]}", "a.yaml:5: data.mean[2]: expected a finite number, got .inf"),
        ("data: {mean: [0, 0]}", "a.yaml:5: data.mean: expected a list of 3, got a list of 2"),
        ("data: {train: x.tar}", "a.yaml:5: data.train: expected a list, got 'x.tar'"),
        ("data: {remote: {cache_dir: ''}}", "a.yaml:5: data.remote.cache_dir: expected text that is not empty, got ''"),
        (
            "stage2: {frames: 8, cache: {dir: ''}}",
            "a.yaml:5: stage2.cache.dir: expected text that is not empty, got ''",
        ),
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
            "a.yaml:7: activation_backend: deepspeed recomputes without the autocast that bf16 needs here: use torch",
        ),
    ],
)
def test_wrong_values(write_recipe: WriteRecipe, line: str, message: str) -> None:
    error = errors_of(write_recipe(MINIMAL + line + "\n"))
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
def test_unknown_keys_come_with_a_suggestion(write_recipe: WriteRecipe, line: str, message: str) -> None:
    assert errors_of(write_recipe(MINIMAL + line + "\n")) == f"a.yaml:5: {message}"


@pytest.mark.fault(42)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train: ['https://h/a?sig=1']", "data.train: 'https://h/a?sig=***': https is off: set data.remote.allow: [ht"),
        ("val: [a.tar, http://h/a.tar]", "data.val: 'http://h/a.tar': http is off: set data.remote.allow: [http] if"),
        ("test: ['pipe:cat a']", "data.test: 'pipe:cat a': pipe is off: set data.remote.allow: [pipe] and data.remote"),
        ("train: [hf://a/b.tar]", "data.train: 'hf://a/b.tar': hf:// is not read, only local paths, s3://, https://, "),
        ("remote: {allow: [pipe]}", "data.remote.allow: a pipe's output is kept on disk: set data.remote.cache_dir"),
        ("remote: {cache_gib: 9}", "data.remote.cache_gib: limits a cache that is off: set data.remote.cache_dir to a"),
        ("remote: {allow: [ftp]}", "data.remote.allow[0]: expected 'http', 'https' or 'pipe', got 'ftp'"),
        ("remote: {retrys: 1}", "unknown key 'data.remote.retrys'; did you mean 'retries'?"),
        ("remote: {cache_dir: x, cache_gib: 0}", "data.remote.cache_gib: expected a number greater than 0"),
    ],
)
def test_shards_from_elsewhere_are_allowed_by_name(write_recipe: WriteRecipe, line: str, message: str) -> None:
    assert errors_of(write_recipe(MINIMAL + f"data:\n  {line}\n")).startswith(f"a.yaml:6: {message}")


def test_shards_from_elsewhere_that_are_allowed(write_recipe: WriteRecipe) -> None:
    lines = (
        "data: {train: [s3://b/a.tar, https://h/a.tar], remote: {allow: [https, pipe], cache_dir: x, cache_gib: 9}}\n"
    )
    assert load_recipe(write_recipe(MINIMAL + lines)).recipe.stage1.data.remote.cache_gib == 9
    assert (
        load_recipe(write_recipe(MINIMAL + "data: {train: [s3://b/a-*.tar]}\n")).recipe.stage1.data.remote.allow == []
    )


def test_synonym_of_a_sibling(write_recipe: WriteRecipe) -> None:
    error = errors_of(write_recipe(MINIMAL.replace("{lr: 0.1}", "\n  lr: 0.1\n  learning_rate: 1")))
    assert error == "a.yaml:4: unknown key 'optimizer.learning_rate'; did you mean 'lr'?"


def test_all_errors_are_listed_once_each(write_recipe: WriteRecipe) -> None:
    text = MINIMAL + "batch: {size: x}\nseed: y\nstage2: {frames: 8}\nimage: {frames: 2}\n"
    assert errors_of(write_recipe(text)).splitlines() == [
        "a.yaml:6: seed: expected a whole number, got 'y'",
        "a.yaml:5: batch.size: expected a whole number, got 'x'",
    ]
    many = MINIMAL + "".join(f"q{i}: 1\n" for i in range(14))
    assert errors_of(write_recipe(many)).splitlines()[10:] == ["... and 4 more"]


def test_missing_blocks_and_stages(write_recipe: WriteRecipe) -> None:
    text = "model: {size: tiny, classes: 10}\nschedule: {epochs: 2}\n"
    error = errors_of(write_recipe(text + "stage1: {frames: 4}\n"))
    assert error == "a.yaml:3: stage1: 'optimizer' is missing (it may also stand at the top level)"
    assert errors_of(write_recipe(text)) == "a.yaml: a recipe needs at least one of image, stage1, stage2"
    assert "no such recipe" not in errors_of(write_recipe(""))
    assert errors_of(write_recipe(MINIMAL.replace("stage1", "stage2"))).startswith(
        "a.yaml:4: stage2: starts from stage1"
    )
    error = errors_of(write_recipe(MINIMAL.replace("{frames: 4}", "{image_checkpoint: stage:image}")))
    assert error == "a.yaml:4: stage1: image_checkpoint is stage:image, but there is no image block"
    error = errors_of(write_recipe(MINIMAL.replace("lr: 0.1", "momentum: 0.1") + "stage2: {frames: 8}\n"))
    assert error == "a.yaml:2: optimizer: 'lr' is missing"


SWEPT = MINIMAL + "stage2: {frames: 8, cache: {views: 1}}\n"


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (
            "{optimizer.lr.x: [1.0]}",
            "cannot vary 'optimizer.lr.x'; as one key with dots it can vary adapter.hidden",
        ),
        ("{optimizer.block.key: [1]}", "cannot vary 'optimizer.block.key'"),
        ("{optimizer.: [1]}", "cannot vary 'optimizer.'"),
        ("{optimizer.rate: [1]}", "optimizer.momentum"),
        ("{seed: [0.5]}", "seed 0.5: "),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_one_line(write_recipe: WriteRecipe, sweep: str, message: str) -> None:
    said = errors_of(write_recipe(SWEPT), f"sweep={sweep}")
    assert message in said
    assert "\n" not in said


def test_a_sweep_of_millions_is_refused_before_it_is_made(write_recipe: WriteRecipe) -> None:
    many = {key: list(range(1, 1001)) for key in ("optimizer.eps", "seed", "model.temporal_depth")}
    assert "has 1000000000 members, at most 1024" in errors_of(write_recipe(SWEPT), f"sweep={many}")
