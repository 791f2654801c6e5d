"""What becomes of activations in end-to-end stage 1: bytes kept on the device, bytes moved, time, gradients.

    python benchmarks/activation.py
    python benchmarks/activation.py --recipe recipes/h_96f.yaml --rounds 5      (on a GPU)

Rounds are interleaved, so that all modes see the same machine; bytes are counted in a step before them.
On a CPU the time is CPU time, which what runs beside it hardly changes.
"kept" is what stands on the device between forward and backward beyond weights; on a CPU what was moved to the host is
taken off it. "moved" is told by torch's backend alone; on a CPU the other two move nothing: the device is the host.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from common import ROOT, Cell, add_options, interleave, median_ratio, report, script

from sfa_dist.models.footprint import StoragePeak
from sfa_dist.models.vivit import ViViT, build
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.engines.activation import Moved, treat_activations
from sfa_dist.parallel.environment import environment
from sfa_dist.recipe.schema import Stage1, load_recipe

WAYS = [
    ("keep", "torch"),
    *((mode, "torch") for mode in ("checkpoint", "offload", "checkpoint_offload")),
    *((mode, backend) for backend in ("fairscale", "deepspeed") for mode in ("checkpoint", "checkpoint_offload")),
]


class Way:
    """One mode and backend around its own copy of the model."""

    def __init__(self, model: ViViT, stage: Stage1, device: torch.device) -> None:
        self.model, self.device = copy.deepcopy(model).to(device).train(), device
        self.moved: Moved = treat_activations(self.model, stage)
        self.kept = 0

    def step(self, clips: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        """Forward and backward; returns the gradients. The first one counts bytes."""
        self.model.zero_grad()
        torch.manual_seed(0)
        self.moved.bytes = 0
        with nullcontext() if self.kept else StoragePeak(self.device.type) as storages:
            loss = torch.nn.functional.cross_entropy(self.model(clips), labels)
            if storages is not None:
                self.kept = storages.now - (self.moved.bytes if self.device.type == "cpu" else 0)
            loss.backward()
        return [p.grad for p in self.model.parameters() if p.grad is not None]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "b_32f.yaml")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--clips", type=int, default=1)
    add_options(parser)
    arguments = parser.parse_args()
    runtime = parallel_runtime.start(environment())
    stage = load_recipe(arguments.recipe, arguments.set, environment()).recipe.stage1
    assert stage is not None, "the recipe has no stage1"
    with torch.device("meta"):
        model = ViViT(stage.model, stage.frames)
    build(model)
    torch.nn.init.normal_(model.tail.head.weight, std=0.02)
    size = stage.model.image_size
    clips = torch.randint(0, 256, (arguments.clips, 3, stage.frames, size, size), dtype=torch.uint8)
    clips, labels = clips.to(runtime.device), torch.zeros(arguments.clips, dtype=torch.long, device=runtime.device)
    stages = [stage.model_copy(update={"activation": mode, "activation_backend": name}) for mode, name in WAYS]
    ways = {key: Way(model, each, runtime.device) for key, each in zip(WAYS, stages, strict=True)}
    wanted = ways[WAYS[0]].step(clips, labels)
    differences = {key: largest_difference(way.step(clips, labels), wanted) for key, way in ways.items()}
    seconds = interleave({key: partial(way.step, clips, labels) for key, way in ways.items()}, arguments.rounds)
    rows: list[list[Cell]] = []
    for key, way in ways.items():
        moved = way.moved.bytes / 2**20 if key[1] == "torch" else None
        time = median_ratio(seconds[key], seconds[WAYS[0]])
        rows.append([*key, way.kept / 2**20, moved, time, differences[key]])
    columns = ["activation", "backend", "kept MiB", "moved MiB", "of keep's time", "gradients differ by"]
    title = f"stage 1, {stage.model.size}, {stage.frames} frames, {arguments.clips} clip(s), fp32"
    report(arguments, title, columns, rows, seconds={" ".join(key): own for key, own in seconds.items()})
    parallel_runtime.stop()


def largest_difference(mine: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest difference of two lists of gradients."""
    return max((a - b).abs().max().item() for a, b in zip(mine, wanted, strict=True))


if __name__ == "__main__":
    script(main)
