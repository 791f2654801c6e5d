"""What a trunk in fewer bits does to accuracy: stage 2 on features of fp32, bf16, int8 and fp8 trunks, same weights.

    python benchmarks/precision.py                          # after `cost.py demo` 6 minutes, without it 15
    python benchmarks/precision.py --seeds 1 --precisions auto int8

Moving digits as in cost.py, whose data and stage 1 it shares: for each seed one stage 1, and for each precision a
feature cache of one view, a stage 2 and the test, whose trunk has that precision too. `auto` is the engine's, fp32.
Differences are within a seed; the cosine is that of every stored feature with the one of `auto`. What is finished is
not run again.

A recipe refuses fp8 on a device that has no units for it, where it would only be slow. Its arithmetic is the same, so
its accuracy is measured here on any device.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import cost_demo
import numpy as np
import torch
import torch.nn.functional as F
import webdataset as wds
from common import Cell, add_options, report, script
from torch import Tensor

from sfa_dist.recipe.schema import Stage2
from sfa_dist.stages import trunk_fidelity, trunk_setup

PRECISIONS = ("auto", "bf16", "int8", "fp8")
FAR = 0.99  # A cosine below it is counted: the mean hides a few features that are others.
SCORES = ("top-1", "sd over seeds", "difference of each seed", "test loss")
COLUMNS = ("trunk", *SCORES, "mean cosine", "least", f"below {FAR}")


def let_fp8_run_anywhere() -> None:
    """Takes the check for fp8 units away, in this process and in those that it forks."""

    def take_any(stage: Stage2, device: torch.device) -> None:
        del stage, device

    for module in (trunk_setup, trunk_fidelity):
        module.require_units = take_any  # type: ignore[attr-defined]


def train(demo: cost_demo.Demo, seed: int, precision: str, keys: list[str]) -> Path:
    """Cache, stage 2 and test with a trunk in this precision; the run directory."""
    name = f"precision-{precision}-{seed}"
    own = [f"stage2.trunk_precision={precision}", "stage2.cache.views=1"]
    demo.run(name, ["cache", "stage2", "test"], [*keys, *own])
    return demo.folder / "runs" / name


def test_scores(run: Path) -> tuple[float, float]:
    """(top-1, loss) of the run's test."""
    events = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    last = [event for event in events if event["kind"] == "eval" and event["stage"] == "test"][-1]
    return last["acc1"], last["loss"]


def stored_features(run: Path) -> Iterator[Tensor]:
    """The cached features (steps, width) of each training video, fp32, in the order of the shards."""
    shards = sorted(map(str, (run / "cache" / "train" / "view-00").glob("*.tar")))
    for sample in wds.WebDataset(shards, shardshuffle=False):
        stored = torch.from_numpy(np.load(io.BytesIO(sample["features.npy"]), allow_pickle=False))
        yield stored.view(torch.bfloat16).float() if stored.dtype == torch.uint16 else stored


def cosines(run: Path, base: Path) -> Tensor:
    """One cosine for each stored feature of two runs over the same videos."""
    pairs = zip(stored_features(run), stored_features(base), strict=True)
    return torch.cat([F.cosine_similarity(own, other, dim=-1) for own, other in pairs])


def row(precision: str, runs: list[Path], base: list[Path]) -> list[Cell]:
    """The cells of one precision over all seeds."""
    scores, others = [test_scores(run) for run in runs], [test_scores(run) for run in base]
    top1 = [score for score, _ in scores]
    deviation = round(statistics.stdev(top1), 4) if len(top1) > 1 else None
    differences = ", ".join(f"{own - other:+.3f}" for (own, _), (other, _) in zip(scores, others, strict=True))
    loss = statistics.mean(loss for _, loss in scores)
    near = torch.cat([cosines(run, other) for run, other in zip(runs, base, strict=True)])
    found = [f"{near.mean():.5f}", f"{near.min():.5f}", f"{(near < FAR).float().mean():.2%}"]
    return [precision, round(statistics.mean(top1), 4), deviation, differences, loss, *found]


def main() -> None:
    """Trains what is not trained yet, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cost_demo.add_demo_options(parser)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="auto first")
    add_options(parser, rounds=None)
    arguments = parser.parse_args()
    if arguments.precisions[0] != "auto":
        parser.error("--precisions: the first is auto, which the others are compared with")
    let_fp8_run_anywhere()
    demo = cost_demo.demo_of(arguments)
    start = cost_demo.prepare(demo)
    runs: dict[str, list[Path]] = {precision: [] for precision in arguments.precisions}
    for seed in range(arguments.seeds):
        _, keys = cost_demo.train_stage1(demo, seed, [*start, f"seed={seed}"])
        for precision, found in runs.items():
            found.append(train(demo, seed, precision, keys))
    rows = [row(precision, found, runs["auto"]) for precision, found in runs.items()]
    title = f"moving digits, {arguments.clips} clips of {arguments.frames} frames, {arguments.test_clips} of the test, "
    title += f"{arguments.epochs} epochs on one cached view, {arguments.seeds} seed(s)"
    scores = {precision: [test_scores(run) for run in found] for precision, found in runs.items()}
    report(arguments, title, COLUMNS, rows, top1_and_loss=scores)


if __name__ == "__main__":
    script(main)
