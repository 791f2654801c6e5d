"""Times a few end-to-end steps of stage 2's frames: what `cost_ratio` is computed from without a baseline run.

It comes after stage 2, whose weights and `done.json` are written by then, and trains a module of its own that is thrown
away. So nothing of the run depends on it; only `stage2/calibration.json` is written.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from itertools import count, islice
from typing import Any

import torch

from sfa_dist import checkpoint as ckpt
from sfa_dist.boundary.disk import read_object, write_json
from sfa_dist.boundary.file_names import CALIBRATION, CHECKPOINTS
from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.feed import Streams
from sfa_dist.errors import DataError, RecipeError
from sfa_dist.parallel.engines.make_engine import make_engine
from sfa_dist.plan.memory import predict
from sfa_dist.recipe.schema import Stage1, Stage2, StageBlock
from sfa_dist.run.context import Run, leave_if_asked
from sfa_dist.run.cost import ranks_of
from sfa_dist.run.out_of_memory import is_out_of_memory
from sfa_dist.run.record import read_done
from sfa_dist.run.tracking import Tracker
from sfa_dist.stages.assemble import assemble_end_to_end
from sfa_dist.stages.open_data import make_streams, open_split
from sfa_dist.stages.trunk_setup import free_bytes, prepare_trainable
from sfa_dist.training.non_finite import DivergedError
from sfa_dist.training.trainer import Trainer

NAME = "calibration"
WARM_UP_STEPS = 2
# Of the free memory. Running out of it on one rank alone would leave the others in a collective.
SHARE_OF_FREE_MEMORY = 0.75
STOPPED = "the start that timed them ended on the way"


def calibrate(run: Run, stage: Stage2) -> None:
    """Times `log.calibrate_steps` end-to-end steps, unless they were timed before with the same settings. Collective.

    Where they cannot be timed, the reason is written instead, and the run goes on. Raises PreemptedError on a stop
    request.
    """
    asked = _asked(run, stage)
    file = run.directory / "stage2" / CALIBRATION
    if not asked["steps"] or run.dry_run or run.runtime.on_main(lambda: _recorded(run)) == asked:
        return
    if run.runtime.on_main(lambda: _trained_on_other_ranks(run)):
        return  # Their steps say nothing of the training's.
    run.watch.phase(f"{NAME} load")
    end_to_end = end_to_end_stage(stage)
    reason, seconds = _too_large(run, end_to_end), None
    if reason is None:
        # Where the timing kills the process, the next start finds this and does not try again.
        run.runtime.on_main(lambda: write_json(file, {**asked, "step_seconds": None, "reason": STOPPED}))
        try:
            seconds = _seconds_of_a_step(run, end_to_end, asked["steps"])
        except (RecipeError, DataError, DivergedError) as error:
            reason = str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = f"out of memory on rank {run.runtime.rank} ({run.runtime.memory_summary()})"
        reason = next(filter(None, run.runtime.gather(reason)), None)
    if reason is None and seconds is None:
        run.runtime.on_main(file.unlink)  # To be timed by the next start.
        leave_if_asked(run, f"in the {NAME}")
    found = {**asked, "step_seconds": seconds if reason is None else None, "reason": reason}
    run.runtime.on_main(lambda: write_json(file, found))
    words = f"{seconds:.3f} s a step" if reason is None else f"not timed: {reason}; cost_ratio needs log.baseline"
    run.tracker.say(f"{NAME}: {stage.frames} frames end to end, {words}")


def end_to_end_stage(stage: Stage2) -> Stage1:
    """The training of stage 2's frames end to end, with stage 2's settings."""
    return Stage1(**{name: getattr(stage, name) for name in StageBlock.model_fields})


def _trained_on_other_ranks(run: Run) -> bool:
    done = read_done(run.directory / "stage2")
    return done is not None and ranks_of(done) != run.runtime.world_size


def _asked(run: Run, stage: Stage2) -> dict[str, Any]:
    """What a timing depends on, as its file records it."""
    return {
        "steps": run.recipe.log.calibrate_steps,
        "ranks": run.runtime.world_size,
        "micro": stage.batch.micro,
        "engine": stage.engine.model_dump(mode="json"),
        "activation": stage.activation,
        "compile": stage.compile,
    }


def _recorded(run: Run) -> dict[str, Any] | None:
    """The settings of the recorded timing; None without one."""
    try:
        found = read_object(run.directory / "stage2" / CALIBRATION, steps=int)
    except (OSError, ValueError):
        return None
    return {key: value for key, value in found.items() if key not in ("step_seconds", "reason")}


def _too_large(run: Run, stage: Stage1) -> str | None:
    """Why the memory would not be enough, by the plan; None where it is. Collective."""
    runtime = run.runtime
    frees = runtime.gather(_free_bytes(runtime.device))
    share = 1 if runtime.device.type == "cuda" else runtime.launch.local_world_size  # Ranks that share that memory.
    try:
        needed = runtime.on_main(lambda: predict(stage, runtime.world_size).peak_bytes * share)
    except RecipeError as error:
        return str(error)
    known = [free for free in frees if free is not None]
    if len(known) < len(frees):
        return "how much memory is free is not known here"
    free = min(known)
    if needed <= SHARE_OF_FREE_MEMORY * free:
        return None
    return f"{needed / 2**30:.1f} GiB planned, and {free / 2**30:.1f} GiB are free"


def _free_bytes(device: torch.device) -> int | None:
    try:
        return free_bytes(device)
    except (OSError, RuntimeError):  # A system without /proc.
        return None


def _seconds_of_a_step(run: Run, stage: Stage1, steps: int) -> float | None:
    """Mean seconds of a step, loading included, as in the trainer; None on a stop request. Collective."""
    runtime, device = run.runtime, run.runtime.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        index = open_split(run, stage.data.train, "stage2.data.train", stage.data)
        streams = make_streams(run, stage, index, None, None)
        parts = runtime.each(lambda: assemble_end_to_end(stage, None))
        runtime.each(lambda: prepare_trainable(parts.trainable, stage))
        engine = runtime.each(lambda: make_engine(parts.trainable, stage, streams.accumulation, device))
        trainer = Trainer(
            name=NAME,
            stage=stage,
            seed=run.recipe.seed,
            engine=engine,
            frozen=None,
            streams=streams,
            runtime=runtime,
            tracker=Tracker(None, run.recipe.log, {}, {}),
            stop=run.stop,
            saver=ckpt.Saver(run.directory / "stage2" / CHECKPOINTS, runtime, keep=1),  # It is never asked to save.
            state_extra={},
            log_every=1,
            watch=run.watch,
        )
        total = 0.0
        with closing(_batches(streams)) as batches:
            for step in range(WARM_UP_STEPS + steps):
                started = time.perf_counter()
                epoch, drawn = next(batches)
                if trainer.train_step(drawn, epoch) is None:
                    return None
                runtime.synchronize()
                total += time.perf_counter() - started if step >= WARM_UP_STEPS else 0.0
    return total / steps


def _batches(streams: Streams) -> Generator[tuple[int, list[Batch]], None, None]:
    """(epoch, micro-batches) of each step, without end."""
    for epoch in count():
        with closing(streams.train(epoch, 0)) as drawn:
            for _ in range(streams.steps_per_epoch):
                yield epoch, list(islice(drawn, streams.accumulation))
