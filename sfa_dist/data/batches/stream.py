"""From the index to batches of clips, in seven steps.

    1 index    every sample's position, checksum and label       shard_index.SampleIndex
    2 plan     which samples this rank takes at a step           sample_plan.SamplePlan, planned.RankShare
    3 read     by offset, checked by crc32                       reader.read_clip_bytes
    4 decode   the opened video                                  decode.Decoder
    5 sample   which frames make the clip                        clip_sampling
    6 augment  resize, crop, colour                              augment
    7 batch    tensors                                           batch.Batch

Each step is a pure function of (sample, epoch, seed), so any number of loader workers gives the same batches, and a
run resumes by starting at a later item. A bad sample is never replaced by another one, which would then be seen twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sfa_dist.data.batches.augment import SpatialViews, TrainView
from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.loader import Loader
from sfa_dist.data.batches.mixup import draw_share, mirrored, mix
from sfa_dist.data.batches.planned import ClipSettings, LoaderSettings, PlannedBatches, RankShare, planned_loader
from sfa_dist.data.batches.resizing import copy_pixels
from sfa_dist.data.sampling.clip_sampling import frame_indices, random_offset, view_offsets
from sfa_dist.data.sampling.randomness import permutation, sample_rng
from sfa_dist.data.sampling.sample_plan import Ids
from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import NO_LABEL, SampleIndex
from sfa_dist.data.shards.shard_names import shown
from sfa_dist.data.video.bad_sample import BadSample, OverLimit
from sfa_dist.data.video.decode import Decoder
from sfa_dist.data.video.decode_card import beside_training
from sfa_dist.data.video.decode_limits import check_bytes, check_whole
from sfa_dist.data.video.salvage import valid_prefix
from sfa_dist.data.video.video import Video
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import AugmentBlock, MixupBlock, ModelBlock, Resize


@dataclass(frozen=True)
class TrainViews:
    """One random view of each sample."""

    clip: ClipSettings
    augment: AugmentBlock
    views: int = 1

    def __call__(self, video: Video, epoch: int, sample: int) -> torch.Tensor:
        """The view of sample number `sample` in `epoch`: uint8 (1, 3, T, S, S)."""
        settings = self.clip
        seed, stride = settings.seed, settings.data.stride
        offset = random_offset(sample_rng(seed, epoch, sample, "clip"), video.num_frames, settings.frames, stride)
        numbers = frame_indices(video.num_frames, settings.frames, stride, offset)
        rng = sample_rng(seed, epoch, sample, "augment")
        view = TrainView(settings.data.resize, settings.crop, self.augment, rng)
        return view.finish(video.frames_at(_ordered(numbers, settings, epoch, sample), view.shrink)).unsqueeze(0)


@dataclass(frozen=True)
class EvalViews:
    """temporal * spatial views of each sample; the spatial views of one temporal view are neighbours."""

    clip: ClipSettings
    temporal: int
    spatial: int
    resize: Resize = "official"

    @property
    def views(self) -> int:
        """Number of views of a sample."""
        return self.temporal * self.spatial

    def __call__(self, video: Video, epoch: int, sample: int) -> torch.Tensor:
        """All views of sample number `sample`: uint8 (views, 3, T, S, S)."""
        settings = self.clip
        stride, frames = settings.data.stride, settings.frames
        offsets = view_offsets(video.num_frames, frames, stride, self.temporal)
        numbers = [frame_indices(video.num_frames, frames, stride, offset) for offset in offsets]
        ordered = [_ordered(each, settings, epoch, sample) for each in numbers]
        crops = SpatialViews(settings.data.resize, settings.crop, self.resize, self.spatial)
        # A single call decodes and resizes each frame once, where temporal views overlap too.
        clips = video.frames_at(np.concatenate(ordered), crops.shrink).split(frames)
        views = torch.empty(
            (self.views, 3, frames, settings.crop, settings.crop), dtype=torch.uint8, device=clips[0].device
        )
        for number, view in enumerate(views):
            copy_pixels(view, crops.cut(clips[number // self.spatial], number % self.spatial))
        return views


class MicroBatches(PlannedBatches):
    """The micro-batches of clips of one epoch, each clip with all its views."""

    def __init__(
        self,
        index: SampleIndex,
        share: RankShare,
        views: TrainViews | EvalViews,
        decoder: Decoder,
        *,
        epoch: int = 0,
        mixup: MixupBlock | None = None,
        workers: int = 0,
    ) -> None:
        super().__init__(index, share, workers)
        self.views, self.epoch, self.mixup = views, epoch, mixup
        self._open, self.decoder, self._is_short = decoder.open, decoder._replace(open=self._opened), False
        self.ahead = int(decoder.device.type != "cpu")

    def __getitem__(self, item: int) -> Batch:
        plan, positions = self.share.plan, self.share.positions(item)
        batch = self._batch(plan.ids_at(self.epoch, positions))
        if self.mixup is not None:
            step, part = divmod(item, self.share.accumulation)
            number = None if self.mixup.over == "global" else self.share.rank * self.share.accumulation + part
            opposite = mirrored(positions, plan.batch_size) if number is None else positions[::-1]
            share = draw_share(self.mixup.alpha, self.views.clip.seed, self.epoch, step, number)
            mix(batch, "clips", plan.ids_at(self.epoch, opposite), share, self._batch)
        return batch

    def _batch(self, ids: Ids) -> Batch:
        settings = self.views.clip
        shape = (len(ids), self.views.views, 3, settings.frames, settings.crop, settings.crop)
        clips = torch.zeros(shape, dtype=torch.uint8)
        looped = 0

        def read(row: int, sample: int) -> None:
            nonlocal looped
            clips[row] = self.read_clips(sample)
            looped += self._is_short

        batch = self.read_batch(ids, read)
        batch.clips, batch.views, batch.looped = clips.flatten(0, 1), self.views.views, looped
        return batch

    def _opened(self, data: bytes) -> Video:
        """Opens a video and notes whether it is shorter than a clip's span."""
        video = self._open(data)
        self._is_short = video.num_frames < self.views.clip.span
        return video

    def read_clips(self, sample: int) -> torch.Tensor:
        """The views of one sample, uint8 (views, 3, T, S, S). Raises BadSample."""
        if sample in self.index.errors or not self.index.has_label(sample):
            raise BadSample(self.index.errors.get(sample, NO_LABEL))
        check_bytes(int(self.index.size[sample]), self.views.clip.data.limits)  # Before it is read into memory.
        return cut_clips(read_clip_bytes(self.index, sample), self.decoder, self.views, self.epoch, sample)


def cut_clips(
    data: bytes, decoder: Decoder, views: TrainViews | EvalViews, epoch: int = 0, sample: int = 0
) -> torch.Tensor:
    """The views of the video file `data`, uint8 (views, 3, T, S, S) on the host.

    Unless `data.damaged` is `strict`, a damaged file is cut from its intact beginning. Raises BadSample.
    """
    settings = views.clip
    with beside_training(decoder.device):
        try:
            check_whole(data)
            return views(decoder.open(data), epoch, sample).cpu()
        except BadSample as damage:
            if settings.data.damaged == "strict" or isinstance(damage, OverLimit):
                raise
            prefix = valid_prefix(decoder, data, settings.data.limits, settings.span, damage)
            return views(prefix, epoch, sample).cpu()


def train_loader(index: SampleIndex, settings: LoaderSettings, *, epoch: int, start_step: int = 0) -> Loader:
    """A rank's micro-batches of an epoch, from optimizer step `start_step` to the end of the epoch.

    Each run of ceil(batch.size / (world_size * batch.micro)) batches is one optimizer step. Batches have
    B = batch.micro and V = 1. Raises RecipeError where `data.decoder` is not installed.
    """
    mixup = settings.augment.mixup
    batches = MicroBatches(
        index,
        settings.train_share(index, mixup),
        TrainViews(settings.clip, settings.augment),
        settings.open_decoder(),
        epoch=epoch,
        mixup=mixup,
        workers=settings.data.workers,
    )
    return planned_loader(batches, settings, start_step)


def eval_loader(
    index: SampleIndex, settings: LoaderSettings, *, temporal_views: int = 1, spatial_views: int = 1
) -> Loader:
    """A rank's share of all samples, each seen once over all ranks and with all its views.

    Batches have B = batch.eval_micro (or batch.micro) and V = temporal_views * spatial_views; frames are resized as
    `augment.resize` says. Raises RecipeError where `data.decoder` is not installed.
    """
    views = EvalViews(settings.clip, temporal_views, spatial_views, settings.augment.resize)
    share, workers = settings.eval_share(index), settings.data.workers
    return planned_loader(MicroBatches(index, share, views, settings.open_decoder(), workers=workers), settings)


def check_labels(index: SampleIndex, model: ModelBlock) -> None:
    """Raises DataError where a label does not fit the model's classes: on a GPU the loss would crash unexplained."""
    heads = {"": model.classes} if model.class_heads is None else model.class_heads
    columns = index.label.reshape(len(index), -1)
    if columns.shape[1] != len(heads):
        where = shown(index.shards[0])
        if not (columns >= 0).any():  # An index.json written before nouns and verbs were read.
            raise DataError(f"{where}: its index has no labels of the clips; run `sfa index` on the shards")
        one = "one label each: set model.classes alone in the recipe"
        several = "a noun and a verb each: set model.class_heads: {noun: ..., verb: ...} in the recipe"
        raise DataError(f"the clips of {where} have {one if len(heads) > 1 else several}")
    for column, (head, classes) in zip(columns.T, heads.items(), strict=True):
        largest = int(np.argmax(column))
        if column[largest] >= classes:
            key = f"model.class_heads.{head}" if head else "model.classes"
            raise DataError(
                f"{head or 'label'} {column[largest]} of {index.name(largest)} does not fit {key} = {classes}: labels "
                f"are 0 to {classes - 1}. Correct {key} or pack the shards with the right class list"
            )


def _ordered(numbers: Ids, settings: ClipSettings, epoch: int, sample: int) -> Ids:
    """A clip's frame numbers in time, or in the sample's own random order where `data.frame_order` is `shuffled`."""
    if settings.data.frame_order == "time":
        return numbers
    return numbers[permutation(sample_rng(settings.seed, epoch, sample, "order"), len(numbers))]
