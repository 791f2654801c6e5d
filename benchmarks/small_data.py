"""What a user's few hundred clips become, by the README alone: pack, init, train, over several seeds.

    python benchmarks/small_data.py own list.csv --seeds 5

Trains the recipe that `sfa init` writes with each seed and reports the test's top-1: mean, deviation, 95 % interval of
the mean (Student's t), guessing, and the control: the same test with the frames of each clip in random order. Its
CPU-seconds are those of the whole training command, with start, decoding, test and report. A finished seed is not run
again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import add_options, positive, report, script, tree_clock

from sfa_dist.run.intervals import over_seeds

HEAD = ["seed", "top-1", "frames shuffled", "by guessing", "CPU-s"]


def sfa(*words: str) -> float:
    """Runs a command of the package and returns its CPU-seconds. Raises CalledProcessError."""
    before = tree_clock()
    subprocess.run([sys.executable, "-m", "sfa_dist.tools.cli", *words], check=True, stdout=subprocess.DEVNULL)
    return tree_clock() - before


def prepare(folder: Path, clips: Path) -> Path:
    """Packs both splits and writes the recipe; returns its path."""
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        for split in ("train", "test"):
            sfa("pack", str(clips), str(folder / "shards"), "--split-column", "split", "--split", split)
        sfa("init", str(recipe), "--shards", str(folder / "shards"))
    return recipe


def train(folder: Path, recipe: Path, seed: int, keys: list[str]) -> dict[str, Any]:
    """The result of one seed, and its CPU-seconds."""
    run, cost = folder / f"seed{seed}", folder / f"seed{seed}.json"
    if not cost.exists():
        words = [word for key in (f"seed={seed}", *keys) for word in ("--set", key)]
        seconds = sfa("train", "--recipe", str(recipe), "--run-dir", str(run), *words)
        cost.write_text(json.dumps({"cpu": seconds}))
    return {**json.loads((run / "result.json").read_text()), **json.loads(cost.read_text()), "seed": seed}


def main() -> None:
    """Trains all seeds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where shards, recipe and runs go")
    parser.add_argument("clips", type=Path, help="list.csv with the columns path, label and split (train or test)")
    parser.add_argument("--seeds", type=positive, default=5, help="(default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    add_options(parser)
    arguments = parser.parse_args()
    recipe = prepare(arguments.folder, arguments.clips)
    results = [train(arguments.folder, recipe, seed, arguments.set) for seed in range(arguments.seeds)]
    keys = ("seed", "acc1", "acc1_shuffled_frames", "chance_acc1", "cpu")
    rows = [[result[key] for key in keys] for result in results]
    rows.append(["mean", *(statistics.mean(column) for column in list(zip(*rows, strict=True))[1:])])
    title = f"{arguments.folder.name}, {results[0]['samples']} test clips"
    if len(results) > 1:
        mean, deviation, half = over_seeds([result["acc1"] for result in results])
        title += f": top-1 {mean:.4f}, deviation {deviation:.4f}, 95 % interval of the mean "
        title += f"{mean - half:.4f} to {min(1.0, mean + half):.4f}"
    report(arguments, title, HEAD, rows)


if __name__ == "__main__":
    script(main)
