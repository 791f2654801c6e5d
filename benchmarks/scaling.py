"""How step time and memory grow with ranks, with frames, with the batch and with the clips of the data set.

    python benchmarks/scaling.py                                                   # ViT-B of 2 blocks, 1, 2, 4 ranks
    python benchmarks/scaling.py --recipe recipes/h_96f.yaml --frames 8 96         # on a machine with GPUs

Every line is stage 2 with a live trunk under the recipe's engine, fed with random clips: frames grow at the smallest
batch, the batch at the fewest frames. The cases of one number of ranks take turns in one group of processes. On GPUs
the ranks speak nccl, each has its own GPU, and time is that of the clock; on a CPU they speak gloo with one thread,
and time is that of rank 0's processor, since they may be more than the cores. Memory is of the fullest rank: on a GPU
all that is allocated, on a CPU what a step took beyond weights, optimizer and clips. A data set's size enters through
the sample plan alone: its lines have the time of one global batch's plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, Cell, add_options, interleave, medians, report, script

from sfa_dist.data.sampling.sample_plan import SamplePlan
from sfa_dist.models.footprint import StoragePeak
from sfa_dist.models.loss import weighted_loss_sum
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.engines.make_engine import make_engine
from sfa_dist.parallel.environment import environment
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.recipe.schema import Stage2, load_recipe
from sfa_dist.stages.assemble import assemble_stage2
from sfa_dist.stages.trunk_setup import place_trunk

COLUMNS = ("ranks", "frames", "clips a rank", "step ms", "ms a clip", "memory MiB", "optimizer MiB a rank")
SMALL_MODEL = ("model.depth=2", "model.temporal_depth=1")


class Case:
    """Stage 2 with these frames and clips a rank, under its engine."""

    def __init__(self, stage: Stage2, runtime: Runtime) -> None:
        self.stage, self.runtime, self.peak = stage, runtime, 0
        parts = assemble_stage2(stage, None, "")
        assert parts.frozen is not None
        self.frozen = parts.frozen
        place_trunk(self.frozen, stage, runtime)
        self.engine = make_engine(parts.trainable, stage, 1, runtime.device)
        clips, size = stage.batch.micro, stage.model.image_size
        self.clips = torch.randint(0, 256, (clips, 3, stage.frames, size, size), dtype=torch.uint8)
        self.labels = torch.zeros(clips, dtype=torch.long, device=runtime.device)

    def step(self) -> None:
        """One optimizer step on one micro-batch of each rank."""
        weights = torch.ones(len(self.labels), device=self.runtime.device)
        logits = self.engine.forward(self.frozen(self.clips))
        loss = weighted_loss_sum(logits, self.labels, weights, 0.0) / len(self.labels)
        self.engine.backward(loss, last=True)
        self.engine.step(1e-3)
        self.runtime.synchronize()

    def measure_memory(self) -> None:
        """Notes the peak of one more step."""
        if self.runtime.device.type == "cuda":
            self.runtime.reset_peak_memory()
            self.step()
            self.peak = torch.cuda.max_memory_allocated(self.runtime.device)
            return
        with StoragePeak("cpu") as storages:
            self.step()
        self.peak = storages.peak

    def row(self, seconds: float) -> list[Cell]:
        """The cells of this case."""
        fullest = max(self.runtime.gather(self.peak)) / 2**20
        clips = self.stage.batch.micro
        each = 1000 * seconds / clips
        head = [self.runtime.world_size, self.stage.frames, clips, 1000 * seconds, each]
        return [*head, round(fullest, 1), round(self.engine.optimizer_bytes() / 2**20, 1)]


def run_ranks(arguments: argparse.Namespace) -> None:
    """One of the ranks of a group: measures all cases; rank 0 writes the rows."""
    runtime = parallel_runtime.start(environment())
    if runtime.device.type == "cpu":
        torch.set_num_threads(1)
    world = runtime.world_size
    shapes = [(frames, arguments.batch[0]) for frames in arguments.frames]
    shapes += [(arguments.frames[0], clips) for clips in arguments.batch[1:]]
    cases: dict[tuple[int, int], Case] = {}
    for frames, clips in shapes:
        keys = [f"stage2.frames={frames}", f"stage2.batch={{size: {world * clips}, micro: {clips}}}"]
        stage = load_recipe(arguments.recipe, [*arguments.set, *keys], environment()).recipe.stage2
        assert stage is not None, "the recipe has no stage2"
        cases[frames, clips] = Case(stage.on_ranks(world), runtime)
    seconds = medians(interleave({key: case.step for key, case in cases.items()}, arguments.rounds))
    for case in cases.values():
        case.measure_memory()
    rows = [case.row(seconds[key]) for key, case in cases.items()]
    if runtime.is_main:
        arguments.rows.write_text(json.dumps(rows))
    parallel_runtime.stop()


def measured_rows(arguments: argparse.Namespace, ranks: int) -> list[list[Cell]]:
    """The rows of a group of ranks, started by torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        own = ["--recipe", str(arguments.recipe), "--rounds", str(arguments.rounds), "--rows", str(rows)]
        for name in ("frames", "batch"):
            own += [f"--{name}", *map(str, getattr(arguments, name))]
        own += [part for key in arguments.set for part in ("--set", key)]
        subprocess.run([*launcher, __file__, *own], check=True, stdout=subprocess.DEVNULL)
        return json.loads(rows.read_text())


def plan_rows(clips: list[int], rounds: int) -> list[list[Cell]]:
    """Rows of the sample plan: one global batch of a set of this many clips, 1,000 a shard."""
    plans = {count: SamplePlan([1000] * (count // 1000), 0, 64, 64) for count in clips}
    seconds = medians(
        interleave({n: lambda p=p: p.micro_batch_ids(0, 5, 0, 1, 64, 0) for n, p in plans.items()}, rounds)
    )
    return [
        [f"plan of {count:,} clips", None, 64, 1000 * own, 1000 * own / 64, None, None]
        for count, own in seconds.items()
    ]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "b_32f.yaml")
    parser.add_argument("--set", action="append", default=[], help="default: 2 + 1 blocks on a CPU, the recipe on GPUs")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32], help="the fewest first")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4], metavar="CLIPS", help="on each rank")
    parser.add_argument("--clips", type=int, nargs="+", default=[10_000, 1_000_000], help="of the data set")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.rows:
        run_ranks(arguments)
        return
    if torch.cuda.is_available():
        arguments.ranks = [ranks for ranks in arguments.ranks if ranks <= torch.cuda.device_count()]
    elif not arguments.set:
        arguments.set = [*SMALL_MODEL, "engine.precision=fp32"]
    rows = [row for ranks in arguments.ranks for row in measured_rows(arguments, ranks)]
    rows += plan_rows(arguments.clips, arguments.rounds)
    keys = f" ({', '.join(arguments.set)})" if arguments.set else ""
    report(
        arguments,
        f"stage 2 of {arguments.recipe.stem}{keys}, one step; medians of {arguments.rounds} rounds",
        COLUMNS,
        rows,
    )


if __name__ == "__main__":
    script(main)
