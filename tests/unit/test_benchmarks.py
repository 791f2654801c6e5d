"""Benchmarks that compare: what they put side by side is the same thing, and each runs in a tiny size."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cached_samples
import data_samples
import pytest
import torch

from sfa_dist.data.shards.shard_index import load_index

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def against_timm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as a script sees it: its folder is on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("against_timm")


@pytest.fixture
def precision(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As above."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("precision")


def run_tiny(tmp_path: Path, name: str, *arguments: str) -> dict[str, Any]:
    """The JSON that a benchmark writes, run as a user runs it."""
    out = tmp_path / f"{name}.json"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(out.read_text())
    return told


@pytest.mark.slow
def test_a_wrong_key_is_one_line_and_a_cached_recipe_runs_live(tmp_path: Path) -> None:
    """What is measured beside a plan is what was planned: a live trunk."""
    recipes = BENCHMARKS.parent / "recipes"
    program = [sys.executable, str(BENCHMARKS / "one_step.py"), "--recipe"]
    wrong = subprocess.run(
        [*program, str(recipes / "b_32f.yaml"), "--set", "stage2.frames=7"], capture_output=True, text=True, timeout=200
    )
    assert wrong.returncode == 78
    assert any(line.startswith("error: ") and "multiple of model.tubelet" in line for line in wrong.stderr.splitlines())
    assert "Traceback" not in wrong.stderr
    wide = ("model.width=384", "model.depth=12", "model.heads=6", "model.mlp=1536", "model.temporal_depth=1")
    tiny = ("model.size=tiny", "model.image_size=32", "data.resize=32", "stage2.frames=4", *wide)
    own = [word for key in tiny for word in ("--set", key)]
    told = run_tiny(tmp_path, "one_step", "--recipe", str(recipes / "l_128f_cached.yaml"), *own)
    [planned] = [row[told["columns"].index("planned")] for row in told["rows"]]
    assert planned > 21e6 * 2 / 2**30  # GiB: the trunk's weights in bf16 are in it.


def test_outputs_and_gradients_are_timms(against_timm: ModuleType) -> None:
    torch.manual_seed(0)
    models, side = against_timm.both("tiny", "fp32", torch.device("cpu"))
    images = torch.randn(3, 3, side, side)
    outputs, gradients = {}, {}
    for name, model in models.items():
        own = images.clone().requires_grad_()
        outputs[name] = model(own)
        outputs[name].square().sum().backward()
        gradients[name] = own.grad
    assert outputs["timm"].std() > 0.1
    torch.testing.assert_close(outputs["ours"], outputs["timm"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients["ours"], gradients["timm"], atol=1e-5, rtol=1e-4)
    ours, theirs = models["ours"].trunk, models["timm"]
    for block, other in zip(ours.encoder.blocks, theirs.blocks, strict=True):
        torch.testing.assert_close(block.attn.qkv.weight.grad, other.attn.qkv.weight.grad, atol=1e-5, rtol=1e-4)
    embed, other = ours.embed.weight.grad.squeeze(2), theirs.patch_embed.proj.weight.grad
    torch.testing.assert_close(embed, other, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_each_prints_its_rows(tmp_path: Path) -> None:
    small = ["--set", "model={size: tiny, image_size: 32, temporal_depth: 1}", "--set", "engine.precision=fp32"]
    told = run_tiny(tmp_path, "against_timm", "--sizes", "tiny", "--rounds", "1")
    assert [row[2] for row in told["rows"]] == ["forward", "step"] * (len(told["rows"]) // 2)
    told = run_tiny(tmp_path, "augment", "--frames", "2", "--rounds", "1")
    assert [row[0] for row in told["rows"]] == [
        size for size in ("340 x 256", "320 x 240", "32 x 32") for _ in range(6)
    ]
    told = run_tiny(tmp_path, "loader", "--clips", "40", "--rounds", "1", "--batch", "4", *small)
    assert [row[0] for row in told["rows"]] == [
        "bytes",
        "webdataset",
        "stream, 0 workers",
        "stream, 1 workers",
        "step",
    ]
    share = dict(zip(told["columns"], told["rows"][2], strict=True))["of a step"]
    assert 0 < share < 1000


def test_cosines_are_of_the_same_videos_whatever_the_dtype(precision: ModuleType, tmp_path: Path) -> None:
    source = load_index(data_samples.write_shards(tmp_path, [4, 2]))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        cached_samples.make_split(tmp_path / name / "cache" / "train", source, phases=1, dtype=dtype)
    own, other = tmp_path / "bf16", tmp_path / "fp32"
    features = list(precision.stored_features(other))
    assert len(features) == 6
    near = precision.cosines(own, other)
    assert near.shape == (sum(map(len, features)),)
    assert 0.999 < near.min() < 1 - 1e-7
    assert precision.cosines(other, other).min() > 1 - 1e-6


def test_index_load_reports_that_few_samples_have_no_copy() -> None:
    program = [sys.executable, str(BENCHMARKS / "index_load.py"), "--samples", "1001", "--rounds", "1"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *_, of_text, of_copy = done.stdout.splitlines()
    assert of_text.startswith("| index.json | 0.1 MiB |")
    assert of_copy == "| index.npz | none, below 50000 samples | - | - | - |"


@pytest.mark.slow
def test_precision_trains_and_compares(tmp_path: Path) -> None:
    """fp8 too: a recipe refuses it on a CPU, its arithmetic runs there."""
    sizes = ["--clips", "16", "--test-clips", "8", "--image-clips", "16", "--frames", "8", "--batch", "8"]
    own = ["--folder", str(tmp_path / "runs"), "--seeds", "1", "--epochs", "1", "--precisions", "auto", "fp8"]
    told = run_tiny(tmp_path, "precision", *own, *sizes)
    assert [row[0] for row in told["rows"]] == ["auto", "fp8"]
    assert told["rows"][0][3:] == ["+0.000", told["rows"][0][4], "1.00000", "1.00000", "0.00%"]
    assert 0.9 < float(told["rows"][1][6]) < 0.99999


def test_the_demo_curve_has_the_points_of_both_stages(tmp_path: Path) -> None:
    """Stage 2 begins where stage 1 ends; seconds are those of the steps."""
    train = {"kind": "train", "step_time": 2.0, "loss": 1.0}
    evaluation = {"kind": "eval", "views": 1}
    records = [
        record | {"stage": stage, "step": step, "acc1": score}
        for stage, scores in (("stage1", (0.2, 0.5)), ("stage2", (0.6, 0.8)))
        for step, score in zip((5, 10), scores, strict=True)
        for record in (train, evaluation)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "result.json").write_text(json.dumps({"acc1": 0.8, "acc1_shuffled_frames": 0.3, "chance_acc1": 0.05}))
    (tmp_path / "env.json").write_text(json.dumps({"ranks": [{"device": "a CPU"}]}))
    command = [sys.executable, str(BENCHMARKS / "demo_curve.py"), str(tmp_path), str(tmp_path / "demo.svg")]
    command += ["--note", "2 ranks on a CPU"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-4:] == [
        "| stage1 | 10 | 0.200 |",
        "| stage1 | 20 | 0.500 |",
        "| stage2 | 30 | 0.600 |",
        "| stage2 | 40 | 0.800 |",
    ]
    picture = (tmp_path / "demo.svg").read_text()
    assert "seconds of training" in picture
    assert "2 ranks on a CPU" in picture


def test_the_two_classes_of_reversed_motion_have_the_same_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    made = importlib.import_module("reversed_motion")
    made.make(tmp_path / "set", paths={"train": 2, "test": 1})
    lines = (tmp_path / "set" / "list.csv").read_text().split()
    assert [line.split(",")[1:] for line in lines[1:]] == [
        *[["clockwise", "train"], ["counter_clockwise", "train"]] * 2,
        *[["clockwise", "test"], ["counter_clockwise", "test"]],
    ]
    assert all((tmp_path / "set" / line.split(",")[0]).stat().st_size for line in lines[1:])
    rng = made.np.random.default_rng(0)
    centres, scene = made.path(rng), made.ground(rng)
    x, y = (centres - centres.mean(axis=0)).T
    assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0  # Clockwise, as y grows downwards.
    digit, colour = made.digit_images()[0][0], scene[0, 0]
    forward, backward = (made.draw(way, digit, scene, colour) for way in (centres, centres[::-1]))
    assert (forward[::-1] == backward).all()
    assert (forward[0] != forward[8]).any()
