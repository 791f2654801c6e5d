"""The stages of a run: image -> stage1 -> cache -> stage2 -> test -> report.

A stage whose `done.json` records the recipe's inputs is skipped. An unfinished stage resumes from its newest intact
checkpoint. A run directory that holds a stage of another recipe is refused, and the message names the fields that
differ.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfa_dist.boundary.counted import counted
from sfa_dist.boundary.disk import explain, print_line, write_json
from sfa_dist.boundary.file_names import DONE, ENVIRONMENT, RECIPE, WEIGHTS
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.video.decode import decoder_of, why_not_torchcodec
from sfa_dist.errors import CheckpointError, RecipeError, SfaError
from sfa_dist.parallel.energy import EnergyMeter, energy_result, unknown_energy
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.plan.recipe_plan import memory_line
from sfa_dist.recipe.schema import STAGE_NAMES, LoadedRecipe, Recipe, Stage2, StageBlock, record_recipe
from sfa_dist.recipe.stage_names import CACHE, REPORT, TEST
from sfa_dist.run import out_of_memory
from sfa_dist.run.context import Run, leave_if_asked
from sfa_dist.run.record import (
    code_sha256,
    environment_record,
    keep_recipe,
    read_done,
    recorded_decoder,
    refuse_other_inputs,
    stage_inputs,
    try_to_keep,
    write_done,
)
from sfa_dist.run.report.page import write_report
from sfa_dist.run.session import session
from sfa_dist.stages.assemble import save_final
from sfa_dist.stages.cache_build import run_cache_stage
from sfa_dist.stages.calibrate import calibrate
from sfa_dist.stages.feature_cache import cache_block
from sfa_dist.stages.open_data import open_split, steps_per_epoch
from sfa_dist.stages.prepare import Setup, given_checkpoint, prepare, require_precisions
from sfa_dist.stages.scoring import test
from sfa_dist.stages.sweep import STAGE as SWEPT
from sfa_dist.stages.sweep import train_sweep
from sfa_dist.training.prediction_file import require_writer
from sfa_dist.training.schedule import planned_steps


def run_recipe(
    loaded: LoadedRecipe, stop: StopFlag, run_dir: Path, resume: str, only: str | None, dry_run: bool
) -> None:
    """Joins the other ranks and runs the recipe's stages in `run_dir`, until they are done or `stop` is set.

    `resume` is `auto`, `never` or a checkpoint, `only` the single stage to run. Raises SfaError, whose classes
    (errors.py) stand for the exit codes.
    """
    recipe = loaded.recipe
    with session(recipe, run_dir, stop, dry_run, lambda: _resume_from(resume, run_dir, recipe)) as run:
        _require_agreement(run)
        _record_run(run)
        with out_of_memory.reported(run.runtime, run.watch):
            run_stages(run, only)


def run_stages(run: Run, only: str | None) -> None:
    """The recipe's stages in order, or only one of them: image -> stage1 -> cache -> stage2 -> test -> report."""
    stages = _stages_on_ranks(run)
    _check_before_stages(run, stages, only)
    for name, stage in stages.items():
        if isinstance(stage, Stage2) and stage.cache is not None and only in (None, CACHE):
            run_cache_stage(run, stage)
            gc.collect()
        if only in (None, name):
            leave_if_asked(run, f"before {name}")
            train(run, name, stage)
            gc.collect()  # Reference cycles in an engine would hold a stage's memory while the next one is built.
            if isinstance(stage, Stage2):
                calibrate(run, stage)
                gc.collect()
    if only in (None, TEST):
        leave_if_asked(run, "before the test")
        test(run, *list(stages.items())[-1], again=only == TEST)
    if only in (None, REPORT) and not run.dry_run:
        run.runtime.on_main(lambda: _report(run, asked=only is not None))


def train(run: Run, name: str, stage: StageBlock) -> None:
    """Trains one stage from where it stands to its final weights; does nothing where they are given or done."""
    if stage.given_weights:
        run.runtime.everywhere(lambda: _require_given_weights(stage.given_weights or ""))
        run.tracker.say(f"stage1: weights given ({stage.given_weights}), nothing to train")
        return
    run.watch.phase(f"{name} load")
    run.runtime.reset_peak_memory()  # The peak in `done.json` is this stage's own.
    index = open_split(run, stage.data.train, f"{name}.data.train", stage.data)
    swept = name == SWEPT and bool(run.recipe.sweep)
    inputs = stage_inputs(run.recipe, stage, index.sha256, run.source_sha256(stage))
    if swept:
        inputs["sweep"] = run.recipe.sweep
    done = run.runtime.on_main(lambda: read_done(run.directory / name))
    if done is not None and not run.dry_run and _is_finished(run, name, stage, index, inputs, done):
        run.tracker.say(f"{name}: done before, skipped")
    elif swept and isinstance(stage, Stage2):
        if not run.dry_run:
            _keep_recipe(run)
        train_sweep(run, stage, index, inputs, _finish)
    else:
        _train_one(run, name, prepare(run, name, stage, index, inputs), inputs, was_done=done is not None)


def _train_one(run: Run, name: str, setup: Setup, inputs: dict[str, Any], was_done: bool) -> None:
    """Trains a stage that is set up; a dry run stops before the first step."""
    trainer = setup.trainer
    if run.dry_run:
        run.tracker.say(f"{name}: data found, model and engine built; dry run, no step")
        world, device = run.runtime.world_size, run.runtime.device
        run.tracker.say(f"{name}: {run.runtime.on_main(lambda: memory_line([trainer.stage], world, device))}")
        return
    # Only now: a recipe that the run directory refuses must not replace the one it holds.
    _keep_recipe(run)
    step = trainer.progress.step
    if was_done and not step:
        text = f"{name} ended early (schedule.max_steps) and has no checkpoint left to go on from"
        raise run.runtime.for_all(CheckpointError(f"{text}; remove {run.directory / name} to train it again"))
    run.tracker.event("resume" if step else "start", stage=name, step=step)
    meter = EnergyMeter.start(run.runtime.device)
    trainer.fit()
    energy = unknown_energy("the stage took several starts") if step else energy_result(meter, run.runtime)
    _finish(run, name, setup, inputs, energy)


def _is_finished(
    run: Run, name: str, stage: StageBlock, index: SampleIndex, inputs: dict[str, Any], done: dict[str, Any]
) -> bool:
    """Whether a stage with a `done.json` has all the steps that the recipe asks for. Collective.

    Raises RecipeError where it was made from other inputs, CheckpointError where a file is missing.
    """
    recorded = done["inputs"]
    run.runtime.on_main(lambda: refuse_other_inputs(name, recorded, inputs))
    if done["result"]["steps"] < planned_steps(stage.schedule, steps_per_epoch(stage, index)):
        return False
    run.runtime.on_main(lambda: _require_files(run.directory / name, done))
    return True


def _finish(run: Run, name: str, setup: Setup, inputs: dict[str, Any], energy: Mapping[str, Any] | None = None) -> None:
    """Writes the final weights, then `done.json`: in this order, so that a stage marked as done has its weights.

    `energy` are the keys of parallel/energy.py; a member of a sweep has none.
    """
    trainer, stage = setup.trainer, setup.trainer.stage
    run.watch.phase(f"{name} save", trainer.progress.step)
    parameters = trainer.engine.full_parameters()
    result = {**_result(run, setup, sum(p.numel() for p in parameters.values())), **(energy or {})}
    metadata = {
        "stage": name,
        "frames": stage.frames,
        "model": stage.model.model_dump(),
        "pixels": (stage.data.mean, stage.data.std),
        "classes": setup.classes,
    }

    def write() -> None:
        keep_recipe(run.directory, run.recipe)  # Where the disk was full at the start, it is not there yet.
        described = save_final(setup.directory / WEIGHTS, setup.parts, parameters, metadata)
        write_done(setup.directory, inputs, result, {WEIGHTS: described})

    run.runtime.on_main(write)
    run.tracker.event("done", stage=name, step=trainer.progress.step, seconds=trainer.progress.seconds)
    run.tracker.say(f"{name}: done, {trainer.progress.step} steps in {trainer.progress.seconds:.0f} s")


def _result(run: Run, setup: Setup, trainable: int) -> dict[str, Any]:
    """The `result` of a stage's `done.json`. Collective."""
    progress = setup.trainer.progress
    _, frozen = setup.parts.parameters()
    return {
        "steps": progress.step,
        "seconds": progress.seconds,
        "gpu_seconds": progress.seconds * run.runtime.world_size,
        "peak_memory_gib": max(run.runtime.gather(run.runtime.peak_memory_gib())),
        "trainable_parameters": trainable,
        "frozen_parameters": frozen,
        "optimizer_bytes_per_rank": setup.trainer.engine.optimizer_bytes(),
        "samples_seen": progress.samples_seen,
        "bad_samples": progress.bad_samples,
        "data_share": progress.data_seconds / max(progress.seconds, 1e-9),
        "val": progress.last_eval,
    }


def _keep_recipe(run: Run) -> None:
    path = run.directory / RECIPE
    run.runtime.on_main(lambda: try_to_keep(path, lambda: keep_recipe(run.directory, run.recipe)))


def _require_files(directory: Path, done: dict[str, Any]) -> None:
    """Raises CheckpointError where a stage that is done has lost a file; whoever reads a file checks its content."""
    files = done.get("files")
    for name in files if isinstance(files, dict) else {}:
        if not (directory / name).is_file():
            lost = f"{directory.name} is done, but {directory / name} does not exist"
            raise CheckpointError(f"{lost}: restore it, or remove {directory / DONE} to make it from the checkpoint")


def _require_given_weights(weights: str) -> None:
    if not Path(weights).is_file():
        raise CheckpointError(f"stage1.weights: no file {weights}")


def _report(run: Run, asked: bool) -> None:
    """Writes the report.

    Unless the report alone was asked for, a failure is only printed: it must not spoil a run that went well, and
    `sfa report` can make the page at any time.
    """
    try:
        run.tracker.say(f"report: {write_report(run.directory, lambda: bool(run.stop))}")
    except Exception as error:  # Whatever it is: the run has its result.
        if asked:
            raise
        is_known = isinstance(error, OSError | SfaError)
        why = explain(error, run.directory) if is_known else f"{type(error).__name__}: {error}"
        print_line(f"warning: the report is not written: {why}; when that is mended: sfa report {run.directory}")


def _stages(recipe: Recipe) -> dict[str, StageBlock]:
    return {name: stage for name in STAGE_NAMES if (stage := getattr(recipe, name)) is not None}


def _stages_on_ranks(run: Run) -> dict[str, StageBlock]:
    """The stages, by name, as they run on this number of ranks. Raises RecipeError, on all ranks."""
    try:
        return {name: stage.on_ranks(run.runtime.world_size) for name, stage in _stages(run.recipe).items()}
    except RecipeError as error:  # Each rank finds the same.
        raise run.runtime.for_all(error) from None


def _check_before_stages(run: Run, stages: dict[str, StageBlock], only: str | None) -> None:
    """Raises on all ranks what speaks against the run before anything is read.

    RecipeError for a stage that the recipe lacks or a precision that a GPU lacks, UsageError where pyarrow is missing.
    """
    if only in STAGE_NAMES and only not in stages:
        text = f"--stage {only}: the recipe has no such stage (it has {', '.join(stages)})"
        raise run.runtime.for_all(RecipeError(text))
    if only == CACHE:
        run.runtime.on_main(lambda: cache_block(stages.get("stage2")))
    run.runtime.everywhere(lambda: require_writer(run.recipe.test.predictions))
    run.runtime.everywhere(lambda: require_precisions(stages, run.runtime.device))


def _resume_from(resume: str, run_dir: Path, recipe: Recipe) -> tuple[str, Path] | None:
    """The (stage, checkpoint) that `--resume PATH` names; None to go on from where the run directory stands."""
    if resume == "never" and (run_dir / RECIPE).exists():
        raise RecipeError(f"--resume never, but {run_dir} holds a run; use another --run-dir or --resume auto")
    if resume in ("auto", "never"):
        return None
    stage, path = given_checkpoint(Path(resume))
    if stage not in _stages(recipe):
        raise RecipeError(f"--resume {path} is of stage {stage}, which the recipe does not have")
    if (run_dir / stage / DONE).exists():
        raise RecipeError(f"--resume {path}: {stage} is done in {run_dir}; remove its done.json to train it from there")
    return stage, path


def _require_agreement(run: Run) -> None:
    """Raises RecipeError where ranks differ in recipe, code or decoder: no library notices a node with other files."""
    recipe_sha256 = hashlib.sha256(record_recipe(run.recipe).encode()).hexdigest()
    run.runtime.require_equal("the resolved recipe (sha256)", recipe_sha256[:16])
    run.runtime.require_equal("the code of sfa_dist (sha256)", code_sha256()[:16])
    decoders = run.runtime.each(lambda: _decoders(run.recipe))
    run.runtime.require_equal("the video decoder (data.decoder)", decoders)


def _decoders(recipe: Recipe) -> str:
    versions = (decoder_of(stage.data).version for stage in _stages(recipe).values())
    return ", ".join(dict.fromkeys(versions))


def _record_run(run: Run) -> None:
    """Writes env.json and the first lines of the console."""
    chosen = _decoders(run.recipe)
    record = environment_record(run.runtime, chosen)
    lacking = {why_not_torchcodec(stage.data) for stage in _stages(run.recipe).values()} - {None}
    why = "".join(f" (torchcodec cannot be used: {reason})" for reason in lacking)
    run.tracker.say(
        f"sfa_dist {record['sfa_dist']}: {run.recipe.name} on {counted(run.runtime.world_size, 'rank')}, "
        f"{record['ranks'][0]['device']}, decoder {chosen}{why}, run directory {run.directory}"
        + ("" if run.dry_run else " (console.log there has every line)")
    )
    if run.runtime.is_main and (before := recorded_decoder(run.directory)) not in (None, chosen):
        run.tracker.say(f"clips were decoded with {before} until now, and are with {chosen} from here on")
        run.tracker.event("decoder_changed", before=before, decoder=chosen)
    if not run.dry_run:
        path = run.directory / ENVIRONMENT
        run.runtime.on_main(lambda: try_to_keep(path, lambda: write_json(path, record)))
