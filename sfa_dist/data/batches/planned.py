"""What the loaders of clips and of cached features share: settings, a rank's share of the sample plan, and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.loader import NO_SAMPLE, Batches, Loader, make_loader
from sfa_dist.data.sampling.sample_plan import Ids, SamplePlan
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode import Decoder, decoder_of
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock, DataBlock, MixupBlock


@dataclass(frozen=True)
class ClipSettings:
    """How clips are cut: `frames` frames of `crop` x `crop` pixels; the run's `seed` determines the augmentation."""

    data: DataBlock
    frames: int
    crop: int
    seed: int = 0

    @property
    def span(self) -> int:
        """Frames of the video from a clip's first frame to its last, both included."""
        return (self.frames - 1) * self.data.stride + 1


@dataclass(frozen=True)
class LoaderSettings:
    """The settings that all loaders of a stage share, whatever the split and the epoch.

    Evaluation uses `seed` only for `data.frame_order: shuffled`.
    """

    data: DataBlock
    batch: BatchBlock
    augment: AugmentBlock
    frames: int
    crop: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    decoder: Decoder | None = None
    """None: the decoder that `data.decoder` names."""
    pin_memory: bool = False
    prefetch_factor: int = 2
    """Batches that each worker prepares in advance."""

    @property
    def clip(self) -> ClipSettings:
        """How clips are cut."""
        return ClipSettings(self.data, self.frames, self.crop, self.seed)

    def open_decoder(self) -> Decoder:
        """The decoder of the clips. Raises RecipeError where `data.decoder` is not installed."""
        return self.decoder or decoder_of(self.data)

    def train_share(self, index: SampleIndex, mixup: MixupBlock | None = None) -> RankShare:
        """This rank's share of training; the order of the samples is the same for any number of ranks."""
        plan = train_plan(index, self.data, self.batch, self.seed, mixup)
        return RankShare(plan, self.rank, self.world_size, self.batch.micro)

    def eval_share(self, index: SampleIndex) -> RankShare:
        """This rank's share of an evaluation."""
        micro = self.batch.eval_micro or self.batch.micro
        return RankShare(eval_plan(index, micro, self.world_size), self.rank, self.world_size, micro)


@dataclass(frozen=True)
class RankShare:
    """One rank's micro-batches of `micro` samples in each epoch of `plan`."""

    plan: SamplePlan
    rank: int
    world_size: int
    micro: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of a global batch."""
        return self.plan.accumulation(self.world_size, self.micro)

    def __len__(self) -> int:
        return self.plan.steps_per_epoch * self.accumulation

    def positions(self, item: int) -> Ids:
        """The positions in the epoch of micro-batch `item`: int64 (micro,), -1 for slots beyond the global batch."""
        return self.plan.item_positions(item, self.rank, self.world_size, self.micro)


class PlannedBatches(Batches):
    """The micro-batches of `share` in an epoch: item k is part k % accumulation of step k // accumulation."""

    def __init__(self, index: SampleIndex, share: RankShare, workers: int = 0) -> None:
        super().__init__(index, workers)
        self.share = share

    def __len__(self) -> int:
        return len(self.share)

    def read_batch(self, ids: Ids, read: Callable[[int, int], None]) -> Batch:
        """A batch of the samples `ids`, int64 (B,), -1 for padding.

        `read(row, sample)` reads one sample; where it raises BadSample, the row has weight 0 and the batch names it.
        """
        labels, weights = np.zeros((len(ids), *self.index.label.shape[1:]), np.int64), np.zeros(len(ids), np.float32)
        bad: list[tuple[str, str]] = []
        position = self.own_position()
        for row, sample in enumerate(ids.tolist()):
            if sample < 0:
                continue
            position[1] = sample
            try:
                read(row, sample)
            except BadSample as error:
                bad.append((self.index.name(sample), error.reason))
                continue
            labels[row], weights[row] = self.index.label[sample], 1.0
        position[1] = NO_SAMPLE
        return Batch(torch.from_numpy(labels), torch.from_numpy(weights), torch.from_numpy(ids.copy()), bad=bad)


def planned_loader(batches: PlannedBatches, settings: LoaderSettings, start_step: int = 0) -> Loader:
    """A loader from optimizer step `start_step` to the end of the epoch, with `data.workers` processes."""
    items = range(start_step * batches.share.accumulation, len(batches))
    return make_loader(batches, items, settings.data.workers, settings.pin_memory, settings.prefetch_factor)


def train_plan(
    index: SampleIndex, data: DataBlock, batch: BatchBlock, seed: int, mixup: MixupBlock | None = None
) -> SamplePlan:
    """The order of training, the same on all ranks; cheap to create, since positions are computed on demand."""
    paired = mixup is not None and mixup.over == "global"
    return SamplePlan(index.shard_sizes, seed, batch.size, data.shuffle_shards, paired=paired)


def eval_plan(index: SampleIndex, micro: int, world_size: int) -> SamplePlan:
    """Each sample once, in order; padding gives all ranks the same number of batches, so collectives stay in step."""
    return SamplePlan(index.shard_sizes, 0, micro * world_size, 1, shuffle=False)
