"""Frames against memory and time in stage 2, measured on one step of this machine.

    PYTHONPATH=. python benchmarks/memory.py --recipe recipes/b_32f.yaml --frames 8 32 --chunks 8 1000
    PYTHONPATH=. python benchmarks/memory.py --recipe recipes/g_48f.yaml --frames 8 48 256 1024      (on a GPU)

For each number of frames: the trunk by chunks, adapter on pooled vectors and on tokens, offload off and on. On a GPU
"device" is the peak of allocated memory, weights included; on a CPU it is what operations took beyond weights, clip
and host buffers. "host" is pinned memory. Times are medians of interleaved rounds, as ratios to the first line;
on a CPU it is CPU time, which what runs beside it hardly changes.
"predicted" is that of the planner, where it tells one for this stage.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sfa_dist.assemble import Parts, assemble_stage2
from sfa_dist.models.footprint import StoragePeak
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.environment import environment
from sfa_dist.parallel.offload import Link
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.recipe import Stage2, load_recipe
from sfa_dist.trunk_setup import place_trunk, prepare_trainable

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
        self.seconds: list[float] = []
        self.peak = 0

    def step(self) -> None:
        """Trunk, tail and backward, timed."""
        device = self.runtime.device
        self.runtime.synchronize()
        self.runtime.reset_peak_memory()
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        started = clock()
        count = len(self.seconds) == 1 and device.type == "cpu"  # Host buffers and gradients are there by then.
        with StoragePeak(device.type) if count else nullcontext() as storages:
            self.parts.trainable(self.frozen(self.clips)).sum().backward()
        self.runtime.synchronize()
        self.seconds.append(clock() - started)
        if storages is not None:
            self.peak = storages.peak
        elif device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(device)

    @property
    def host_bytes(self) -> int:
        """Pinned memory for what the trunk puts out."""
        return self.frozen.link.pool.bytes if isinstance(self.frozen.link, Link) else 0


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--chunks", type=int, nargs="+", default=[8])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    runtime = parallel_runtime.start(environment())
    table = Table(title=f"stage 2 of {arguments.recipe.stem}, one clip; {machine(runtime)}")
    for head in ("frames", "adapter", "chunk", "offload", "device MiB", "predicted MiB", "host MiB", "time"):
        table.add_column(head, justify="right")
    for frames in arguments.frames:
        cases = []
        for placement in PLACEMENTS:
            for chunk in arguments.chunks:
                for offload in ("off", "on"):
                    keys = [f"stage2.frames={frames}", f"stage2.adapter.placement={placement}", "stage2.batch.micro=1"]
                    keys += [f"stage2.chunk_frames={chunk}", f"stage2.offload={offload}"]
                    stage = load_recipe(arguments.recipe, [*arguments.set, *keys], environment()).recipe.stage2
                    assert stage is not None, "the recipe has no stage2"
                    cases.append(Case(stage, runtime))
                    # Weights are the same in all: one trunk in memory instead of one a case.
                    cases[-1].frozen.trunk = cases[0].frozen.trunk
        for _ in range(arguments.rounds + 2):
            for case in cases:
                case.step()
        base = statistics.median(cases[0].seconds[2:])
        for case in cases:
            table.add_row(*line(case, base))
    Console(width=110).print(table)
    parallel_runtime.stop()


def line(case: Case, base: float) -> list[str]:
    """The cells of one case; the first two rounds warm up and count bytes, and are not timed."""
    stage = case.stage
    assert stage.adapter is not None
    return [
        str(stage.frames),
        stage.adapter.placement,
        str(stage.chunk_frames),
        stage.offload,
        f"{case.peak / 2**20:.1f}",
        predicted(stage),
        f"{case.host_bytes / 2**20:.1f}",
        f"{statistics.median(case.seconds[2:]) / base:.3f}x",
    ]


def predicted(stage: Stage2) -> str:
    """The planner's peak of the whole stage in MiB, or a dash where this tree has no planner."""
    try:
        from sfa_dist.plan.memory import predict
    except ImportError:
        return "-"
    return f"{predict(stage, world_size=1).peak_bytes / 2**20:.1f}"


def machine(runtime: Runtime) -> str:
    """What this ran on, in words."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, no GPU"


if __name__ == "__main__":
    main()
