"""From the feature cache to batches: the stream of stage 2, with cached features in place of decoded clips.

Samples, their order, temporal crops and bad samples are those of `batches.stream`: the same plan over the same source
index, and the same random numbers. Where some clips run live, a batch also has their pixels (`Batch.live`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.loader import Loader
from sfa_dist.data.batches.mixup import draw_share, mirrored, mix
from sfa_dist.data.batches.planned import LoaderSettings, PlannedBatches, RankShare, planned_loader
from sfa_dist.data.batches.stream import MicroBatches, TrainViews
from sfa_dist.data.features.feature_grid import StepGrid
from sfa_dist.data.features.feature_shards import STORED, npy_header, open_view
from sfa_dist.data.sampling.clip_sampling import Indices, offset_choices
from sfa_dist.data.sampling.randomness import first_random
from sfa_dist.data.sampling.sample_plan import Ids
from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.recipe.blocks import CacheBlock


@dataclass(frozen=True)
class CachedSplit:
    """Where the features of a split are: a folder for each view; a sample's features are (steps, `width`) `dtype`."""

    folders: tuple[Path, ...]
    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class ClipRows:
    """Which of its stored steps make a sample's clip in `epoch`; `grid` None: all of them (evaluation)."""

    frames: int
    tubelet: int
    seed: int
    epoch: int
    grid: StepGrid | None

    @property
    def steps(self) -> int:
        """Number of tubelet steps in a clip."""
        return self.frames // self.tubelet

    def stored(self, num_video_frames: int) -> int:
        """Number of steps that the cache holds of a video."""
        return self.steps if self.grid is None else self.grid.num_steps(num_video_frames)

    def __call__(self, num_video_frames: int, sample: int) -> Indices:
        """Rows, int64 (steps,), of the clip that live training would cut in this epoch."""
        if self.grid is None:
            return np.arange(self.steps, dtype=np.int64)
        # Drawn as in clip_sampling.random_offset.
        choices = offset_choices(num_video_frames, self.frames, self.grid.stride)
        offset = int(first_random(self.seed, self.epoch, sample, "clip") * choices)
        return self.grid.clip_rows(num_video_frames, self.frames, offset)


@dataclass(frozen=True)
class LiveShare:
    """Which samples of an epoch run live in spite of the cache: a pure function of (seed, epoch, sample)."""

    clips: MicroBatches
    share: float
    seed: int
    epoch: int

    def __contains__(self, sample: int) -> bool:
        return first_random(self.seed, self.epoch, sample, "live") < self.share


class FeatureBatches(PlannedBatches):
    """The micro-batches of features in the epoch of `rows`, as `stream.MicroBatches` makes them of clips."""

    def __init__(
        self,
        index: SampleIndex,
        share: RankShare,
        split: CachedSplit,
        folder: Path,
        rows: ClipRows,
        *,
        live: LiveShare | None = None,
        mixup: float = 0.0,
        workers: int = 0,
    ) -> None:
        super().__init__(index, share, workers)
        self.split, self.rows, self.live, self.mixup = split, rows, live, mixup
        self.view = open_view(folder)
        self.ahead = 0 if live is None else live.clips.ahead

    def __getitem__(self, item: int) -> Batch:
        epoch, plan, positions = self.rows.epoch, self.share.plan, self.share.positions(item)
        batch = self._batch(plan.ids_at(epoch, positions))
        if self.mixup:
            partners = plan.ids_at(epoch, mirrored(positions, plan.batch_size))
            share = draw_share(self.mixup, self.rows.seed, epoch, item // self.share.accumulation)
            mix(batch, "features", partners, share, self._batch)
        return batch

    def _batch(self, ids: Ids) -> Batch:
        features = self._zeros(len(ids))
        clips: dict[int, torch.Tensor] = {}

        def read(row: int, sample: int) -> None:
            if self.live is not None and sample in self.live:
                clips[row] = self.live.clips.read_clips(sample)[0]
            else:
                self._read(sample, features[row])

        batch = self.read_batch(ids, read)
        batch.features = self._tensor(features)
        if clips:
            batch.clips = torch.stack(list(clips.values()))
            batch.live = torch.tensor(list(clips), dtype=torch.int64)
        return batch

    def _zeros(self, clips: int) -> npt.NDArray[np.generic]:
        shape = (clips, self.rows.steps, self.split.width)
        return np.zeros(shape, np.dtype(STORED[self.split.dtype][1]))

    def _tensor(self, bits: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(bits).view(self.split.dtype)

    def _read(self, sample: int, out: npt.NDArray[np.generic]) -> None:
        """Reads the features of a sample's clip into `out` (F, D).

        Raises BadSample where they are damaged, or where the extraction stored none: then with its reason.
        """
        if sample in self.view.bad:
            raise BadSample(self.view.bad[sample])
        data = read_clip_bytes(self.view.index, sample)
        num_video_frames = int(self.view.frames[sample])
        stored = self.rows.stored(num_video_frames)
        descr = STORED[self.split.dtype][1]
        header = npy_header(stored, self.split.width, descr)
        # The expected header is known, so it is compared and never parsed.
        if not data.startswith(header) or len(data) != len(header) + stored * out[0].nbytes:
            raise BadSample(f"features are not ({stored}, {self.split.width}) {descr}: the cache is damaged")
        array = np.frombuffer(data, out.dtype, offset=len(header)).reshape(stored, self.split.width)
        # Rows are in range by construction; mode "clip" lets numpy write into `out` without an intermediate copy.
        np.take(array, self.rows(num_video_frames, sample), axis=0, out=out, mode="clip")


def view_of(epoch: int, views: int) -> int:
    """The view that an epoch reads.

    View v has the augmentation of live epoch v, so the first `views` epochs match a live run; later epochs reuse the
    views in turn.
    """
    return epoch % views


def feature_train_loader(
    index: SampleIndex,
    split: CachedSplit,
    grid: StepGrid,
    cache: CacheBlock,
    settings: LoaderSettings,
    *,
    epoch: int,
    start_step: int = 0,
) -> Loader:
    """As `stream.train_loader`, from the cache: `index` lists the source videos, `split` holds their features."""
    share, seed = settings.train_share(index), settings.seed
    live = None
    if live_share := cache.live_share(epoch):
        views = TrainViews(settings.clip, settings.augment)
        clips = MicroBatches(index, share, views, settings.open_decoder(), epoch=epoch)
        live = LiveShare(clips, live_share, seed, epoch)
    rows = ClipRows(settings.frames, grid.tubelet, seed, epoch, grid)
    folder, workers = split.folders[view_of(epoch, cache.views)], settings.data.workers
    batches = FeatureBatches(index, share, split, folder, rows, live=live, mixup=cache.mixup, workers=workers)
    return planned_loader(batches, settings, start_step)


def feature_eval_loader(index: SampleIndex, split: CachedSplit, settings: LoaderSettings, *, tubelet: int) -> Loader:
    """As `stream.eval_loader` with one view, from the stored centre clips."""
    rows = ClipRows(settings.frames, tubelet, 0, 0, None)
    share, workers = settings.eval_share(index), settings.data.workers
    return planned_loader(FeatureBatches(index, share, split, split.folders[0], rows, workers=workers), settings)
