"""Builds the feature cache: all ranks run the frozen trunk over every video and view, once.

The unit of work is a part, about a hundred clips of one view. The clips of a part do not depend on the number of ranks,
and a finished part is never made again, so an extraction that is killed continues on any number of ranks and gives the
same bytes. Ranks work independently and synchronise every few seconds, to stop together and to share failures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfa_dist import __version__
from sfa_dist.data.features.feature_shards import (
    PartWriter,
    begin_view,
    close_view,
    drop_leftovers,
    missing_parts,
    plan_parts,
    read_building,
    read_manifest,
)
from sfa_dist.data.features.feature_slices import FeaturePart, Slice, VideoSlices, slice_loader
from sfa_dist.data.video.decode import decoder_of
from sfa_dist.errors import CheckpointError
from sfa_dist.models.footprint import trunk_dtype
from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.vivit import dims_of
from sfa_dist.parallel.environment import environment
from sfa_dist.recipe.schema import Stage2
from sfa_dist.recipe.stage_names import CACHE
from sfa_dist.run.context import Run
from sfa_dist.run.lock import held
from sfa_dist.run.record import read_done, write_done
from sfa_dist.stages.assemble import assemble_trunk, trunk_parameters
from sfa_dist.stages.feature_cache import SplitPlan, cache_block, flat, missing_views, refuse_other_key
from sfa_dist.stages.open_data import open_split, plan_features
from sfa_dist.stages.rank_sync import RankSync
from sfa_dist.stages.trunk_fidelity import report_fidelity
from sfa_dist.stages.trunk_setup import place_trunk

HASH_THREADS = 4
CHUNK = "chunk_frames"  # A key of a view's manifest.


def build_views(run: Run, stage: Stage2, plan: SplitPlan, trunk: FrozenTrunk, trunk_sha256: str) -> None:
    """Extracts the missing views of a split with `trunk`, which is on the device. Collective.

    Raises RecipeError for parts of another recipe, CheckpointError where the disk fails, PreemptedError on a stop
    request, DataError over the budget of bad clips.
    """
    missing = run.runtime.on_main(lambda: missing_views(plan))
    for view in range(plan.views):
        if view in missing:
            _build_view(run, stage, plan, view, trunk, trunk_sha256)
        else:  # The run may have been killed after it wrote the manifest and before this.
            run.runtime.on_main(partial(drop_leftovers, plan.view(view), plan_parts(plan.index, view)))


def _build_view(run: Run, stage: Stage2, plan: SplitPlan, view: int, trunk: FrozenTrunk, trunk_sha256: str) -> None:
    folder, parts = plan.view(view), plan_parts(plan.index, view)
    title = f"cache: {plan.folder.name}, view {view + 1} of {plan.views}"
    made_of = {**plan.key, "augmentation seed": plan.steps.seed, "trunk (sha256)": trunk_sha256}

    def begin() -> None:
        recorded = begin_view(folder, {**made_of, CHUNK: trunk.chunk_frames})
        recorded.pop(CHUNK, None)  # The chunks do not change what the features are.
        refuse_other_key(folder, recorded, made_of)

    run.runtime.on_main(begin)
    sync = RankSync(run, title, stage.data.max_bad_fraction)
    pending = sync.on_main(lambda: missing_parts(folder, parts, HASH_THREADS))
    done = len(parts) - len(pending)
    run.tracker.say(f"{title}: {len(plan.index):,} clips in {len(parts)} parts" + (f", {done} done" if done else ""))
    _Extraction(run, plan, folder, trunk, sync).work(pending[run.runtime.rank :: run.runtime.world_size])
    sync.finish()
    manifest = {
        "version": 1,
        "classes": plan.index.classes,
        "view": view,
        "key": plan.key,
        "augmentation_seed": plan.steps.seed,
        "trunk_sha256": trunk_sha256,
        CHUNK: trunk.chunk_frames,
        "device": run.runtime.device.type,
        "program": f"sfa_dist {__version__}",
    }
    sync.on_main(lambda: close_view(folder, parts, manifest, HASH_THREADS))


@dataclass
class _Extraction:
    """One rank's share of a view."""

    run: Run
    plan: SplitPlan
    folder: Path
    trunk: FrozenTrunk
    sync: RankSync
    _writers: dict[str, PartWriter] = field(default_factory=dict)  # By part: each loader process works on one.
    _pieces: dict[str, list[Tensor]] = field(default_factory=dict)
    _since: float = 0.0

    def work(self, parts: Sequence[FeaturePart]) -> None:
        """Writes the parts; a disk failure of this rank is raised on all ranks."""
        steps = self.plan.steps
        chunk = max(1, self.trunk.chunk_frames // steps.grid.tubelet)
        decoder = decoder_of(steps.data)
        videos = VideoSlices(self.plan.index, decoder, steps, parts, chunk)
        on_card = self.run.runtime.device.type == "cuda"
        self._since = time.perf_counter()
        try:
            for piece in slice_loader(videos, min(steps.data.workers, len(parts)), pin_memory=on_card):
                try:
                    self._take(piece)
                except OSError as error:
                    where = f"rank {self.run.runtime.rank} on {self.run.runtime.host}"
                    text = f"{self.sync.title}: {where} cannot write to {self.folder}: {error}"
                    self.sync.beat(done=True, fault=CheckpointError(f"{text}; finished parts are kept"))
                self.run.watch.phase("cache extract", self.sync.clips)
                self.sync.beat_if_due()
        finally:
            for writer in self._writers.values():
                writer.discard()

    def _take(self, piece: Slice) -> None:
        name, sample = piece.part.name, piece.sample
        writer = self._writers.get(name)
        if writer is None:
            facts = flat(vars(self.plan.steps.grid), "grid")
            writer = self._writers[name] = PartWriter(self.folder, piece.part, self.plan.index, facts)
        if piece.clips is None:
            self._pieces.pop(name, None)
            writer.add_bad(sample, piece.bad or "")
            self.sync.bad[self.plan.index.name(sample)] = piece.bad or ""
        else:
            self._pieces.setdefault(name, []).append(self.trunk(piece.clips)[0])
            if piece.last:
                writer.add(sample, torch.cat(self._pieces.pop(name)).cpu(), piece.num_video_frames)
        self.sync.clips += piece.last
        if writer.is_full:
            now = time.perf_counter()
            writer.finish(seconds=now - self._since)
            self._since = now
            del self._writers[name]


def run_cache_stage(run: Run, stage: Stage2) -> None:
    """The stage `cache`: builds the missing views of the recipe's feature cache, and writes its `done.json`.

    Collective. Raises CheckpointError without stage 1's weights or where the cache cannot be written, RecipeError where
    the views there were made from something else, and the errors of `build_views`.
    """
    directory, weights = run.cache_directory(stage), run.weights("stage1")
    if not run.runtime.on_main(weights.is_file):
        if run.dry_run:
            run.tracker.say("cache: built from stage 1's weights, which are not there yet")
            return
        text = f"there is no {weights} yet: train stage1 first, or set stage1.weights"
        raise run.runtime.for_all(CheckpointError(text))
    run.watch.phase("cache load")
    data = stage.data
    train = open_split(run, data.train, "stage2.data.train", data)
    val = open_split(run, data.val, "stage2.data.val", data) if data.val else None
    plans = [plan for plan in plan_features(run, stage, train, val) if plan is not None]
    missing = run.runtime.on_main(lambda: sum(len(missing_views(plan)) for plan in plans))
    if not missing:
        run.tracker.say(f"cache: {directory} is complete and fits")
    elif run.dry_run:
        run.tracker.say(f"cache: {missing} views to build in {directory}; {_least_size(stage, plans)}")
    else:
        _build(run, stage, plans, directory, weights)
    if not run.dry_run and (missing or read_done(run.directory / CACHE) is None):
        _write_done(run, stage, plans, built=bool(missing) or cache_block(stage).dir is None)


def _build(run: Run, stage: Stage2, plans: list[SplitPlan], directory: Path, weights: Path) -> None:
    with ExitStack() as lock:
        run.runtime.on_main(lambda: lock.enter_context(_locked(directory, plans)))
        report_fidelity(run, CACHE, stage, plans[0].index, weights)
        trunk = assemble_trunk(stage, weights)
        trunk_sha256 = trunk.sha256()
        run.runtime.require_equal("the frozen trunk of the cache (sha256)", trunk_sha256[:16])
        recorded = run.runtime.on_main(lambda: _recorded_chunk(plans))
        run.tracker.say(f"cache: {place_trunk(trunk, stage, run.runtime, recorded)}")
        run.tracker.event("start", stage=CACHE, step=0)
        for plan in plans:
            build_views(run, stage, plan, trunk, trunk_sha256)


def _recorded_chunk(plans: list[SplitPlan]) -> int | None:
    """The chunk that views present or begun were made with: other chunks would give other bytes."""
    for folder in (folder for plan in plans for folder in plan.folders):
        made = read_manifest(folder) or read_building(folder)
        if CHUNK in made:
            return int(made[CHUNK])
    return None


@contextmanager
def _locked(directory: Path, plans: list[SplitPlan]) -> Iterator[None]:
    """Locks the cache for this run, since two runs may share a cache folder.

    Raises RecipeError naming the run that holds the lock, CheckpointError for a folder that cannot be written, with the
    views that it has.
    """
    with ExitStack() as lock:
        try:
            lock.enter_context(held(directory, environment()))
        except CheckpointError as error:
            views = "; ".join(
                f"{plan.folder.name} has {plan.views - len(missing_views(plan))} of {plan.views} views"
                for plan in plans
            )
            raise CheckpointError(
                f"the feature cache {directory} is not complete ({views}) and cannot be written to ({error}): set "
                "stage2.cache.dir to a folder that can, or stage2.cache.views to the number of views that are there"
            ) from error
        yield


def _write_done(run: Run, stage: Stage2, plans: list[SplitPlan], built: bool) -> None:
    """Writes `done.json` with the cost of the extraction: 0 where a shared folder had the cache. Collective."""
    peak = max(run.runtime.gather(run.runtime.peak_memory_gib()))

    def write() -> dict[str, Any]:
        views = [(folder, read_manifest(folder) or {}) for plan in plans for folder in plan.folders]
        seconds = sum(manifest["rank_seconds"] for _, manifest in views) if built else 0.0
        result = {
            "steps": 0,
            "seconds": seconds / run.runtime.world_size,
            "gpu_seconds": seconds,
            "peak_memory_gib": peak,
            "trainable_parameters": 0,
            "frozen_parameters": trunk_parameters(stage),
            "optimizer_bytes_per_rank": 0,
            "bad_samples": sum(len(manifest["bad"]) for _, manifest in views),
            "views": plans[0].views,
            "bytes": sum((folder / name).stat().st_size for folder, manifest in views for name in manifest["shards"]),
            "directory": str(run.cache_directory(stage)),
        }
        write_done(run.directory / CACHE, plans[0].key, result)
        return result

    result = run.runtime.on_main(write)
    run.tracker.event("done", stage=CACHE, step=0, seconds=result["seconds"])
    size, clips = result["bytes"] / 2**30, len(plans[0].index)
    run.tracker.say(
        f"cache: {plans[0].views} views of {clips:,} clips, {size:.2f} GiB, {result['seconds']:.0f} s of extraction"
    )


def _least_size(stage: Stage2, plans: list[SplitPlan]) -> str:
    width = dims_of(stage.model).width
    size = width * trunk_dtype(stage).itemsize * stage.frames // stage.model.tubelet
    total = size * sum(len(plan.index) * plan.views for plan in plans)
    return f"at least {total / 2**30:.1f} GiB, and more in proportion where videos are longer than a clip"
