"""The data sets from their owners' lists to a test: packed, trained in both stages by their own recipes, scored.

Lists are in their true forms, clips are drawn, and the recipes are those that are shipped with a tiny model and few
frames. EPIC-Kitchens-100, which has two heads, has a file of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, train
from data_samples import encode
from tiny_runs import log_lines, sets

from sfa_dist.tools.cli import main

TRAIN, VAL = 8, 4
TINY = sets(
    *("model.size=tiny", "model.width=24", "model.depth=1", "model.heads=2", "model.mlp=32", "model.patch=8"),
    *("model.temporal_depth=1", "model.image_size=16", "data.resize=20", "data.workers=0", "data.decoder=pyav"),
    *("batch.size=4", "batch.micro=2", "schedule.epochs=1", "schedule.warmup_epochs=0.5", "engine.precision=fp32"),
    *("optimizer.lr=0.05", "stage1.frames=4", "stage1.image_checkpoint=null", "log.every=1", "log.wandb=off"),
)
TINY_STAGE_2 = sets("stage2.frames=8", "stage2.chunk_frames=4")

Clip = tuple[str, int]  # Name and class.


@dataclass(frozen=True)
class Kind:
    """One data set: what a clip's file and its list are called, and how the list is written."""

    folder: str
    classes: tuple[str, ...]
    name: Callable[[int], str]
    file: Callable[[str, str], str]  # Of a clip's name and class.
    write: Callable[[Path, Sequence[Clip], tuple[str, ...]], None]
    lists: tuple[str, str]
    options: tuple[str, ...] = ()  # Of sfa pack, with {} for the folder of the lists.


def write_kinetics(path: Path, clips: Sequence[Clip], classes: tuple[str, ...]) -> None:
    split = "train" if "train" in path.name else "val"
    lines = [f'"{classes[label]}",{name},7,17,{split}' for name, label in clips]
    path.write_text("\n".join(["label,youtube_id,time_start,time_end,split", *lines]) + "\n")


def write_moments(path: Path, clips: Sequence[Clip], classes: tuple[str, ...]) -> None:
    path.write_text("".join(f"{classes[label]}/{name}.mp4,{classes[label]},3,0\n" for name, label in clips))
    names = "".join(f"{name},{number}\n" for number, name in enumerate(classes))
    (path.parent / "moments_categories.txt").write_text(names)


def write_something(
    path: Path, clips: Sequence[Clip], classes: tuple[str, ...], *, labels: str = "labels.json"
) -> None:
    entries = [
        {
            "id": name,
            "label": classes[label].replace("something", "a cup"),
            "template": classes[label].replace("something", "[something]"),
            "placeholders": ["a cup"],
        }
        for name, label in clips
    ]
    path.write_text(json.dumps(entries))
    (path.parent / labels).write_text(json.dumps({name: str(number) for number, name in enumerate(classes)}))


SOMETHING = ("Closing something", "Moving something from left to right", "Moving something from right to left")
KINDS = {
    "kinetics400": Kind(
        "kinetics400",
        ("abseiling", "air drumming", "zumba"),
        lambda number: f"-0I_abcde{number:02d}",
        lambda name, label: f"{label.replace(' ', '_')}/{name}_000007_000017.mp4",
        write_kinetics,
        ("train.csv", "validate.csv"),
    ),
    "moments_in_time": Kind(
        "moments_in_time",
        ("adult+female+singing", "clapping", "yawning"),
        lambda number: f"yt-{number}_13",
        lambda name, label: f"{'training' if int(name[3:-3]) < TRAIN else 'validation'}/{label}/{name}.mp4",
        write_moments,
        ("trainingSet.csv", "validationSet.csv"),
        ("--classes", "{}/moments_categories.txt"),
    ),
    "something_something_v2": Kind(
        "something_something_v2",
        SOMETHING,
        lambda number: str(78000 + number),
        lambda name, label: f"{name}.mp4",
        write_something,
        ("something-something-v2-train.json", "something-something-v2-validation.json"),
    ),
    "something_else": Kind(
        "something_else",
        SOMETHING,
        lambda number: str(91000 + number),
        lambda name, label: f"{name}.mp4",
        write_something,
        ("train.json", "validation.json"),
    ),
    "few_shot_base": Kind(
        "something_else/few_shot_base",
        SOMETHING[:2],
        lambda number: str(12000 + number),
        lambda name, label: f"{name}.mp4",
        partial(write_something, labels="base_labels.json"),
        ("base_training_set.json", "base_validation_set.json"),
        ("--classes", "{}/base_labels.json"),
    ),
    "few_shot_5": Kind(
        "something_else/few_shot_5",
        ("Tipping something over", "Tearing something into two pieces", "Folding something"),
        lambda number: str(45000 + number),
        lambda name, label: f"{name}.mp4",
        partial(write_something, labels="finetune_labels.json"),
        ("finetune_5shot_training.json", "finetune_5shot_validation.json"),
        ("--classes", "{}/finetune_labels.json"),
    ),
}


def write_clip(path: Path, number: int, label: int) -> None:
    """A noisy clip of 12 frames, 32 x 24 pixels, brighter or darker in time by its class; no two are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).normal(0, 15, (12, 24, 32, 3))
    levels = 70 + 60 * label + np.arange(12) * (5 if label % 2 else -5)
    path.write_bytes(encode(list(np.clip(levels[:, None, None, None] + noise, 0, 255).astype(np.uint8))))


def pack_kind(place: Path, kind: Kind) -> None:
    """Draws clips, writes their lists, and packs both splits by the command of docs/datasets.md."""
    official, out = place / "official" / kind.folder, place / "data" / kind.folder
    clips = [(kind.name(number), number % len(kind.classes)) for number in range(TRAIN + VAL)]
    for number, (name, label) in enumerate(clips):
        write_clip(official / "videos" / kind.file(name, kind.classes[label]), number, label)
    options = [option.format(official) for option in kind.options]
    for source, split, prefix in zip(kind.lists, (clips[:TRAIN], clips[TRAIN:]), ("train", "val"), strict=True):
        kind.write(official / source, split, kind.classes)
        videos = ["--videos", str(official / "videos"), "--prefix", prefix]
        assert main(["pack", str(official / source), str(out), *videos, *options]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["samples"] == TRAIN + VAL


def run(place: Path, recipe: str, *overrides: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Trains a shipped recipe, tiny, as its header says: into runs/<its name>. Returns result and log."""
    stage_2 = () if recipe.endswith("_baseline") else TINY_STAGE_2
    path = ROOT / "recipes" / f"{recipe}.yaml"
    finished = train(place, "--recipe", str(path), *TINY, *stage_2, *sets(*overrides), SFA_DATA=str(place / "data"))
    assert finished.code == 0, finished.err + finished.out
    folder = place / "runs" / (path.stem if recipe == "l_128f" else recipe.replace("/", "_"))
    return json.loads((folder / "result.json").read_text()), log_lines(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="module")
def packed(place: Path) -> Path:
    for kind in KINDS.values():
        pack_kind(place, kind)
    return place


def assert_trained_and_tested(result: dict[str, Any], log: list[dict[str, Any]], stages: Sequence[str]) -> None:
    """Each clip once an epoch, no bad one, and the protocol of the tables: one view of each test clip."""
    assert list(result["stages"]) == list(stages)
    assert all(result["stages"][stage]["steps"] == TRAIN // 4 for stage in stages)
    assert all(result["stages"][stage]["samples_seen"] == TRAIN for stage in stages)
    assert all(result["stages"][stage]["bad_samples"] == 0 for stage in stages)
    assert (result["samples"], result["views"]) == (VAL, 1)
    assert 0 <= result["acc1"] <= result["acc5"] <= 1
    losses = [line["loss"] for line in log if line["kind"] == "train"]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    "recipe",
    ["l_128f", "moments_in_time/h_96f", "something_something_v2/l_128f", "something_else/l_128f"],
    ids=["Kinetics-400", "Moments in Time", "Something-Something v2", "Something-Else"],
)
def test_from_the_official_list_to_the_test(packed: Path, recipe: str) -> None:
    assert_trained_and_tested(*run(packed, recipe), ("stage1", "stage2"))


def test_the_baseline_of_a_row(packed: Path) -> None:
    result, log = run(packed, "kinetics400/l_128f_baseline", "stage1.frames=8")
    assert_trained_and_tested(result, log, ("stage1",))
    assert result["frames"] == 8


def test_stage_1_of_another_data_set(packed: Path) -> None:
    """Table 2: the header's path is where the other recipe leaves its weights. The head is new."""
    if not (packed / "runs" / "l_128f" / "stage1" / "weights.safetensors").is_file():
        run(packed, "l_128f")
    assert_trained_and_tested(*run(packed, "something_something_v2/l_128f_from_kinetics400"), ("stage2",))


def test_few_shot_novel_classes_after_the_base_classes(packed: Path) -> None:
    base, log = run(packed, "something_else/l_128f_few_shot_base")
    assert_trained_and_tested(base, log, ("stage1", "stage2"))
    assert_trained_and_tested(*run(packed, "something_else/l_128f_5_shot"), ("stage2",))
