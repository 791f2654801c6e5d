"""A stage made ready to run: its data, modules and engine, and where it stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sfa_dist import checkpoint as ckpt
from sfa_dist.assemble import Parts, assemble_end_to_end, assemble_stage2, classes_id, read_metadata
from sfa_dist.data.feature_stream import feature_eval_loader, feature_train_loader
from sfa_dist.data.feed import FeedPlace, feed
from sfa_dist.data.loader import Loader
from sfa_dist.data.quarantine import FILE_NAME, read_quarantine, without_quarantined
from sfa_dist.data.sample_plan import PLAN_VERSION
from sfa_dist.data.shard_index import SampleIndex, load_index
from sfa_dist.data.shards import LOCAL_ONLY, expand_shards, shard_folder, shown
from sfa_dist.data.stream import check_labels, eval_loader, train_loader
from sfa_dist.errors import CheckpointError, DataError, PreemptedError, RecipeError
from sfa_dist.failpoints import NO_FAILPOINTS, Failpoints
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
from sfa_dist.probe import check_probe, place_of
from sfa_dist.recipe import Recipe, RemoteBlock, Stage1, Stage2, StageBlock, shard_kind
from sfa_dist.run_record import index_size, refuse_other_inputs, setup_table
from sfa_dist.tracking import Tracker
from sfa_dist.trainer import RANDOM_VERSION, Progress, Streams, Trainer, mix_seed
from sfa_dist.trunk_setup import place_trunk, prepare_trainable

IMAGE_STAGE = "stage:image"
TRUNK = "frozen trunk (sha256)"
LOGS = "logs"  # Folder of the run directory: what single ranks have to tell.


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
    failpoints: Failpoints = NO_FAILPOINTS

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
    """A stage that is ready to run; `classes` identifies its class list in the metadata of its weights, which come into
    `directory`."""

    parts: Parts
    trainer: Trainer
    classes: str
    directory: Path


def prepare(run: Run, name: str, stage: StageBlock, index: SampleIndex, inputs: dict[str, Any]) -> Setup:
    """Weights, modules, engine and streams of a stage, resumed where a checkpoint is; says the start-up table."""
    data = open_data(run, name, stage, index)
    checkpoint = None if run.dry_run else find_checkpoint(run, name)
    return set_up(run, name, stage, data, inputs, run.directory / name, checkpoint)


@dataclass(frozen=True)
class StageData:
    """What a stage trains on: its streams, the cache behind them (None: live), the class list, clips (train, val), and
    the training clips' sha256."""

    streams: Streams
    cache: FeatureCache | None
    classes: str
    clips: tuple[int, int]
    sha256: str


def open_data(run: Run, name: str, stage: StageBlock, index: SampleIndex) -> StageData:
    """Opens and checks all that the stage reads. Collective."""
    blocks = stage.data
    val = open_split(run, blocks.val, f"{name}.data.val", blocks.remote) if blocks.val else None

    def check() -> None:
        check_labels(index, stage.model.classes)
        if val is not None:
            check_labels(val, stage.model.classes)
            check_classes(index.classes, val)

    run.runtime.on_main(check)
    cache = open_features(run, stage, index, val)
    streams = make_streams(run, stage, index, val, cache)
    return StageData(
        streams, cache, classes_id(index.classes, stage.model), (len(index), index_size(val)), index.sha256
    )


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
    parts = run.runtime.each(lambda: _assemble(run, stage, data.classes, data.cache))
    _say_other_depth(run, name, stage)
    counts = parts.parameters()
    failpoints = run.failpoints.within(stage=name)
    state: dict[str, Any] = {"progress": {}}
    if checkpoint is not None:
        state = run.runtime.on_main(lambda: ckpt.read_state(checkpoint))
        wanted = {**inputs, **origin(run, data)}
        run.runtime.on_main(lambda: refuse_other_inputs(name, recorded_origin(state, checkpoint), wanted))
        run.runtime.everywhere(lambda: _load_parameters(parts, checkpoint, failpoints))
    trunk_sha256 = parts.trunk_sha256()
    if data.cache is not None and trunk_sha256 != data.cache.trunk_sha256:
        made = data.cache.train.folders[0].parent
        raise RecipeError(f"the feature cache {made} was made by another trunk than stage 1's")
    run.runtime.require_equal(f"the frozen trunk of {name} (sha256)", (trunk_sha256 or "none")[:16])
    for words in prepare_trainable(parts.trainable, stage):
        run.tracker.say(f"{name}: {words}")
    streams = data.streams
    engine = make_engine(parts.trainable, stage, streams.accumulation, run.runtime.device)
    progress = Progress(**state["progress"])
    if checkpoint is not None:
        run.runtime.on_main(lambda: refuse_other_inputs(name, {TRUNK: state["trunk_sha256"]}, {TRUNK: trunk_sha256}))
        run.runtime.everywhere(lambda: ckpt.load_engine(checkpoint, engine, progress.step, failpoints))
    chunk_frames = None
    if parts.frozen is not None and isinstance(stage, Stage2):
        run.tracker.say(f"{name}: {place_trunk(parts.frozen, stage, run.runtime, state.get('chunk_frames'))}")
        chunk_frames = parts.frozen.chunk_frames
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
        saver=ckpt.Saver(directory / "checkpoints", run.runtime, stage.checkpoint.keep, failpoints),
        state_extra={
            "inputs": inputs,
            "origin": origin(run, data),
            "trunk_sha256": trunk_sha256,
            "chunk_frames": chunk_frames,
        },
        log_every=run.recipe.log.every,
        progress=progress,
        saved_step=progress.step,
        watch=run.watch,
    )
    if checkpoint is not None:
        _check_probe(trainer, state["probe"], checkpoint)
        run.tracker.say(f"{name}: resumed from {checkpoint}")
    return Setup(parts, trainer, data.classes, directory)


def origin(run: Run, data: StageData) -> dict[str, Any]:
    """What the meaning of a step number depends on: which clips a step is, and which random numbers are drawn in it.

    Together with the step it is all the state that data and random numbers have: both are functions of it.
    """
    return {
        "sample plan (version)": PLAN_VERSION,
        "random numbers (version)": RANDOM_VERSION,
        "train clips (sha256)": data.sha256,
        "seed": run.recipe.seed,
    }


def recorded_origin(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The inputs and the origin that a checkpoint was made with. Raises CheckpointError where it tells none."""
    try:
        if state["step"] == state["progress"]["step"]:
            return {**state["inputs"], **state["origin"]}
    except (KeyError, TypeError):
        pass
    raise CheckpointError(f"{checkpoint}/state.json does not tell which step it is, or what it was made from")


def _load_parameters(parts: Parts, checkpoint: Path, failpoints: Failpoints) -> None:
    load_exactly(parts.trainable, ckpt.read_parameters(checkpoint, failpoints), str(checkpoint))


def _check_probe(trainer: Trainer, recorded: dict[str, Any], checkpoint: Path) -> None:
    """All ranks compute it, and rank 0, which has recorded it, compares."""
    loss, place = trainer.probe.loss(trainer.engine), place_of(trainer.stage, trainer.runtime)
    trainer.runtime.on_main(lambda: check_probe(recorded, loss, place, str(checkpoint)))


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
    found, faults = ckpt.newest_valid(root, run.runtime, run.failpoints.within(stage=name))
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
    place = feed_place(run)

    def asked() -> bool:
        return bool(run.stop)

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
    make_train: Callable[[int, int], Loader]
    make_eval: Callable[[], Loader] | None = None
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
        train=lambda epoch, first: feed(make_train(epoch, first), place, asked),
        evaluate=None if make_eval is None else lambda: feed(make_eval(), place, asked),
        clip_name=train_index.name,
    )


def feed_place(run: Run) -> FeedPlace:
    """Where this rank writes down what its loader's workers die of."""
    who = f"rank {run.runtime.rank} on {run.runtime.host}"
    stacks = run.directory / LOGS / f"rank-{run.runtime.rank:05d}.loader"
    return FeedPlace(who, run.directory / FILE_NAME, stacks, device=run.runtime.device)


def leave_if_asked(run: Run, when: str) -> None:
    """Raises PreemptedError on every rank when one was asked to stop, where there is nothing to save. Collective."""
    [asked] = run.runtime.sum(bool(run.stop))
    if asked:
        run.tracker.event("preempted", reason=run.stop.reason)
        text = f"stopped {when}: what was done before is saved, run the same command again to go on"
        raise run.runtime.for_all(PreemptedError(text))


def _clip_epoch(index: SampleIndex, stage: StageBlock, common: dict[str, Any], epoch: int, first: int) -> Loader:
    return train_loader(index, augment=stage.augment, epoch=epoch, start_step=first, **common)


def _feature_epoch(
    index: SampleIndex, cache: FeatureCache, stage: Stage2, common: dict[str, Any], epoch: int, first: int
) -> Loader:
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
    where = shown(shard_folder(index.shards[0]))
    raise DataError(f"other classes in {where}: {what}; pack both with the same --classes")


def steps_per_epoch(stage: StageBlock, train_index: SampleIndex) -> int:
    """Optimizer steps in which each clip is seen once."""
    return -(-len(train_index) // stage.batch.size)


def open_split(run: Run, patterns: list[str], where: str, remote: RemoteBlock = LOCAL_ONLY) -> SampleIndex:
    """The index of a split's shards. Rank 0 builds what is missing before the others look.

    Of shards that are not local files it alone asks the servers, and tells the others what it found. Clips that crashed
    a decoder before are bad ones in it.
    """
    if not patterns:
        raise RecipeError(f"{where} names no shards")

    def load() -> SampleIndex:
        try:
            index = load_index(expand_shards(patterns, remote), remote)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if len(index) == 0:
            raise DataError(f"{where}: the shards hold no samples")
        return index

    def build() -> SampleIndex:
        with run.stop.nothing_to_save():
            return load()

    runtime = run.runtime
    if any(shard_kind(pattern) for pattern in patterns):
        index = runtime.on_main(build)
    else:
        runtime.on_main(lambda: bool(build()))
        index = load()
    runtime.require_equal(f"the clips of {where} (sha256 of their index)", index.sha256[:16])
    return without_quarantined(index, runtime.on_main(lambda: read_quarantine(run.directory / FILE_NAME)))
