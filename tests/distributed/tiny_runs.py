"""A recipe and clips so small that a whole run takes two seconds, and what to read from its run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from data_samples import encode, write_shard

TRAIN_CLIPS, VAL_CLIPS, CLASSES, BATCH = 24, 9, 3, 8
STEPS_PER_EPOCH = TRAIN_CLIPS // BATCH

RECIPE = """\
model: {size: tiny, width: 24, depth: 1, heads: 2, mlp: 32, patch: 8, image_size: 16, temporal_depth: 1, classes: 3}
data:
  train: ["train/*.tar"]
  val: ["val/*.tar"]
  stride: 1
  resize: 20
  workers: 0
  decoder: pyav
batch: {size: 8, micro: 2}
optimizer: {name: sgd, lr: 0.3}
schedule: {epochs: 2, warmup_epochs: 0.5}
engine: {precision: fp32}
image:
  frames: 2
  data: {stride: 0}
  schedule: {epochs: 1}
stage1:
  frames: 4
  image_checkpoint: stage:image
stage2:
  frames: 8
  chunk_frames: 4
test: {shuffled_frames: true, temporal_views: 2}
log: {every: 1, wandb: "off"}
"""

STAGES = ("image", "stage1", "stage2")
START = ("--recipe", "t.yaml", "--run-dir")

# One epoch, without the image stage.
SHORT = RECIPE[: RECIPE.index("image:\n")].replace("epochs: 2", "epochs: 1") + (
    'stage1: {frames: 4}\nstage2: {frames: 8, chunk_frames: 4}\nlog: {every: 1, wandb: "off"}\n'
)

# contract.md
TRAIN_KEYS = {
    *("kind", "stage", "step", "epoch", "samples_seen", "loss", "lr", "grad_norm", "step_time", "data_time"),
    *("samples_per_second", "memory_gib", "mfu", "bad_samples"),
}
EVAL_KEYS = {"kind", "stage", "step", "acc1", "acc5", "loss", "samples", "views"}


def write_clips(folder: Path, clips: int, seed: int, classes: int = CLASSES) -> None:
    """Two shards of noisy 16 x 16 videos; a class is a level of grey and which way it changes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    samples: list[tuple[str, bytes, object]] = []
    for number in range(clips):
        label = number % classes
        levels = 60 + 60 * label + np.arange(10) * (4 if label % 2 else -4)
        noise = rng.normal(0, 20, (10, 16, 16, 3))
        frames = list(np.clip(levels[:, None, None, None] + noise, 0, 255).astype(np.uint8))
        samples.append((f"clip{number:03d}", encode(frames), label))
    half = clips // 2
    write_shard(folder / "part-000000.tar", samples[:half])
    write_shard(folder / "part-000001.tar", samples[half:])


def make_workplace(folder: Path, recipe: str = RECIPE) -> Path:
    """A folder with shards and a recipe, `t.yaml`, to start runs in."""
    write_clips(folder / "train", TRAIN_CLIPS, seed=0)
    write_clips(folder / "val", VAL_CLIPS, seed=1)
    (folder / "t.yaml").write_text(recipe)
    return folder


def sets(*overrides: str) -> list[str]:
    """`a=1` -> --set a=1."""
    return [word for override in overrides for word in ("--set", override)]


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text())


def log_lines(run: Path) -> list[dict[str, Any]]:
    """All of log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """The events of one name."""
    return [line for line in log_lines(run) if line["kind"] == "event" and line["event"] == name]


def losses(run: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """(loss, gradient norm) by (stage, step). A step that was run twice must have given the same twice."""
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for line in log_lines(run):
        if line["kind"] == "train":
            key, value = (line["stage"], line["step"]), (line["loss"], line["grad_norm"])
            assert found.setdefault(key, value) == value, f"{key} differs when it is run again"
    return found


def scores(run: Path) -> list[tuple[Any, ...]]:
    """What every evaluation found, each counted once."""
    keys = ("stage", "step", "acc1", "acc5", "loss", "samples")
    lines = [tuple(line[key] for key in keys) for line in log_lines(run) if line["kind"] == "eval"]
    return list(dict.fromkeys(lines))
