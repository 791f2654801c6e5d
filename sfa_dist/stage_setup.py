"""A stage made ready to run: its data, modules and engine, and where it stands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sfa_dist import checkpoint as ckpt
from sfa_dist.assemble import Parts, assemble_end_to_end, assemble_stage2, classes_id, read_metadata
from sfa_dist.data.feature_stream import feature_eval_loader, feature_train_loader
from sfa_dist.data.shard_index import SampleIndex, load_index
from sfa_dist.data.shards import expand_shards
from sfa_dist.data.stream import Batch, check_labels, eval_loader, train_loader
from sfa_dist.errors import CheckpointError, DataError, RecipeError
from sfa_dist.feature_cache import (
    FeatureCache,
    SplitPlan,
    cache_block,
    missing_views,
    open_cache,
    plan_cache,
    trunk_weights_sha256,
)
from sfa_dist.models.weights import load_exactly
from sfa_dist.parallel.engines import make_engine
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.parallel.watch import Watch
from sfa_dist.recipe import Recipe, Stage1, Stage2, StageBlock
from sfa_dist.run_record import index_size, refuse_other_inputs, setup_table
from sfa_dist.tracking import Tracker
from sfa_dist.trainer import Progress, Streams, Trainer, mix_seed

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

    def cache_directory(self, stage: Stage2) -> Path:
        """Where the feature cache of stage 2 is."""
        given = stage.cache.dir if stage.cache else None
        return Path(given) if given else self.directory / "cache"

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
    data = open_data(run, name, stage, index)
    checkpoint = None if run.dry_run else find_checkpoint(run, name)
    return set_up(run, name, stage, data, inputs, run.directory / name, checkpoint)


@dataclass(frozen=True)
class StageData:
    """What a stage trains on: its streams, the cache behind them (None: live), the class list, clips (train, val)."""

    streams: Streams
    cache: FeatureCache | None
    classes: str
    clips: tuple[int, int]


def open_data(run: Run, name: str, stage: StageBlock, index: SampleIndex) -> StageData:
    """Opens and checks all that the stage reads. Collective."""
    val = open_split(run.runtime, stage.data.val, f"{name}.data.val") if stage.data.val else None

    def check() -> None:
        check_labels(index, stage.model.classes)
        if val is not None:
            check_labels(val, stage.model.classes)
            check_classes(index.classes, val)

    run.runtime.on_main(check)
    cache = open_features(run, stage, index, val)
    streams = make_streams(run, stage, index, val, cache)
    return StageData(streams, cache, classes_id(index.classes, stage.model), (len(index), index_size(val)))


def set_up(
    run: Run,
    name: str,
    stage: StageBlock,
    data: StageData,
    inputs: dict[str, Any],
    directory: Path,
    checkpoint: Path | None,
) -> Setup:
    """Modules, engine and trainer of a stage on opened data, from a checkpoint where one is given."""
    seed = stage.seed if isinstance(stage, Stage2) and stage.seed is not None else run.recipe.seed
    torch.manual_seed(mix_seed(seed, name, "init"))  # The same initial weights on every rank.
    parts = _assemble(run, stage, data.classes, data.cache)
    _say_other_depth(run, name, stage)
    counts = parts.parameters()
    state: dict[str, Any] = {"progress": {}}
    if checkpoint is not None:
        state = ckpt.read_state(checkpoint)
        refuse_other_inputs(name, state["inputs"], inputs)
        load_exactly(parts.trainable, ckpt.read_parameters(checkpoint), str(checkpoint))
    trunk_sha256 = parts.trunk_sha256()
    if data.cache is not None and trunk_sha256 != data.cache.trunk_sha256:
        made = data.cache.train.folders[0].parent
        raise RecipeError(f"the feature cache {made} was made by another trunk than stage 1's")
    run.runtime.require_equal(f"the frozen trunk of {name} (sha256)", (trunk_sha256 or "none")[:16])
    streams = data.streams
    engine = make_engine(parts.trainable, stage, streams.accumulation, run.runtime.device)
    progress = Progress(**state["progress"])
    if checkpoint is not None:
        if state["trunk_sha256"] != trunk_sha256:
            raise RecipeError(f"{checkpoint} was trained on another frozen trunk than the one loaded now")
        ckpt.load_engine(checkpoint, engine, progress.step)
        run.tracker.say(f"{name}: resumed from {checkpoint}")
    if parts.frozen is not None:
        parts.frozen.to(run.runtime.device)
    steps, world = (streams.steps_per_epoch, streams.accumulation), run.runtime.world_size
    run.tracker.say(setup_table(name, stage, counts, data.clips, steps, world, engine.optimizer_bytes()))
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
        directory=directory,
        state_extra={"inputs": inputs, "trunk_sha256": trunk_sha256},
        log_every=run.recipe.log.every,
        progress=progress,
        watch=run.watch,
    )
    return Setup(parts, trainer, data.classes)


def _say_other_depth(run: Run, name: str, stage: StageBlock) -> None:
    """A temporal encoder that is deeper or shallower than stage 1's is meant, or a mistake: the console tells."""
    weights = run.weights("stage1")
    if not isinstance(stage, Stage2) or not weights.is_file():
        return
    trained = json.loads(read_metadata(weights).get("model", "{}")).get("temporal_depth", stage.model.temporal_depth)
    if trained != stage.model.temporal_depth:
        kept = min(trained, stage.model.temporal_depth)
        told = f"model.temporal_depth is {stage.model.temporal_depth} and was {trained} in stage 1"
        run.tracker.say(f"{name}: {told}: the first {kept} blocks are taken from it")


def plan_features(
    run: Run, stage: Stage2, train: SampleIndex, val: SampleIndex | None
) -> tuple[SplitPlan, SplitPlan | None]:
    """What the feature cache of stage 2 has to be. Collective. Raises CheckpointError without stage 1's weights."""
    weights = run.weights("stage1")
    trunk = run.runtime.on_main(lambda: trunk_weights_sha256(weights))
    return plan_cache(run.recipe, stage, run.cache_directory(stage), trunk, train, val)


def open_features(run: Run, stage: StageBlock, train: SampleIndex, val: SampleIndex | None) -> FeatureCache | None:
    """The feature cache that the stage reads, None where it runs live, or where a dry run finds no complete one."""
    if not isinstance(stage, Stage2) or stage.cache is None:
        return None
    if run.dry_run and not run.weights("stage1").is_file():
        return None
    plans = plan_features(run, stage, train, val)
    if run.dry_run and run.runtime.on_main(lambda: any(missing_views(plan) for plan in plans if plan)):
        return None
    return run.runtime.on_main(lambda: open_cache(stage, *plans))


def _assemble(run: Run, stage: StageBlock, classes: str, cache: FeatureCache | None) -> Parts:
    source = run.source(stage)
    made_here = source is not None and not source.startswith("timm:") and Path(source).is_relative_to(run.directory)
    if source is not None and made_here and not Path(source).is_file():
        if not run.dry_run:
            raise CheckpointError(
                f"there is no {source} yet: train the stage before, or give its weights (stage1.weights)"
            )
        source = None  # A dry run builds the stage with random weights in place of those that are not trained yet.
    if isinstance(stage, Stage2):
        in_place = cache.trunk_sha256 if cache is not None and not cache_block(stage).runs_trunk else None
        return assemble_stage2(stage, Path(source) if source else None, classes, in_place)
    return assemble_end_to_end(stage, source)


def find_checkpoint(run: Run, name: str, directory: Path | None = None) -> Path | None:
    """The checkpoint that the stage goes on from: `--resume PATH` where it is of this stage, else the newest intact
    one. `directory` is that of a sweep's member."""
    if directory is None and run.resume_from is not None and run.resume_from[0] == name:
        return run.resume_from[1]
    root = (directory or run.directory / name) / "checkpoints"
    found, faults = run.runtime.on_main(lambda: ckpt.newest_valid(root))
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


def make_streams(
    run: Run, stage: StageBlock, train_index: SampleIndex, val_index: SampleIndex | None, cache: FeatureCache | None
) -> Streams:
    """The stage's training and evaluation streams for this rank: of clips, or of the features of `cache`."""
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
    make_train: Callable[[int, int], Iterable[Batch]]
    make_eval: Callable[[], Iterable[Batch]] | None = None
    if cache is not None and isinstance(stage, Stage2) and stage.cache is not None:
        make_train = partial(_feature_epoch, train_index, cache, stage, common)
        if val_index is not None and cache.val is not None:
            shared = {key: value for key, value in common.items() if key not in ("crop", "seed")}
            make_eval = partial(feature_eval_loader, val_index, cache.val, tubelet=stage.model.tubelet, **shared)
    else:
        make_train = partial(_clip_epoch, train_index, stage, common)
        make_eval = None if val_index is None else partial(eval_loader, val_index, **common)
    return Streams(
        steps_per_epoch=steps_per_epoch(stage, train_index),
        accumulation=-(-stage.batch.size // (world * stage.batch.micro)),
        train=make_train,
        evaluate=make_eval,
    )


def _clip_epoch(
    index: SampleIndex, stage: StageBlock, common: dict[str, Any], epoch: int, first: int
) -> Iterable[Batch]:
    return train_loader(index, augment=stage.augment, epoch=epoch, start_step=first, **common)


def _feature_epoch(
    index: SampleIndex, cache: FeatureCache, stage: Stage2, common: dict[str, Any], epoch: int, first: int
) -> Iterable[Batch]:
    own: dict[str, Any] = {"cache": stage.cache, "augment": stage.augment, "epoch": epoch, "start_step": first}
    return feature_train_loader(index, cache.train, cache.grid, **own, **common)


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
