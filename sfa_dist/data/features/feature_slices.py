"""The source videos of a feature cache, as the trunk takes them: a few tubelet steps at a time.

The memory of a process does not grow with a video's length: frames are decoded in blocks of at most `BLOCK_BYTES` and
yielded in slices of some tubelet steps. Augmentation is drawn once for each video and view, from the random numbers of
the live epoch with the view's number, so view v has the pixels of live epoch v.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sfa_dist.data.batches.augment import SpatialViews, TrainView
from sfa_dist.data.batches.loader import start_worker
from sfa_dist.data.batches.transport import share_tensors
from sfa_dist.data.features.feature_grid import StepGrid, clip_starts, step_frames
from sfa_dist.data.sampling.clip_sampling import Indices, view_offsets
from sfa_dist.data.sampling.randomness import sample_rng
from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import NO_LABEL, SampleIndex
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode import Decoder
from sfa_dist.data.video.decode_card import beside_training
from sfa_dist.data.video.decode_limits import check_bytes, check_whole
from sfa_dist.data.video.video import Video
from sfa_dist.recipe.blocks import AugmentBlock, DataBlock

BLOCK_BYTES = 256 << 20  # Of decoded frames: holds a whole Kinetics video, which is then decoded in one call.
SLICE_FRAMES = 64  # Frames that a loader process sends at a time, unless the trunk's chunks are larger.


@dataclass(frozen=True)
class CachedSteps:
    """Which tubelet steps of a video are stored, and from which pixels.

    Training (`centre_frames` None): the whole video on `grid`, augmented as `augment` says. Evaluation: the steps of
    the centre clip of `centre_frames` frames, centre crop.
    """

    data: DataBlock
    augment: AugmentBlock
    grid: StepGrid
    crop: int
    seed: int
    centre_frames: int | None = None

    def starts(self, num_video_frames: int) -> Indices:
        """First frames of the stored steps, int64 (steps,)."""
        if self.centre_frames is None:
            return self.grid.starts(num_video_frames)
        [offset] = view_offsets(num_video_frames, self.centre_frames, self.grid.stride, 1)
        return clip_starts(num_video_frames, self.centre_frames, self.grid.tubelet, self.grid.stride, offset)

    def pixels(self, video: Video, numbers: Indices, view: int, sample: int) -> torch.Tensor:
        """The pixels of frames `numbers`, uint8 (3, T, crop, crop), the same whatever other frames come with them."""
        if self.centre_frames is not None:
            centre = SpatialViews(self.data.resize, self.crop, self.augment.resize)
            return centre.cut(video.frames_at(numbers, centre.shrink)).contiguous()
        rng = sample_rng(self.seed, view, sample, "augment")
        drawn = TrainView(self.data.resize, self.crop, self.augment, rng)
        return drawn.finish(video.frames_at(numbers, drawn.shrink))


@dataclass(frozen=True)
class FeaturePart:
    """One shard of the cache: neighbouring `samples` of one source shard, in one view."""

    name: str
    view: int
    samples: range


class Slice(NamedTuple):
    """The next tubelet steps of a sample: `clips` is uint8 (1, 3, steps * tubelet, S, S).

    Where the sample turns out to be bad, `clips` is None and `bad` the reason; its earlier slices do not count.
    """

    part: FeaturePart
    sample: int
    num_video_frames: int
    clips: torch.Tensor | None
    last: bool
    bad: str | None = None


def slice_steps(chunk_steps: int, tubelet: int) -> int:
    """Tubelet steps in a slice: a multiple of the trunk's chunk, so that slicing does not change the chunks."""
    return chunk_steps * max(1, SLICE_FRAMES // (chunk_steps * tubelet))


def block_steps(height: int, width: int, tubelet: int, slice_steps: int) -> int:
    """Tubelet steps decoded at a time: as many whole slices as fit into BLOCK_BYTES, but at least one."""
    return max(1, BLOCK_BYTES // (3 * height * width * tubelet * slice_steps)) * slice_steps


class VideoSlices(IterableDataset[Slice]):
    """All slices of some parts; worker w of W takes the parts w, w + W, ..., so one worker yields a part in order."""

    def __init__(
        self, index: SampleIndex, decoder: Decoder, steps: CachedSteps, parts: Sequence[FeaturePart], chunk_steps: int
    ) -> None:
        self.index, self.decoder, self.steps, self.parts = index, decoder, steps, parts
        self.slice_steps = slice_steps(chunk_steps, steps.grid.tubelet)

    def __iter__(self) -> Iterator[Slice]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for part in self.parts[first::step]:
            for sample in part.samples:
                yield from self._sample(part, sample)

    def _sample(self, part: FeaturePart, sample: int) -> Iterator[Slice]:
        try:
            if sample in self.index.errors or not self.index.has_label(sample):
                raise BadSample(self.index.errors.get(sample, NO_LABEL))
            check_bytes(int(self.index.size[sample]), self.steps.data.limits)  # Before it is read into memory.
            data = read_clip_bytes(self.index, sample)
            check_whole(data)
            video = self.decoder.open(data)
            starts = self.steps.starts(video.num_frames)
            blocks = self._blocks(video, starts, part.view, sample)
            done = 0
            for clips in blocks:
                done += clips.shape[2] // self.steps.grid.tubelet
                yield Slice(part, sample, video.num_frames, clips, last=done == len(starts))
        except BadSample as error:
            yield Slice(part, sample, 0, None, last=True, bad=error.reason)

    def _blocks(self, video: Video, starts: Indices, view: int, sample: int) -> Iterator[torch.Tensor]:
        """Slices, uint8 (1, 3, steps * tubelet, S, S), of a video that is decoded block by block."""
        tubelet, stride = self.steps.grid.tubelet, self.steps.grid.stride
        block = block_steps(video.height, video.width, tubelet, self.slice_steps)
        for begin in range(0, len(starts), block):
            numbers = step_frames(starts[begin : begin + block], tubelet, stride, video.num_frames)
            # Steps of different phases share frames: each frame is decoded and augmented once.
            unique, inverse = np.unique(numbers, return_inverse=True)
            with beside_training(self.decoder.device):
                pixels = self.steps.pixels(video, unique, view, sample).cpu()
            positions = torch.from_numpy(inverse.reshape(numbers.shape))
            for piece in positions.split(self.slice_steps):
                yield pixels[:, piece.flatten()].unsqueeze(0)


def slice_loader(slices: VideoSlices, workers: int, pin_memory: bool) -> DataLoader[Slice]:
    """A loader of the slices, decoded in `workers` processes (0: in this one)."""
    return DataLoader(
        slices,
        batch_size=None,
        num_workers=workers,
        collate_fn=share_tensors,
        worker_init_fn=start_worker,
        prefetch_factor=2 if workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )
