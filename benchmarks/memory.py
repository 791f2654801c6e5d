"""Frames against memory and time in stage 2, measured on one step of this machine.

    python benchmarks/memory.py --recipe recipes/b_32f.yaml --frames 8 32 --chunks 8 1000
    python benchmarks/memory.py --recipe recipes/g_48f.yaml --frames 8 48 256 1024      (on a GPU)

For each number of frames: the trunk by chunks, adapter on pooled vectors and on tokens, offload off and on. On a GPU
"device" is the peak of allocated memory, weights included; on a CPU it is what operations took beyond weights, clip
and host buffers. "host" is pinned memory. Times are medians of interleaved rounds, as ratios to the first line;
on a CPU it is CPU time, which what runs beside it hardly changes.
"predicted" is the planner's peak of the whole stage.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from common import Cell, add_options, interleave, median_ratio, report, script, weights_drawn_on

from sfa_dist.models.footprint import StoragePeak
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.engines.offload import HostLink
from sfa_dist.parallel.environment import environment
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.plan.memory import predict
from sfa_dist.recipe.schema import Stage2, load_recipe
from sfa_dist.stages.assemble import Parts, assemble_stage2
from sfa_dist.stages.trunk_setup import place_trunk, prepare_trainable

PLACEMENTS = ("pooled", "tokens")


class Case:
    """One way to run stage 2, with its own tail around a trunk that all share."""

    def __init__(self, stage: Stage2, runtime: Runtime) -> None:
        self.stage, self.runtime = stage, runtime
        self.parts: Parts = assemble_stage2(stage, None, classes="")
        assert self.parts.frozen is not None
        self.frozen = self.parts.frozen
        prepare_trainable(self.parts.trainable, stage)
        dtype = torch.bfloat16 if stage.engine.precision == "bf16" else torch.float32
        self.parts.trainable.to(runtime.device, dtype)
        place_trunk(self.frozen, stage, runtime)
        size = stage.model.image_size
        self.clips = torch.randint(0, 256, (stage.batch.micro, 3, stage.frames, size, size), dtype=torch.uint8)
        self.steps = self.peak = 0

    def step(self) -> None:
        """Trunk, tail and backward."""
        device = self.runtime.device
        self.runtime.reset_peak_memory()
        self.steps += 1
        count = self.steps == 2 and device.type == "cpu"  # Host buffers and gradients are there by then.
        with StoragePeak(device.type) if count else nullcontext() as storages:
            self.parts.trainable(self.frozen(self.clips)).sum().backward()
        self.runtime.synchronize()
        if storages is not None:
            self.peak = storages.peak
        elif device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(device)

    @property
    def host_bytes(self) -> int:
        """Pinned memory for what the trunk puts out."""
        return self.frozen.link.pool.bytes if isinstance(self.frozen.link, HostLink) else 0


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--chunks", type=int, nargs="+", default=[8])
    add_options(parser)
    arguments = parser.parse_args()
    runtime = parallel_runtime.start(environment())
    title = f"stage 2 of {arguments.recipe.stem}, one clip; time is of the first line"
    columns = ["frames", "adapter", "chunk", "offload", "device MiB", "predicted MiB", "host MiB", "time"]
    rows: list[list[Cell]] = []
    for frames in arguments.frames:
        cases: dict[int, Case] = {}
        for stage in stages(arguments, frames):
            with weights_drawn_on(runtime.device):
                case = cases[len(cases)] = Case(stage, runtime)
            # Weights are the same in all: one trunk in memory instead of one a case.
            case.frozen.trunk = cases[0].frozen.trunk
        # Two rounds warm up and count bytes.
        seconds = interleave({key: case.step for key, case in cases.items()}, arguments.rounds, warmup=2)
        rows += [line(case, median_ratio(seconds[key], seconds[0])) for key, case in cases.items()]
        report(arguments, title, columns, rows, whole=frames == arguments.frames[-1])
    parallel_runtime.stop()


def stages(arguments: argparse.Namespace, frames: int) -> Iterator[Stage2]:
    """The recipe's stage 2 with this number of frames, by adapter, chunk and offload."""
    for placement in PLACEMENTS:
        for chunk in arguments.chunks:
            for offload in ("off", "on"):
                keys = [f"stage2.frames={frames}", f"stage2.adapter.placement={placement}", "stage2.batch.micro=1"]
                keys += [f"stage2.chunk_frames={chunk}", f"stage2.offload={offload}", "stage2.cache=null", "sweep={}"]
                stage = load_recipe(arguments.recipe, [*arguments.set, *keys], environment()).recipe.stage2
                assert stage is not None, "the recipe has no stage2"
                yield stage


def line(case: Case, time: float) -> list[Cell]:
    """The cells of one case."""
    stage = case.stage
    assert stage.adapter is not None
    planned = predict(stage, world_size=1).peak_bytes / 2**20
    cells: list[Cell] = [stage.frames, stage.adapter.placement, str(stage.chunk_frames), stage.offload]
    return [*cells, round(case.peak / 2**20, 1), round(planned, 1), round(case.host_bytes / 2**20, 1), time]


if __name__ == "__main__":
    script(main)
