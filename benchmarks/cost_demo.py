"""The whole training, run for real on moving digits: end to end, and by SFA live and from K cached views.

Every training stage is a child of its own, forked when all libraries are loaded, so that its processor time (its own
and that of its children) is that of training and not of imports. What is counted: stage 1, the feature cache, stage 2,
with their decoding and their checkpoints. What is not: the image checkpoint, which all share, and the test.
What is finished stands in `cost.json` of its folder and is not run again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import ROOT

from sfa_dist import train
from sfa_dist.tools import demo_data

STAGE1_FRAMES = 4
LOADED_FIRST = (
    "sfa_dist.stages.pipeline",
    "sfa_dist.parallel.engines.zero",
    "torchcodec",
    "deepspeed",
    "matplotlib.pyplot",
)


@dataclass(frozen=True)
class Sizes:
    """How large the demo is. Each stage trains for `epochs`; stage 1 sees 4 of the `frames` frames."""

    train_clips: int
    test_clips: int
    image_clips: int
    frames: int
    epochs: int
    batch: int


@dataclass(frozen=True)
class Cost:
    """Seconds of processor and of clock, for each stage that ran, and the accuracy of what came out (None: no test)."""

    cpu: dict[str, float]
    wall: dict[str, float]
    acc1: float | None


@dataclass(frozen=True)
class Demo:
    """The demo's data, keys and run directories under `folder`."""

    folder: Path
    sizes: Sizes
    keys: tuple[str, ...] = ()

    def make_data(self) -> None:
        """Packs the videos unless they are there in these sizes."""
        stamp, wanted = self.folder / "data" / "made", repr(self.sizes)
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        sizes = self.sizes
        demo_data.make(stamp.parent, sizes.train_clips, sizes.test_clips, sizes.image_clips, sizes.frames)
        stamp.write_text(wanted)

    def run(self, name: str, stages: list[str], keys: list[str]) -> Cost:
        """Runs these stages of the demo recipe in a run directory of this name, one after the other."""
        directory = self.folder / "runs" / name
        record = directory / "cost.json"
        if record.is_file():
            return Cost(**json.loads(record.read_text()))
        shutil.rmtree(directory, ignore_errors=True)  # A run that goes on would be measured from there.
        cpu: dict[str, float] = {}
        wall: dict[str, float] = {}
        for stage in stages:
            cpu[stage], wall[stage] = self._child(stage, directory, keys)
        result = directory / "result.json"
        acc1 = json.loads(result.read_text())["acc1"] if result.is_file() else None
        counted = [stage for stage in stages if stage != "test"]
        cost = Cost({each: cpu[each] for each in counted}, {each: wall[each] for each in counted}, acc1)
        record.write_text(json.dumps(vars(cost)))
        return cost

    def _child(self, stage: str, directory: Path, keys: list[str]) -> tuple[float, float]:
        """Seconds of processor and of clock of one stage, in a forked process with one thread."""
        sizes = self.sizes
        own = [f"batch={{size: {sizes.batch}, micro: {sizes.batch}}}", f"schedule.epochs={sizes.epochs}"]
        own += [f"stage2.frames={sizes.frames}", f"stage2.schedule.epochs={sizes.epochs}"] * ("stage2=null" not in keys)
        own += [
            "data.val=[]",
            "test.shuffled_frames=false",
            "checkpoint.keep=1",
            "engine.zero=0",
            "log.wandb=off",
            *self.keys,
            *keys,
        ]
        arguments = ["--recipe", str(ROOT / "recipes" / "demo.yaml"), "--run-dir", str(directory), "--stage", stage]
        arguments += [part for key in own for part in ("--set", key)]
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            _train_and_exit(arguments, directory / f"{stage}.log")
        _, status, usage = os.wait4(child, 0)
        if status:
            raise SystemExit(f"{directory.name}, {stage}: failed; see {directory / f'{stage}.log'}")
        return usage.ru_utime + usage.ru_stime, time.perf_counter() - started


def _train_and_exit(arguments: list[str], log: Path) -> None:
    """In the child: trains with all output in `log`, and ends the process with the trainer's exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    code = train.main(arguments)
    sys.stdout.flush()
    os._exit(code)


def add_demo_options(parser: argparse.ArgumentParser) -> None:
    """The folder, the seeds and the sizes, with the same defaults for all that trains the demo."""
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "cost", help="where data and runs are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=800)
    parser.add_argument("--test-clips", type=int, default=500)
    parser.add_argument("--image-clips", type=int, default=4000)
    parser.add_argument("--frames", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)


def demo_of(arguments: argparse.Namespace) -> Demo:
    """The demo that these options describe."""
    a = arguments
    sizes = Sizes(a.clips, a.test_clips, a.image_clips, a.frames, a.epochs, a.batch)
    return Demo(a.folder.resolve(), sizes)


def prepare(demo: Demo) -> list[str]:
    """Makes the data and trains the image model that everything starts from; the keys that say so."""
    os.environ["SFA_DEMO_DATA"] = str(demo.folder / "data")
    for module in LOADED_FIRST:
        importlib.import_module(module)
    demo.make_data()
    demo.run("image", ["image"], ["stage1.image_checkpoint=stage:image"])
    weights = demo.folder / "runs" / "image" / "image" / "weights.safetensors"
    return [f"stage1.image_checkpoint={weights}", "image=null"]


def train_stage1(demo: Demo, seed: int, common: list[str]) -> tuple[Cost, list[str]]:
    """Stage 1 of SFA: its cost, and the keys of what begins with it. All that needs it shares one run."""
    first = demo.run(f"stage1-{seed}", ["stage1", "test"], [*common, "stage2=null", f"stage1.frames={STAGE1_FRAMES}"])
    weights = demo.folder / "runs" / f"stage1-{seed}" / "stage1" / "weights.safetensors"
    return first, [*common, f"stage1.weights={weights}"]


def measure(demo: Demo, seeds: int, views: list[int]) -> dict[str, list[Cost]]:
    """The costs of every way and seed. SFA's contain those of its stage 1, which all ways of a seed share."""
    start = prepare(demo)
    found: dict[str, list[Cost]] = {}
    for seed in range(seeds):
        for way, cost in one_seed(demo, seed, [*start, f"seed={seed}"], views):
            found.setdefault(way, []).append(cost)
    return found


def one_seed(demo: Demo, seed: int, common: list[str], views: list[int]) -> Iterator[tuple[str, Cost]]:
    """Each way of this seed with its cost, as it is finished."""
    whole = ["stage2=null", f"stage1.frames={demo.sizes.frames}"]
    yield "end to end", demo.run(f"end-to-end-{seed}", ["stage1", "test"], [*common, *whole])
    first, given = train_stage1(demo, seed, common)
    yield "stage 1 alone", first
    live = demo.run(f"live-{seed}", ["stage2", "test"], given)
    yield "SFA live", with_stage1(live, first)
    for k in views:
        keys = [*given, f"stage2.cache.views={k}"]
        cached = demo.run(f"cached-k{k}-{seed}", ["cache", "stage2", "test"], keys)
        yield f"SFA cached, K = {k}", with_stage1(cached, first)


def with_stage1(cost: Cost, before: Cost) -> Cost:
    """The cost of both stages."""
    return Cost(before.cpu | cost.cpu, before.wall | cost.wall, cost.acc1)
