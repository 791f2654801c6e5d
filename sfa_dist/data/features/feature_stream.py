"""From the feature cache to batches: the stream of stage 2 with stored features in place of decoded clips.

Samples, their order, crops and verdicts are those of `stream`: the same SamplePlan over the same source index, the same
random numbers. A batch has `features` (B, F, D) in place of `clips`, and where some clips run live also `clips` uint8
(L, 3, T, S, S) with `live` int64 (L,), the rows of the batch that they belong in (zeros until then). With mixup also
`partners` int64, labels like `labels`, and `shares` float32 (B,), how much of a row is its own clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sfa_dist.data.batches.loader import NO_SAMPLE, Batch, Batches, Loader, make_loader
from sfa_dist.data.batches.mixup import draw_share, mirrored, mix
from sfa_dist.data.batches.stream import ClipSettings, MicroBatches, TrainViews, eval_plan, train_plan
from sfa_dist.data.features.feature_grid import StepGrid
from sfa_dist.data.features.feature_shards import STORED, npy_header, open_view
from sfa_dist.data.sampling.clip_sampling import Indices, offset_choices
from sfa_dist.data.sampling.randomness import first_random
from sfa_dist.data.sampling.sample_plan import Ids, SamplePlan
from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode import decoder_of
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock, CacheBlock, DataBlock


@dataclass(frozen=True)
class CachedSplit:
    """Where the features of a split are: a folder for each view, which begin with (steps, `width`) of `dtype`."""

    folders: tuple[Path, ...]
    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class ClipRows:
    """Which stored steps make the clip of a sample. `grid` None: all that are stored (evaluation)."""

    frames: int
    tubelet: int
    seed: int
    epoch: int
    grid: StepGrid | None

    @property
    def steps(self) -> int:
        """Tubelet steps of a clip."""
        return self.frames // self.tubelet

    def stored(self, num_video_frames: int) -> int:
        """Steps that the cache holds of a video."""
        return self.steps if self.grid is None else self.grid.num_steps(num_video_frames)

    def __call__(self, num_video_frames: int, sample: int) -> Indices:
        """The rows of the clip that live training would cut in this epoch, int64 (steps,)."""
        if self.grid is None:
            return np.arange(self.steps, dtype=np.int64)
        # As clip_sampling.random_offset draws it.
        choices = offset_choices(num_video_frames, self.frames, self.grid.stride)
        offset = int(first_random(self.seed, self.epoch, sample, "clip") * choices)
        return self.grid.clip_rows(num_video_frames, self.frames, offset)


@dataclass(frozen=True)
class LiveShare:
    """Which clips of an epoch run through the trunk all the same: a pure function of (seed, epoch, sample)."""

    clips: MicroBatches
    share: float
    seed: int
    epoch: int

    def __contains__(self, sample: int) -> bool:
        return first_random(self.seed, self.epoch, sample, "live") < self.share


class FeatureBatches(Batches):
    """Item k is this rank's k-th micro-batch of the epoch, as `stream.MicroBatches`."""

    def __init__(
        self,
        index: SampleIndex,
        plan: SamplePlan,
        split: CachedSplit,
        folder: Path,
        rows: ClipRows,
        *,
        rank: int,
        world_size: int,
        micro: int,
        live: LiveShare | None = None,
        mixup: float = 0.0,
        workers: int = 0,
    ) -> None:
        super().__init__(index, workers)
        self.plan, self.split, self.rows = plan, split, rows
        self.view = open_view(folder)
        self.rank, self.world_size, self.micro = rank, world_size, micro
        self.live, self.mixup = live, mixup
        self.accumulation = plan.accumulation(world_size, micro)
        self.ahead = 0 if live is None else live.clips.ahead

    def __len__(self) -> int:
        return self.plan.steps_per_epoch * self.accumulation

    def __getitem__(self, item: int) -> Batch:
        epoch = self.rows.epoch
        places = self.plan.item_positions(item, self.rank, self.world_size, self.micro)
        batch = self._batch(self.plan.ids_at(epoch, places))
        if self.mixup:
            partners = self.plan.ids_at(epoch, mirrored(places, self.plan.batch_size))
            share = draw_share(self.mixup, self.rows.seed, epoch, item // self.accumulation)
            mix(batch, "features", partners, share, self._batch)
        return batch

    def _batch(self, ids: Ids) -> Batch:
        features = self._zeros(len(ids))
        labels, weights = np.zeros((len(ids), *self.index.label.shape[1:]), np.int64), np.zeros(len(ids), np.float32)
        bad: list[tuple[str, str]] = []
        clips: dict[int, torch.Tensor] = {}
        place = self.own_position()
        for row, sample in enumerate(ids.tolist()):
            if sample < 0:
                continue
            place[1] = sample
            try:
                if self.live is not None and sample in self.live:
                    clips[row] = self.live.clips._clips(sample)[0]
                else:
                    self._read(sample, features[row])
            except BadSample as error:
                bad.append((self.index.name(sample), error.reason))
                continue
            labels[row], weights[row] = self.index.label[sample], 1.0
        place[1] = NO_SAMPLE
        batch = {
            "features": self._tensor(features),
            "labels": torch.from_numpy(labels),
            "weights": torch.from_numpy(weights),
            "ids": torch.from_numpy(ids.copy()),
            "views": 1,
            "bad": bad,
        }
        if clips:
            batch |= {"clips": torch.stack(list(clips.values())), "live": torch.tensor(list(clips), dtype=torch.int64)}
        return batch

    def _zeros(self, clips: int) -> npt.NDArray[np.generic]:
        shape = (clips, self.rows.steps, self.split.width)
        return np.zeros(shape, np.dtype(STORED[self.split.dtype][1]))

    def _tensor(self, bits: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(bits).view(self.split.dtype)

    def _read(self, sample: int, out: npt.NDArray[np.generic]) -> None:
        """The features of a sample's clip into `out` (F, D). Raises BadSample, with the reason of the extraction where
        there are none."""
        if sample in self.view.bad:
            raise BadSample(self.view.bad[sample])
        data = read_clip_bytes(self.view.index, sample)
        num_video_frames = int(self.view.frames[sample])
        stored = self.rows.stored(num_video_frames)
        descr = STORED[self.split.dtype][1]
        header = npy_header(stored, self.split.width, descr)
        # Compared instead of parsed: it is known what must stand there, and anything else is not ours.
        if not data.startswith(header) or len(data) != len(header) + stored * out[0].nbytes:
            raise BadSample(f"features are not ({stored}, {self.split.width}) {descr}: the cache is damaged")
        array = np.frombuffer(data, out.dtype, offset=len(header)).reshape(stored, self.split.width)
        # Rows are inside by construction; "clip" lets numpy write into the batch without a copy between.
        np.take(array, self.rows(num_video_frames, sample), axis=0, out=out, mode="clip")


def view_of(epoch: int, views: int) -> int:
    """The view that an epoch reads. View v has the augmentation of live epoch v, so the first `views` epochs are those
    of the live run, and later ones take turns."""
    return epoch % views


def feature_train_loader(
    index: SampleIndex,
    split: CachedSplit,
    grid: StepGrid,
    cache: CacheBlock,
    data: DataBlock,
    augment: AugmentBlock,
    batch: BatchBlock,
    *,
    frames: int,
    crop: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
) -> Loader:
    """As `stream.train_loader`, from the cache: `index` is that of the source's videos, `split` their features."""
    plan = train_plan(index, data, batch, seed)
    folder = split.folders[view_of(epoch, cache.views)]
    share = cache.live_share(epoch)
    common: dict[str, Any] = {"rank": rank, "world_size": world_size, "micro": batch.micro}
    live = None
    if share:
        views = TrainViews(ClipSettings(data, frames, crop, seed), augment)
        clips = MicroBatches(index, plan, views, decoder_of(data), epoch=epoch, **common)
        live = LiveShare(clips, share, seed, epoch)
    rows = ClipRows(frames, grid.tubelet, seed, epoch, grid)
    batches = FeatureBatches(
        index, plan, split, folder, rows, live=live, mixup=cache.mixup, workers=data.workers, **common
    )
    items = range(start_step * batches.accumulation, len(batches))
    return make_loader(batches, items, data.workers, pin_memory, prefetch_factor)


def feature_eval_loader(
    index: SampleIndex,
    split: CachedSplit,
    data: DataBlock,
    batch: BatchBlock,
    *,
    frames: int,
    tubelet: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
) -> Loader:
    """As `stream.eval_loader` with one view, from the stored centre clips."""
    micro = batch.eval_micro or batch.micro
    plan = eval_plan(index, micro, world_size)
    rows = ClipRows(frames, tubelet, 0, 0, None)
    own: dict[str, Any] = {"rank": rank, "world_size": world_size, "micro": micro, "workers": data.workers}
    batches = FeatureBatches(index, plan, split, split.folders[0], rows, **own)
    return make_loader(batches, range(len(batches)), data.workers, pin_memory, prefetch_factor)
