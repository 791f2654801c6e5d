"""A stage made ready to run: its data, modules, engine and trainer, resumed from a checkpoint where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfa_dist import checkpoint as ckpt
from sfa_dist.boundary.file_names import CHECKPOINTS, DONE, LOG
from sfa_dist.checkpoint.failpoints import Failpoints
from sfa_dist.checkpoint.missing import logged_steps, missing
from sfa_dist.checkpoint.probe import check_probe, place_changes, platform_of
from sfa_dist.data.sampling.sample_plan import PLAN_VERSION
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.models.weights import load_exactly
from sfa_dist.parallel.devices import refusal_of_bf16
from sfa_dist.parallel.engines.make_engine import make_engine
from sfa_dist.recipe.schema import Stage2, StageBlock
from sfa_dist.recipe.shipped import WEIGHTS_PREFIX
from sfa_dist.run.context import Run
from sfa_dist.run.record import refuse_other_inputs, setup_table
from sfa_dist.stages.assemble import Parts, assemble_end_to_end, assemble_stage2, assemble_unfrozen, metadata_value
from sfa_dist.stages.feature_cache import FeatureCache
from sfa_dist.stages.open_data import StageData, open_data
from sfa_dist.stages.trunk_fidelity import report_fidelity
from sfa_dist.stages.trunk_setup import place_trunk, prepare_trainable
from sfa_dist.training.progress import Progress
from sfa_dist.training.seeds import RANDOM_VERSION, mix_seed
from sfa_dist.training.trainer import Trainer

TRUNK = "frozen trunk (sha256)"


@dataclass
class Setup:
    """A stage that is ready to run.

    `directory` gets its final weights; `classes` (`classes_id`) goes into their metadata.
    """

    parts: Parts
    trainer: Trainer
    classes: str
    directory: Path


def require_precisions(stages: Mapping[str, StageBlock], device: torch.device) -> None:
    """Raises RecipeError where a stage computes in bf16 and `device` is a GPU without it; fp8 is `require_units`'s."""
    why = refusal_of_bf16(device)
    for name, stage in stages.items():
        trunk = isinstance(stage, Stage2) and stage.trunk_precision in ("bf16", "int8")  # int8 has bf16 activations.
        if why and (trunk or stage.engine.precision == "bf16"):
            key = "engine.precision" if stage.engine.precision == "bf16" else "trunk_precision"
            raise RecipeError(f"{name}.{key}: {why}: set engine.precision: fp32 and trunk_precision: auto")


def prepare(run: Run, name: str, stage: StageBlock, index: SampleIndex, inputs: dict[str, Any]) -> Setup:
    """Opens a stage's data and sets it up, from the checkpoint that it resumes from. Collective.

    Raises the errors of `open_data`, `find_checkpoint` and `set_up`.
    """
    data = open_data(run, name, stage, index)
    # A trunk that only fills the cache was measured when the cache was built.
    if isinstance(stage, Stage2) and stage.runs_frozen_trunk:
        report_fidelity(run, name, stage, index, run.weights("stage1"))
    checkpoint = None if run.dry_run else find_checkpoint(run, name)
    return set_up(run, name, stage, data, inputs, run.directory / name, checkpoint)


def set_up(
    run: Run,
    name: str,
    stage: StageBlock,
    data: StageData,
    inputs: dict[str, Any],
    directory: Path,
    checkpoint: Path | None,
) -> Setup:
    """Modules, engine and trainer of a stage on opened data, from a checkpoint where one is given. Collective.

    Prints the start-up table. `inputs` is what the recipe makes the stage depend on: a checkpoint made with others is
    refused by RecipeError. Raises CheckpointError for weights or a checkpoint that cannot be read.
    """
    seed = stage.own_seed(run.recipe.seed)
    torch.manual_seed(mix_seed(seed, name, "init"))  # The same initial weights on every rank.
    parts = run.runtime.each(lambda: _assemble(run, stage, data.classes, data.cache))
    _report_other_depth(run, name, stage)
    _report_loaded(run, name, parts)
    counts = parts.parameters()
    failpoints = run.failpoints.within(stage=name)
    origin = _origin(run, data)
    state: dict[str, Any] = {"progress": {}}
    if checkpoint is not None:
        state = _read_state(run, name, checkpoint, {**inputs, **origin})
        run.runtime.everywhere(lambda: _load_parameters(parts, checkpoint, failpoints))
    trunk_sha256 = _checked_trunk_sha256(run, name, parts, data.cache)
    for line in run.runtime.each(lambda: prepare_trainable(parts.trainable, stage)):
        run.tracker.say(f"{name}: {line}")
    streams = data.streams
    engine = run.runtime.each(lambda: make_engine(parts.trainable, stage, streams.accumulation, run.runtime.device))
    progress = Progress(**state["progress"])
    if checkpoint is not None:
        run.runtime.on_main(lambda: refuse_other_inputs(name, {TRUNK: state["trunk_sha256"]}, {TRUNK: trunk_sha256}))
        run.runtime.everywhere(lambda: ckpt.load_engine(checkpoint, engine, progress.step, failpoints))
    chunk_frames = None
    if parts.frozen is not None:
        run.tracker.say(f"{name}: {place_trunk(parts.frozen, stage, run.runtime, state.get('chunk_frames'))}")
        chunk_frames = parts.frozen.chunk_frames
    steps, world = (streams.steps_per_epoch, streams.accumulation), run.runtime.world_size
    written = getattr(run.recipe, name).engine
    run.tracker.say(setup_table(name, stage, written, counts, data.clips, steps, world, engine.optimizer_bytes()))
    trainer = Trainer(
        name=name,
        stage=stage,
        seed=seed,
        engine=engine,
        frozen=parts.frozen,
        streams=streams,
        runtime=run.runtime,
        tracker=run.tracker,
        stop=run.stop,
        saver=ckpt.Saver(directory / CHECKPOINTS, run.runtime, stage.checkpoint.keep, failpoints),
        state_extra={
            "inputs": inputs,
            "origin": origin,
            "trunk_sha256": trunk_sha256,
            "chunk_frames": chunk_frames,
        },
        log_every=run.recipe.log.every,
        progress=progress,
        saved_step=progress.step,
        watch=run.watch,
    )
    if run.runtime.each(lambda: trainer.ahead) is not None:
        run.tracker.say(f"{name}: the trunk runs one micro-batch ahead of the tail")
    if checkpoint is not None:
        _compare_probe(run, trainer, state["probe"], checkpoint)
        run.tracker.say(f"{name}: resumed from {checkpoint}")
    return Setup(parts, trainer, data.classes, directory)


def _read_state(run: Run, name: str, checkpoint: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint; raises RecipeError unless its inputs and origin are the `wanted` ones. Collective."""
    state: dict[str, Any] = run.runtime.on_main(lambda: ckpt.read_state(checkpoint))
    run.runtime.on_main(lambda: refuse_other_inputs(name, recorded_origin(state, checkpoint), wanted))
    return state


def _checked_trunk_sha256(run: Run, name: str, parts: Parts, cache: FeatureCache | None) -> str | None:
    """The frozen trunk's hash; raises RecipeError where the ranks or the feature cache have another. Collective."""
    trunk_sha256 = parts.trunk_sha256()
    if cache is not None and trunk_sha256 != cache.trunk_sha256:
        text = f"the feature cache {cache.train.folders[0].parent} was made by another trunk than stage 1's"
        raise run.runtime.for_all(
            RecipeError(f"{text}: remove it and run `sfa cache`, or set another stage2.cache.dir")
        )
    run.runtime.require_equal(f"the frozen trunk of {name} (sha256)", (trunk_sha256 or "none")[:16])
    return trunk_sha256


def _origin(run: Run, data: StageData) -> dict[str, Any]:
    """What gives a step number its meaning: the clips of each step, and the random numbers drawn in it.

    With the step it is the whole state of data and random numbers, since both are functions of the two.
    """
    return {
        "sample plan (version)": PLAN_VERSION,
        "random numbers (version)": RANDOM_VERSION,
        "train clips (sha256)": data.sha256,
        "seed": run.recipe.seed,
    }


def recorded_origin(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The inputs and the origin that a checkpoint was made with. Raises CheckpointError where its state lacks them."""
    try:
        if state["step"] == state["progress"]["step"]:
            return {**state["inputs"], **state["origin"]}
    except (KeyError, TypeError):
        pass
    lacking = f"{checkpoint}/state.json does not say which step it is, or what it was made from"
    raise CheckpointError(f"{lacking}: give another checkpoint with --resume PATH")


def _load_parameters(parts: Parts, checkpoint: Path, failpoints: Failpoints) -> None:
    load_exactly(parts.trainable, ckpt.read_parameters(checkpoint, failpoints), str(checkpoint))


def _compare_probe(run: Run, trainer: Trainer, recorded: dict[str, Any], checkpoint: Path) -> None:
    """Compares the probe's loss with the recorded one: all ranks compute it, rank 0 compares. Collective.

    Says where the run cannot go on bit for bit, and why.
    """
    loss, platform = trainer.probe.loss(trainer.engine), platform_of(trainer.stage, trainer.runtime)
    if changed := place_changes(recorded["place"], platform):
        run.tracker.say(f"{trainer.name}: goes on within rounding and not bit for bit: {', '.join(changed)}")
    trainer.runtime.on_main(lambda: check_probe(recorded, loss, platform, str(checkpoint)))


def _report_loaded(run: Run, name: str, parts: Parts) -> None:
    """Reports what was loaded from an image checkpoint, and what was assumed about it."""
    if parts.loaded is None:
        return
    run.tracker.event("weights", stage=name, loaded=parts.loaded.text, doubt=parts.loaded.doubt)
    for line in (parts.loaded.text, parts.loaded.doubt):
        if line:
            run.tracker.say(f"{name}: {line}")


def _report_other_depth(run: Run, name: str, stage: StageBlock) -> None:
    """Reports a temporal encoder whose depth is not stage 1's: it may be intended, or a mistake."""
    weights = run.weights("stage1")
    if not stage.freezes_trunk or not weights.is_file():
        return
    model = metadata_value(weights, "model")
    trained = model.get("temporal_depth") if isinstance(model, dict) else None
    if type(trained) is int and trained != stage.model.temporal_depth:
        kept = min(trained, stage.model.temporal_depth)
        depths = f"model.temporal_depth is {stage.model.temporal_depth} and was {trained} in stage 1"
        run.tracker.say(f"{name}: {depths}: the first {kept} blocks are taken from it")


def _assemble(run: Run, stage: StageBlock, classes: str, cache: FeatureCache | None) -> Parts:
    source = run.source(stage)
    named = source is not None and source.startswith(("timm:", WEIGHTS_PREFIX))
    made_here = source is not None and not named and Path(source).is_relative_to(run.directory)
    if source is not None and made_here and not Path(source).is_file():
        if not run.dry_run:
            raise CheckpointError(
                f"there is no {source} yet: train the stage that makes it first, or set stage1.weights to a file"
            )
        source = None  # A dry run builds the stage with random weights, since the trained ones do not exist yet.
    if isinstance(stage, Stage2):
        if not stage.freeze_trunk:
            return assemble_unfrozen(stage, Path(source) if source else None, classes)
        cached_trunk = cache.trunk_sha256 if cache is not None and stage.reads_features else None
        return assemble_stage2(stage, Path(source) if source else None, classes, cached_trunk)
    return assemble_end_to_end(stage, source)


def find_checkpoint(run: Run, name: str, directory: Path | None = None, member: str | None = None) -> Path | None:
    """The checkpoint that a stage resumes from; None: it starts from the beginning. Collective.

    It is the one of `--resume PATH` where that is of this stage, else the newest intact one. A sweep's `member` has a
    `directory` of its own. Raises CheckpointError where checkpoints were written and none is left.
    """
    if directory is None and run.resume_from is not None and run.resume_from[0] == name:
        return run.resume_from[1]
    root = (directory or run.directory / name) / CHECKPOINTS
    found, faults = ckpt.newest_valid(root, run.runtime, run.failpoints.within(stage=name))
    for fault in faults:
        run.tracker.event("fallback", stage=name, reason=fault)
        run.tracker.say(f"{name}: checkpoint is not intact, taking the one before ({fault})")
    run.runtime.on_main(lambda: _report_missing(run, name, root, found, member))
    return found


def _report_missing(run: Run, name: str, root: Path, found: Path | None, member: str | None) -> None:
    """Reports checkpoints that log.jsonl names and `root` lacks; raises CheckpointError where all of them are gone."""
    newest = int(found.stem.removeprefix("step-")) if found else 0
    text, forbids = missing(logged_steps(run.directory / LOG, name, member), root, newest)
    who = f"{name} ({member})" if member else name
    if forbids and (root.parent / DONE).exists():
        return  # The stage ended early (schedule.max_steps); if more steps are asked for, `train` raises.
    if forbids:
        raise CheckpointError(
            f"{who} {text}: bring them back (is the disk mounted, the link right?), or remove {root.parent} to start "
            "the stage over"
        )
    if text:
        run.tracker.event("lost", stage=name, reason=text)
        run.tracker.say(f"{name}: {text}")


def given_checkpoint(path: Path) -> tuple[str, Path]:
    """(stage, path) of `--resume PATH`; raises CheckpointError where there is no intact checkpoint.

    Called once, before the first stage: the stage that resumes from the checkpoint may remove it once it has newer
    ones.
    """
    if not (path / "MANIFEST.json").is_file():
        raise CheckpointError(f"--resume {path}: no checkpoint there (a step-XXXXXXXX folder with a MANIFEST.json)")
    fault = ckpt.verify(path)
    if fault:
        raise CheckpointError(f"--resume {path}: {fault}")
    return str(ckpt.read_state(path).get("stage")), path
