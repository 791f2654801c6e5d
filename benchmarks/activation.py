"""What becomes of activations in end-to-end stage 1: bytes kept on the device, bytes moved, time, gradients.

    PYTHONPATH=. python benchmarks/activation.py
    PYTHONPATH=. python benchmarks/activation.py --recipe recipes/h_96f.yaml --rounds 5      (on a GPU)

Rounds are interleaved, so that all modes see the same machine; bytes are counted in the first, which is not timed.
On a CPU the time is CPU time, which what runs beside it hardly changes.
"kept" is what stands on the device between forward and backward beyond weights; on a CPU what was moved to the host is
taken off it. "moved" is told by torch's backend alone; on a CPU the other two move nothing: the device is the host.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sfa_dist.models.footprint import StoragePeak
from sfa_dist.models.vivit import ViViT, build
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.activation import Moved, treat_activations
from sfa_dist.parallel.environment import environment
from sfa_dist.recipe import Stage1, load_recipe

ROOT = Path(__file__).resolve().parents[1]
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
        self.seconds: list[float] = []
        self.kept = 0

    def step(self, clips: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        """Forward and backward, timed; returns the gradients."""
        self.model.zero_grad()
        torch.manual_seed(0)
        self.moved.bytes = 0
        self._synchronize()
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        started = clock()
        with nullcontext() if self.kept else StoragePeak(self.device.type) as storages:
            loss = torch.nn.functional.cross_entropy(self.model(clips), labels)
            if storages is not None:
                self.kept = storages.now - (self.moved.bytes if self.device.type == "cpu" else 0)
            loss.backward()
        self._synchronize()
        self.seconds.append(clock() - started)
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "b_32f.yaml")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
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
    ways = [Way(model, each, runtime.device) for each in stages]
    differences = [0.0] * len(ways)
    for _ in range(arguments.rounds + 1):
        wanted = ways[0].step(clips, labels)
        for place, way in enumerate(ways[1:], 1):
            differences[place] = max(differences[place], largest_difference(way.step(clips, labels), wanted))
    print_table(
        ways, differences, f"{stage.model.size}, {stage.frames} frames, {arguments.clips} clip(s), fp32", runtime
    )
    parallel_runtime.stop()


def largest_difference(mine: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest difference of two lists of gradients."""
    return max((a - b).abs().max().item() for a, b in zip(mine, wanted, strict=True))


def print_table(ways: list[Way], differences: list[float], title: str, runtime: parallel_runtime.Runtime) -> None:
    """One line a mode; the first round warms up and is not counted."""
    cuda = runtime.device.type == "cuda"
    machine = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"stage 1, {title}; {machine}")
    for head in ("activation", "backend", "kept MiB", "moved MiB", "step", "gradients differ by"):
        table.add_column(head, justify="right")
    base = statistics.median(ways[0].seconds[1:])
    for (mode, backend), way, difference in zip(WAYS, ways, differences, strict=True):
        moved = f"{way.moved.bytes / 2**20:.1f}" if backend == "torch" else "not told"
        ratio = f"{statistics.median(way.seconds[1:]) / base:.2f}x"
        table.add_row(mode, backend, f"{way.kept / 2**20:.1f}", moved, ratio, f"{difference:g}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
