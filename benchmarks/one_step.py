"""Real optimizer steps of a recipe's stage 2 with random weights: peak memory beside the planned one, and time, on
whatever machine this is.

    python benchmarks/one_step.py --recipe recipes/g_48f.yaml
    torchrun --nproc-per-node 2 benchmarks/one_step.py --recipe recipes/h_96f.yaml --steps 3 --shards 'data/mine/*.tar'

Without --shards it packs one generated 256-frame video. On a CPU the memory is the peak resident set of the process,
of which `libraries` was there before the model was built; on a GPU it is the peak of allocated device memory. The
plan is what tensors take (on a CPU those of the host's memory too), without reserve.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from common import add_options, report, script, wall_clock, weights_drawn_on

from sfa_dist.data.packing.pack import pack
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.environment import environment
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.plan.memory import predict
from sfa_dist.recipe.schema import load_recipe
from sfa_dist.run.context import Run
from sfa_dist.run.tracking import Tracker
from sfa_dist.stages.open_data import open_split
from sfa_dist.stages.prepare import prepare
from sfa_dist.tools.demo_data import write_video


def make_shard(folder: Path) -> str:
    """One packed video of 256 frames, 340 x 256 pixels."""
    base = np.random.default_rng(0).integers(0, 256, (256, 340, 3), dtype=np.uint8)
    (folder / "clips" / "a").mkdir(parents=True)
    write_video(folder / "clips" / "a" / "0.mp4", np.stack([np.roll(base, 2 * t, axis=1) for t in range(256)]))
    pack(folder / "clips", folder / "shards")
    return str(folder / "shards" / "*.tar")


def main() -> None:
    """Runs the steps and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--shards", help="shards to read; default: one generated video")
    parser.add_argument("--steps", type=int, default=1)
    add_options(parser, rounds=None)
    arguments = parser.parse_args()
    runtime = parallel_runtime.start(environment())
    with tempfile.TemporaryDirectory() as folder:
        shards = arguments.shards or (make_shard(Path(folder)) if runtime.is_main else "")
        shards = runtime.broadcast(shards)
        world = runtime.world_size
        # One clip per rank and step: the paper's local batch of 1 (section 4.7).
        small = [f"stage2.data.train=['{shards}']", "stage2.data.workers=0", "stage2.data.val=[]"]
        small += [f"stage2.batch={{size: {world}, micro: 1}}", "stage2.cache=null", "sweep={}"]  # The trunk is live.
        recipe = load_recipe(arguments.recipe, [*small, *arguments.set], environment()).recipe
        assert recipe.stage2 is not None, "the recipe has no stage2"
        stage = recipe.stage2.on_ranks(world)
        run = Run(recipe, Path(folder), runtime, Tracker.console_only(recipe.log), StopFlag(), dry_run=True)
        libraries = runtime.peak_memory_gib()
        index = open_split(run, stage.data.train, "stage2.data.train", stage.data)
        with weights_drawn_on(runtime.device):
            trainer = prepare(run, "stage2", stage, index, {}).trainer
        built = runtime.peak_memory_gib()
        seconds = []
        for step in range(arguments.steps):
            batches = list(islice(trainer.streams.train(step, 0), trainer.streams.accumulation))
            started = wall_clock()
            result = trainer.train_step(batches, epoch=step)
            runtime.synchronize()
            seconds.append(wall_clock() - started)
    plan = predict(stage, world)
    on_host = 0 if runtime.device.type == "cuda" else plan.host_bytes
    told = {
        "recipe": recipe.name,
        "frames": stage.frames,
        "ranks": world,
        "peak GiB": round(max(runtime.gather(runtime.peak_memory_gib())), 2),
        "planned": round((plan.peak_bytes + on_host) / 2**30, 2),
        "libraries": round(libraries, 2),
        "when built": round(built, 2),
        "optimizer GiB a rank": round(trainer.engine.optimizer_bytes() / 2**30, 2),
        "median step s": round(statistics.median(seconds), 2),
        "loss": float(result.losses.sum()) / result.clips * world,
    }
    if runtime.is_main:
        title = f"{arguments.steps} optimizer step(s), one clip a rank; the first step takes memory and warms up"
        report(arguments, title, list(told), [list(told.values())], step_seconds=seconds)
    parallel_runtime.stop()


if __name__ == "__main__":
    script(main)
