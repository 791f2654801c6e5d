"""EPIC-Kitchens-100 in small: lists in their true form over generated videos, packed by `sfa pack`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from data_samples import encode

from sfa_dist.tools.cli import main

NOUNS, VERBS = 4, 3  # That occur; the class lists are the official 300 and 97.
TRAIN, VALIDATION = 24, 10
FRAMES = 10  # Of an action, at 10 frames a second.
HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
)

RECIPE = """\
model:
  {size: tiny, width: 24, depth: 1, heads: 2, mlp: 32, patch: 8, image_size: 16, temporal_depth: 1,
   class_heads: {noun: 300, verb: 97}}
data:
  train: ["shards/train-*.tar"]
  val: ["shards/validation-*.tar"]
  stride: 1
  resize: 20
  workers: 0
  decoder: pyav
batch: {size: 8, micro: 2}
optimizer: {name: sgd, lr: 0.5, label_smoothing: 0.2}
schedule: {epochs: 3, warmup_epochs: 0.5}
engine: {precision: fp32}
stage1:
  frames: 4
stage2:
  frames: 8
  chunk_frames: 4
test: {temporal_views: 2, spatial_views: 3, also_views: [[1, 1]]}
log: {every: 1, wandb: "off"}
"""


def make_epic(folder: Path) -> Path:
    """Videos, csv files, packed shards and a recipe, `t.yaml`."""
    for name, actions, seed in (("train", TRAIN, 0), ("validation", VALIDATION, 1)):
        _write(folder, name, actions, seed)
        words = ["pack", f"{folder}/EPIC_100_{name}.csv", f"{folder}/shards", "--videos", f"{folder}/videos"]
        assert main([*words, "--prefix", name, "--shard-size", "6", "--workers", "0", "--decoder", "pyav"]) == 0
    (folder / "t.yaml").write_text(RECIPE)
    return folder


def _write(folder: Path, name: str, actions: int, seed: int) -> None:
    """One long video and its list: the noun is the level of grey, the verb how it changes."""
    rng = np.random.default_rng(seed)
    video, frames, rows = f"P{seed + 1:02d}_01", [], []
    for number in range(actions):
        noun, verb = number % NOUNS, number % VERBS
        levels = 50 + 45 * noun + np.arange(FRAMES) * (verb - 1) * 4
        noise = rng.normal(0, 12, (FRAMES, 32, 32, 3))
        frames += list(np.clip(levels[:, None, None, None] + noise, 0, 255).astype(np.uint8))
        start, stop = (f"00:00:{(number + edge) * FRAMES / 10:05.2f}" for edge in (0, 1))
        place = (
            f"{video}_{number},P{seed + 1:02d},{video},{start},{start},{stop},{number * FRAMES},{number * FRAMES + 9}"
        )
        rows.append(f"{place},do thing,v{verb},{verb + 5},n{noun},{noun + 7},\"['n{noun}']\",[{noun + 7}]\n")
    path = folder / "videos" / f"P{seed + 1:02d}" / "videos" / f"{video}.MP4"
    path.parent.mkdir(parents=True)
    path.write_bytes(encode(frames))
    (folder / f"EPIC_100_{name}.csv").write_text(HEADER + "".join(rows))
