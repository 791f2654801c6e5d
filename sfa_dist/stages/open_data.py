"""What a stage reads: the clips of its splits, or their cached features, as streams for this rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from sfa_dist.boundary.file_names import QUARANTINE
from sfa_dist.data.batches.feed import FeedSettings, Streams, feed
from sfa_dist.data.batches.loader import Loader
from sfa_dist.data.batches.planned import LoaderSettings
from sfa_dist.data.batches.stream import check_labels, eval_loader, train_loader
from sfa_dist.data.features.feature_stream import feature_eval_loader, feature_train_loader
from sfa_dist.data.shards.quarantine import read_quarantine, without_quarantined
from sfa_dist.data.shards.shard_index import ClassNames, SampleIndex, load_index
from sfa_dist.data.shards.shard_names import expand_shards, shard_folder, shown
from sfa_dist.data.video.clip_encoding import encoding_of
from sfa_dist.data.video.decode import decoder_of
from sfa_dist.errors import DataError, RecipeError
from sfa_dist.parallel.process_state import state_of
from sfa_dist.recipe.blocks import DataBlock, shard_kind
from sfa_dist.recipe.schema import Stage2, StageBlock
from sfa_dist.run.context import LOGS, Run
from sfa_dist.run.record import index_size
from sfa_dist.stages.assemble import classes_id
from sfa_dist.stages.feature_cache import (
    FeatureCache,
    SplitPlan,
    missing_views,
    open_cache,
    plan_cache,
    trunk_weights_sha256,
)
from sfa_dist.stages.notices import class_notices, loop_notices

SAME_CLASSES = "pack both with the same --classes"


@dataclass(frozen=True)
class StageData:
    """What a stage trains on."""

    streams: Streams
    cache: FeatureCache | None
    """The cache behind the streams; None: live clips."""
    classes: str
    """Identifies the class list (`classes_id`)."""
    clips: tuple[int, int]
    """Number of (training, validation) clips."""
    sha256: str
    """Of the training split's index."""


def open_data(run: Run, name: str, stage: StageBlock, index: SampleIndex) -> StageData:
    """Opens and checks everything that the stage reads. Collective.

    Raises DataError for labels or class lists that do not fit, and the errors of `open_split` and `open_features`.
    """
    blocks = stage.data
    val = open_split(run, blocks.val, f"{name}.data.val", blocks) if blocks.val else None

    def check() -> None:
        check_labels(index, stage.model)
        if val is not None:
            check_labels(val, stage.model)
            check_classes(index.classes, val)

    run.runtime.on_main(check)
    loops_reported = _report_notices(run, name, stage, index)
    cache = open_features(run, stage, index, val)
    streams = replace(make_streams(run, stage, index, val, cache), loops_reported=loops_reported)
    return StageData(
        streams, cache, classes_id(index.classes, stage.model), (len(index), index_size(val)), index.sha256
    )


def _report_notices(run: Run, name: str, stage: StageBlock, index: SampleIndex) -> bool:
    """Prints and records the notices about the training clips. Collective.

    Returns whether one of them reports videos that are too short.
    """
    loops = run.runtime.on_main(lambda: loop_notices(index, stage.data, stage.frames, name))
    for text in (*class_notices(index, stage.model), *loops):
        run.tracker.event("notice", stage=name, text=text)
        run.tracker.say(f"{name}: {text}")
    return bool(loops)


def plan_features(
    run: Run, stage: Stage2, train: SampleIndex, val: SampleIndex | None
) -> tuple[SplitPlan, SplitPlan | None]:
    """The plans of stage 2's feature cache, (training, validation). Collective.

    Raises CheckpointError without stage 1's weights.
    """
    weights = run.weights("stage1")
    trunk = run.runtime.on_main(lambda: trunk_weights_sha256(weights))
    return plan_cache(run.recipe, stage, run.cache_directory(stage), trunk, train, val)


def open_features(run: Run, stage: StageBlock, train: SampleIndex, val: SampleIndex | None) -> FeatureCache | None:
    """The feature cache that the stage reads; None where it runs live, or where a dry run finds no complete cache.

    Collective. Raises CheckpointError where the cache is incomplete, RecipeError where it does not fit.
    """
    if not isinstance(stage, Stage2) or stage.cache is None:
        return None
    if run.dry_run and not run.weights("stage1").is_file():
        return None
    plans = plan_features(run, stage, train, val)
    if run.dry_run and run.runtime.on_main(lambda: any(missing_views(plan) for plan in plans if plan)):
        return None
    return run.runtime.on_main(lambda: open_cache(stage, *plans))


def make_streams(
    run: Run, stage: StageBlock, train_index: SampleIndex, val_index: SampleIndex | None, cache: FeatureCache | None
) -> Streams:
    """The stage's training and validation streams for this rank: of clips, or of the features in `cache`."""
    settings, feeding = loader_settings(run, stage), feed_settings(run)

    def stopped() -> bool:
        return bool(run.stop)

    make_train: Callable[..., Loader]
    make_eval: Callable[[], Loader] | None = None
    if cache is not None and stage.cache_block is not None:
        make_train = partial(feature_train_loader, train_index, cache.train, cache.grid, stage.cache_block, settings)
        if val_index is not None and cache.val is not None:
            make_eval = partial(feature_eval_loader, val_index, cache.val, settings, tubelet=stage.model.tubelet)
    else:
        make_train = partial(train_loader, train_index, settings)
        make_eval = None if val_index is None else partial(eval_loader, val_index, settings)
    return Streams(
        steps_per_epoch=steps_per_epoch(stage, train_index),
        accumulation=stage.batch.accumulation(run.runtime.world_size),
        train=lambda epoch, first: feed(make_train(epoch=epoch, start_step=first), feeding, stopped),
        evaluate=None if make_eval is None else lambda: feed(make_eval(), feeding, stopped),
        clip_name=train_index.name,
        encoding=partial(encoding_of, train_index),
    )


def loader_settings(run: Run, stage: StageBlock) -> LoaderSettings:
    """The settings of this rank's loaders for a stage."""
    return LoaderSettings(
        stage.data,
        stage.batch,
        stage.augment,
        stage.frames,
        stage.model.image_size,
        run.recipe.seed,
        run.runtime.rank,
        run.runtime.world_size,
        pin_memory=run.runtime.device.type == "cuda",
    )


def feed_settings(run: Run) -> FeedSettings:
    """How this rank's feeds name themselves, and where they record a worker's crash."""
    who = f"rank {run.runtime.rank} on {run.runtime.host}"
    stacks = run.directory / LOGS / f"rank-{run.runtime.rank:05d}.loader"
    return FeedSettings(who, run.directory / QUARANTINE, stacks, device=run.runtime.device, state_of=state_of)


def check_classes(trained: ClassNames | None, index: SampleIndex) -> None:
    """Raises DataError where a split's class list is not the `trained` one: a label would mean another class."""
    found = index.classes
    if trained is None or found is None or trained == found:
        return
    where = shown(shard_folder(index.shards[0]))
    if isinstance(trained, list) and isinstance(found, list):
        raise DataError(f"other classes in {where}: {_difference(trained, found)}; {SAME_CLASSES}")
    if isinstance(trained, list) or isinstance(found, list):
        kind = "one label" if isinstance(trained, list) else "a noun and a verb"
        raise DataError(f"other classes in {where}: the model was trained on {kind} for each clip")
    for head, names in trained.items():
        if names != found.get(head, []):
            difference = _difference(names, found.get(head, []))
            raise DataError(f"other {head} classes in {where}: {difference}; {SAME_CLASSES}")


def _difference(trained: list[str], found: list[str]) -> str:
    first = next((i for i, (a, b) in enumerate(zip(trained, found, strict=False)) if a != b), None)
    if first is None:
        return f"{len(found)} classes, trained on {len(trained)}"
    return f"class {first} is {found[first]!r}, trained as {trained[first]!r}"


def steps_per_epoch(stage: StageBlock, train_index: SampleIndex) -> int:
    """Number of optimizer steps in which each clip is seen once."""
    return -(-len(train_index) // stage.batch.size)


def open_split(run: Run, patterns: list[str], where: str, data: DataBlock) -> SampleIndex:
    """The index of a split's shards, the same on all ranks. Collective.

    Rank 0 builds missing indexes before the other ranks read them. Of remote shards, rank 0 alone asks the servers and
    sends its index to the others. Clips in quarantine, which crashed a decoder before, are marked as bad.

    Raises RecipeError where `patterns` is empty or the ranks see different clips, DataError for shards that cannot be
    read or hold no samples; `where` is the key that the messages name.
    """
    if not patterns:
        raise run.runtime.for_all(RecipeError(f"{where} names no shards"))

    def load() -> SampleIndex:
        return load_split(patterns, where, data)

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
    _note_other_decoder(run, index, decoder_of(data).version)
    return without_quarantined(index, runtime.on_main(lambda: read_quarantine(run.directory / QUARANTINE)))


def load_split(patterns: Sequence[str], where: str, data: DataBlock) -> SampleIndex:
    """The index of a split's shards. Raises DataError and RecipeError, which name `where`, as `open_split`."""
    try:
        index = load_index(expand_shards(patterns, data.remote), data.remote)
    except (DataError, RecipeError) as error:
        raise type(error)(f"{where}: {error}") from error
    if len(index) == 0:
        raise DataError(f"{where}: the shards hold no samples")
    return index


def _note_other_decoder(run: Run, index: SampleIndex, decoder: str) -> None:
    """Reports, once a run, that clips were packed with another decoder than they are decoded with."""
    others = [packed for packed in index.decoders if decoder not in packed]
    for packed in others:
        if packed not in run.reported:
            run.reported.add(packed)
            run.tracker.event("other_decoder", packed_with=packed, decoder=decoder)
            hint = "frame numbers are the same, colours may differ slightly, and what one refuses the other may read"
            run.tracker.say(f"clips were packed with {packed} and are decoded with {decoder}: {hint}")
