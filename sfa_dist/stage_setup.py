"""A stage made ready to run: its data, modules and engine, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sfa_dist import checkpoint as ckpt
from sfa_dist.assemble import Parts, assemble_end_to_end, assemble_stage2, classes_id
from sfa_dist.data.shard_index import SampleIndex, load_index
from sfa_dist.data.shards import expand_shards
from sfa_dist.data.stream import check_labels, eval_loader, train_loader
from sfa_dist.errors import CheckpointError, DataError, RecipeError
from sfa_dist.models.weights import load_exactly
from sfa_dist.parallel.engines import make_engine
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.parallel.watch import Watch
from sfa_dist.recipe import Recipe, Stage1, Stage2, StageBlock
from sfa_dist.run_record import index_size, refuse_other_inputs, setup_table
from sfa_dist.tracking import Tracker
from sfa_dist.trainer import Progress, Streams, Trainer, mix_seed
from sfa_dist.trunk_setup import place_trunk, prepare_trainable

IMAGE_STAGE = "stage:image"


@dataclass(frozen=True)
class Run:
    """What every stage needs to know of the run it belongs to."""

    recipe: Recipe
    directory: Path
    runtime: Runtime
    tracker: Tracker
    stop: StopFlag
    dry_run: bool
    resume_from: tuple[str, Path] | None = None  # A stage, and the checkpoint that it has to go on from.
    watch: Watch = field(default_factory=Watch)

    def weights(self, stage: str) -> Path:
        """Where a stage leaves its final weights, or those that the recipe gives in place of training."""
        given = self.recipe.stage1.weights if stage == "stage1" and self.recipe.stage1 else None
        return Path(given) if given else self.directory / stage / "weights.safetensors"

    def source(self, stage: StageBlock) -> str | None:
        """What a stage starts from: a weights file, a `timm:` name, or None for random weights."""
        if isinstance(stage, Stage2):
            return str(self.weights("stage1"))
        if isinstance(stage, Stage1) and stage.image_checkpoint:
            return str(self.weights("image")) if stage.image_checkpoint == IMAGE_STAGE else stage.image_checkpoint
        return None

    def source_sha256(self, stage: StageBlock) -> str:
        """Identity of what a stage starts from: the file's hash, or the name where it is no file."""
        source = self.source(stage) or ""
        return self.runtime.on_main(lambda: ckpt.file_sha256(Path(source)) if Path(source).is_file() else source)


@dataclass
class Setup:
    """A stage that is ready to run; `classes` identifies its class list in the metadata of its weights."""

    parts: Parts
    trainer: Trainer
    classes: str


def prepare(run: Run, name: str, stage: StageBlock, index: SampleIndex, inputs: dict[str, Any]) -> Setup:
    """Weights, modules, engine and streams of a stage, resumed where a checkpoint is; says the start-up table."""
    val = open_split(run.runtime, stage.data.val, f"{name}.data.val") if stage.data.val else None

    def check() -> None:
        check_labels(index, stage.model.classes)
        if val is not None:
            check_labels(val, stage.model.classes)
            check_classes(index.classes, val)

    run.runtime.on_main(check)
    streams = make_streams(run, stage, index, val)
    classes = classes_id(index.classes, stage.model)
    checkpoint = None if run.dry_run else find_checkpoint(run, name)
    torch.manual_seed(mix_seed(run.recipe.seed, name, "init"))  # The same initial weights on every rank.
    parts = _assemble(run, stage, classes)
    counts = parts.parameters()
    state: dict[str, Any] = {"progress": {}}
    if checkpoint is not None:
        state = ckpt.read_state(checkpoint)
        refuse_other_inputs(name, state["inputs"], inputs)
        load_exactly(parts.trainable, ckpt.read_parameters(checkpoint), str(checkpoint))
    trunk_sha256 = parts.frozen.sha256() if parts.frozen else None
    run.runtime.require_equal(f"the frozen trunk of {name} (sha256)", (trunk_sha256 or "none")[:16])
    for words in prepare_trainable(parts.trainable, stage):
        run.tracker.say(f"{name}: {words}")
    engine = make_engine(parts.trainable, stage, streams.accumulation, run.runtime.device)
    progress = Progress(**state["progress"])
    if checkpoint is not None:
        if state["trunk_sha256"] != trunk_sha256:
            raise RecipeError(f"{checkpoint} was trained on another frozen trunk than the one loaded now")
        ckpt.load_engine(checkpoint, engine, progress.step)
        run.tracker.say(f"{name}: resumed from {checkpoint}")
    chunk_frames = None
    if parts.frozen is not None and isinstance(stage, Stage2):
        run.tracker.say(f"{name}: {place_trunk(parts.frozen, stage, run.runtime, state.get('chunk_frames'))}")
        chunk_frames = parts.frozen.chunk_frames
    steps, world = (streams.steps_per_epoch, streams.accumulation), run.runtime.world_size
    clips = (len(index), index_size(val))
    run.tracker.say(setup_table(name, stage, counts, clips, steps, world, engine.optimizer_bytes()))
    trainer = Trainer(
        name=name,
        stage=stage,
        seed=run.recipe.seed,
        engine=engine,
        frozen=parts.frozen,
        streams=streams,
        runtime=run.runtime,
        tracker=run.tracker,
        stop=run.stop,
        directory=run.directory / name,
        state_extra={"inputs": inputs, "trunk_sha256": trunk_sha256, "chunk_frames": chunk_frames},
        log_every=run.recipe.log.every,
        progress=progress,
        watch=run.watch,
    )
    return Setup(parts, trainer, classes)


def _assemble(run: Run, stage: StageBlock, classes: str) -> Parts:
    source = run.source(stage)
    made_here = source is not None and not source.startswith("timm:") and Path(source).is_relative_to(run.directory)
    if source is not None and made_here and not Path(source).is_file():
        if not run.dry_run:
            raise CheckpointError(
                f"there is no {source} yet: train the stage before, or give its weights (stage1.weights)"
            )
        source = None  # A dry run builds the stage with random weights in place of those that are not trained yet.
    if isinstance(stage, Stage2):
        return assemble_stage2(stage, Path(source) if source else None, classes)
    return assemble_end_to_end(stage, source)


def find_checkpoint(run: Run, name: str) -> Path | None:
    """The checkpoint that the stage goes on from: `--resume PATH` where it is of this stage, else the newest intact
    one."""
    if run.resume_from is not None and run.resume_from[0] == name:
        return run.resume_from[1]
    found, faults = run.runtime.on_main(lambda: ckpt.newest_valid(run.directory / name / "checkpoints"))
    for fault in faults:
        run.tracker.event("fallback", stage=name, reason=fault)
        run.tracker.say(f"{name}: checkpoint is not intact, taking the one before ({fault})")
    return found


def given_checkpoint(path: Path) -> tuple[str, Path]:
    """(stage, path) of `--resume PATH`. Raises CheckpointError where there is no intact checkpoint.

    Looked at once, before the first stage: the stage that goes on from it may remove it when it has newer ones.
    """
    if not (path / "MANIFEST.json").is_file():
        raise CheckpointError(f"--resume {path}: no checkpoint there (a step-XXXXXXXX folder with a MANIFEST.json)")
    fault = ckpt.verify(path)
    if fault:
        raise CheckpointError(f"--resume {path}: {fault}")
    return str(ckpt.read_state(path).get("stage")), path


def make_streams(run: Run, stage: StageBlock, train_index: SampleIndex, val_index: SampleIndex | None) -> Streams:
    """The stage's training and evaluation streams for this rank."""
    world = run.runtime.world_size
    common: dict[str, Any] = {
        "data": stage.data,
        "batch": stage.batch,
        "frames": stage.frames,
        "crop": stage.model.image_size,
        "seed": run.recipe.seed,
        "rank": run.runtime.rank,
        "world_size": world,
        "pin_memory": run.runtime.device.type == "cuda",
    }
    return Streams(
        steps_per_epoch=steps_per_epoch(stage, train_index),
        accumulation=-(-stage.batch.size // (world * stage.batch.micro)),
        train=lambda epoch, first: train_loader(
            train_index, augment=stage.augment, epoch=epoch, start_step=first, **common
        ),
        evaluate=None if val_index is None else lambda: eval_loader(val_index, **common),
    )


def check_classes(trained: list[str] | None, index: SampleIndex) -> None:
    """Raises DataError where a split's class list is not the trained one: the same label would mean another class."""
    if trained is None or index.classes is None or trained == index.classes:
        return
    place = next((i for i, (a, b) in enumerate(zip(trained, index.classes, strict=False)) if a != b), None)
    what = f"{len(index.classes)} classes, trained on {len(trained)}"
    if place is not None:
        what = f"class {place} is {index.classes[place]!r}, trained as {trained[place]!r}"
    raise DataError(f"other classes in {index.shards[0].parent}: {what}; pack both with the same --classes")


def steps_per_epoch(stage: StageBlock, train_index: SampleIndex) -> int:
    """Optimizer steps in which each clip is seen once."""
    return -(-len(train_index) // stage.batch.size)


def open_split(runtime: Runtime, patterns: list[str], where: str) -> SampleIndex:
    """The index of a split's shards. Rank 0 builds what is missing before the others look."""
    if not patterns:
        raise RecipeError(f"{where} names no shards")

    def load() -> SampleIndex:
        try:
            index = load_index(expand_shards(patterns))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if len(index) == 0:
            raise DataError(f"{where}: the shards hold no samples")
        return index

    runtime.on_main(lambda: bool(load()))
    index = load()
    runtime.require_equal(f"the clips of {where} (sha256 of their index)", index.sha256[:16])
    return index
