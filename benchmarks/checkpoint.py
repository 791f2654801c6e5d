"""What a checkpoint costs the training: steps without one, with one in the background, with one that is waited for.

    python benchmarks/checkpoint.py --recipe recipes/b_32f.yaml --every 50
    torchrun --nproc-per-node 4 benchmarks/checkpoint.py --recipe recipes/g_48f.yaml --every 200 --folder /scratch/me

The recipe's stage 2 without its trunk: the tail under the recipe's engine, fed with random features, so that a step is
as short as it can be and the share of a save as large. A window is `--every` steps with one save at its first; the
next save would wait for it, so the window ends when it stands. The three kinds take turns, and medians are shown.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sfa_dist.checkpoint import Outcome, Saver
from sfa_dist.checkpoint.files import file_system
from sfa_dist.data.batches.batch import Batch
from sfa_dist.models.vivit import Tail, build
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.engines.make_engine import make_engine
from sfa_dist.parallel.environment import environment
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.recipe.blocks import LogBlock
from sfa_dist.recipe.schema import Stage2, load_recipe
from sfa_dist.run.tracking import Tracker
from sfa_dist.training.trainer import Streams, Trainer

KINDS = ("none", "background", "waited for")


@dataclass(frozen=True)
class Window:
    """Seconds of one window: a step of it on average, and how long the training stood still for its save."""

    step: float
    blocked: float = 0.0
    until_it_stands: float = 0.0


def make_trainer(stage: Stage2, log: LogBlock, runtime: Runtime, root: Path, clips: int) -> tuple[Trainer, Batch]:
    """The stage's tail in its engine, and a batch of `clips` clips of random features for each rank."""
    with torch.device("meta"):
        tail = Tail(stage.model, stage.frames, stage.adapter)
    build(tail)
    shape = (clips, stage.frames // stage.model.tubelet, tail.head.in_features)
    labels, weights = torch.zeros(clips, dtype=torch.int64), torch.ones(clips)
    batch = Batch(labels, weights, torch.arange(clips), features=torch.randn(shape))
    trainer = Trainer(
        name="stage2",
        stage=stage,
        seed=0,
        engine=make_engine(tail, stage, 1, runtime.device),
        frozen=None,
        streams=Streams(10**6, 1, lambda epoch, first: [batch], None),
        runtime=runtime,
        tracker=Tracker(None, log, {}, {}),
        stop=StopFlag(),
        saver=Saver(root, runtime, keep=1),
        state_extra={},
        log_every=1,
    )
    return trainer, batch


def run_window(trainer: Trainer, batch: Batch, kind: str, steps: int) -> Window:
    """`steps` steps with a save of this kind behind the first."""
    outcomes: list[Outcome] = []
    note = trainer.saver.advance
    trainer.saver.advance = lambda *told: _kept(note(*told), outcomes)  # type: ignore[method-assign]
    trainer.runtime.barrier()
    started = time.perf_counter()
    blocked = 0.0
    for step in range(steps):
        trainer.train_step([batch], epoch=0)
        trainer.runtime.synchronize()
        if step == 0 and kind != "none":
            before = time.perf_counter()
            trainer.save()
            if kind == "waited for":
                trainer.settle_save()
            blocked = time.perf_counter() - before
    before = time.perf_counter()
    trainer.settle_save()
    blocked += time.perf_counter() - before
    seconds = time.perf_counter() - started
    trainer.saver.advance = note  # type: ignore[method-assign]
    return Window(seconds / steps, blocked, outcomes[0].seconds if outcomes else 0.0)


def _kept(outcome: Outcome | None, outcomes: list[Outcome]) -> Outcome | None:
    outcomes += [outcome] if outcome else []
    return outcome


def show(windows: dict[str, list[Window]], steps: int, title: str) -> Table:
    """Medians over the rounds. What a save adds is the median over rounds of the difference within one round."""
    table = Table("save", "ms a step", "added a step", "standstill a save", "until it stands", title=title)
    for kind, own in windows.items():
        added = [one.step - other.step for one, other in zip(own, windows["none"], strict=True)]
        share = statistics.median(a / other.step for a, other in zip(added, windows["none"], strict=True))
        cells = [f"{statistics.median(w.step for w in own) * 1e3:.1f}", "", "", ""]
        if kind != "none":
            still = statistics.median(w.blocked / (w.step * steps) for w in own)
            cells[1] = f"{statistics.median(added) * 1e3:+.1f} ms, {share:+.1%}"
            cells[2] = f"{statistics.median(w.blocked for w in own) * 1e3:.0f} ms, {still:.1%} of the time"
            cells[3] = f"{statistics.median(w.until_it_stands for w in own):.2f} s"
        table.add_row(kind, *cells)
    return table


def main() -> None:
    """Runs the windows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--every", type=int, default=50, help="steps from one save to the next")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clips", type=int, default=8, help="on each rank in each step")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is to be measured")
    arguments = parser.parse_args()
    runtime = parallel_runtime.start(environment())
    recipe = load_recipe(arguments.recipe, arguments.set, environment()).recipe
    assert recipe.stage2 is not None, "the recipe has no stage2"
    stage = recipe.stage2.on_ranks(runtime.world_size)
    root = Path(runtime.broadcast(tempfile.mkdtemp(dir=arguments.folder) if runtime.is_main else ""))
    try:
        trainer, batch = make_trainer(stage, recipe.log, runtime, root, arguments.clips)
        windows: dict[str, list[Window]] = {kind: [] for kind in KINDS}
        for number in range(arguments.rounds + 1):
            for kind in KINDS:
                window = run_window(trainer, batch, kind, arguments.every)
                windows[kind] += [window] if number else []  # The first round takes memory and warms up.
        if runtime.is_main:
            size = sum(file.stat().st_size for file in next(root.iterdir()).iterdir())
            on_card = runtime.device.type == "cuda"
            device = torch.cuda.get_device_name() if on_card else torch.backends.cpu.get_cpu_capability()
            title = (
                f"{recipe.name}: {size / 2**20:.0f} MiB every {arguments.every} steps of {arguments.clips} clips, "
                f"{stage.engine.title} on {runtime.world_size} rank(s); {device}, {os.cpu_count()} "
                f"cores, load {os.getloadavg()[0]:.1f}, {file_system(root)}; medians of {arguments.rounds} rounds"
            )
            Console().print(show(windows, arguments.every, title))
    finally:
        runtime.barrier()
        if runtime.is_main:
            shutil.rmtree(root)
        parallel_runtime.stop()


if __name__ == "__main__":
    main()
