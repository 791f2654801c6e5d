"""The work of `sfa show`: draws the contact sheets of a recipe's stage."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from sfa_dist.data.batches.augment import train_transform
from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.planned import ClipSettings, LoaderSettings
from sfa_dist.data.batches.rand_augment import OPERATIONS
from sfa_dist.data.batches.stream import EvalViews, TrainViews, train_loader
from sfa_dist.data.packing.pack import pack
from sfa_dist.data.sampling.clip_sampling import frame_indices, random_offset, spread_frames, view_offsets
from sfa_dist.data.sampling.randomness import sample_rng
from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import SampleIndex, load_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.data.video.decode import decoder_of
from sfa_dist.data.video.video import FrameNumbers, Shrink, Video
from sfa_dist.errors import RecipeError, UsageError
from sfa_dist.parallel.environment import environment
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock
from sfa_dist.recipe.schema import STAGE_NAMES, StageBlock, load_recipe
from sfa_dist.tools.contact_sheet import Column, draw_sheet
from sfa_dist.tools.demo_data import write_video

NOTHING = AugmentBlock(scale_jitter=None, flip=0.0, color=0.0, gray=0.0)
BATCHES_MIXED = 2
GENERATED_CLIPS, GENERATED_FRAMES, GENERATED_SIZE = 4, 300, (256, 340)  # Longer than the clips of the recipes.


def show_sheets(arguments: argparse.Namespace) -> int:
    """Writes the sheets and prints their paths. Raises UsageError, RecipeError and DataError."""
    if arguments.draws < 1 or arguments.rows < 1:
        raise UsageError("--draws and --rows must be greater than 0")
    recipe = load_recipe(arguments.recipe, arguments.set, environment()).recipe
    stages = {name: stage for name in STAGE_NAMES if (stage := getattr(recipe, name)) is not None}
    name = arguments.stage or list(stages)[-1]
    if name not in stages:
        raise RecipeError(f"--stage {name}: the recipe has no such stage (it has {', '.join(stages)})")
    stage = stages[name]
    with tempfile.TemporaryDirectory(prefix="sfa-show-") as folder:
        patterns = [generated_shard(Path(folder))] if arguments.generated else stage.data.train
        if not patterns:
            raise RecipeError(f"{name}.data.train names no shards: name some, or give --generated")
        remote = stage.data.remote
        index = load_index(expand_shards(patterns, remote), remote)
        show = Show(stage, recipe.seed, index, arguments.draws, arguments.rows)
        for sheet, title, columns in show.sheets():
            print(draw_sheet(arguments.out / f"{sheet}.png", f"{recipe.name}, {title}", columns, arguments.rows))
    return 0


@dataclass(frozen=True)
class Show:
    """The sheets of a stage over the first clips of an index."""

    stage: StageBlock
    seed: int
    index: SampleIndex
    draws: int
    rows: int

    def sheets(self) -> Iterator[tuple[str, str, list[Column]]]:
        """(file name, title, columns) of each sheet."""
        augment = self.stage.augment
        yield "sampling", "the frames that each epoch samples", self._sampled(self._video(0))
        video = self._video(0)
        short = _Short(video, min(video.num_frames, max(2, self.stage.frames * 2 // 5)))
        yield "looping", f"a video of {short.num_frames} frames, looped", self._sampled(short)
        if augment.scale_jitter is not None:
            only = NOTHING.model_copy(update={"scale_jitter": augment.scale_jitter})
            yield "scale_jitter", f"scale jitter {augment.scale_jitter}, height and width apart", self._alone(only)
        if augment.flip:
            plain, flipped = (self._clip(NOTHING.model_copy(update={"flip": chance}), 0) for chance in (0.0, 1.0))
            columns = [Column("as it is", plain), Column("flipped", flipped)]
            yield "flip", f"flip (probability {augment.flip})", columns
        for name, chance in (("color", augment.color), ("gray", augment.gray)):
            if chance:
                yield name, f"{name} (probability {chance})", self._alone(NOTHING.model_copy(update={name: 1.0}))
        if augment.rand_augment is not None:
            rand = augment.rand_augment
            title = f"RandAugment, {rand.layers} operations of magnitude {rand.magnitude}"
            yield "rand_augment", title, self._alone(NOTHING.model_copy(update={"rand_augment": rand}))
            title = f"RandAugment's operations, magnitude {rand.magnitude}, on a clip of these frames alone"
            yield "operations", title, self._operations(rand.magnitude)
        if augment.mixup is not None:
            yield "mixup", f"mixup, alpha {augment.mixup.alpha}: two clips and their blends", self._mixed()
        yield "chain", "the whole chain, as training sees it", self._chain()
        yield "test_views", "three spatial views, as the test sees them", self._views()

    def _video(self, sample: int) -> Video:
        decoder = decoder_of(self.stage.data)
        return decoder.open(read_clip_bytes(self.index, sample))

    def _settings(self) -> ClipSettings:
        return ClipSettings(self.stage.data, self.stage.frames, self.stage.model.image_size, self.seed)

    def _sampled(self, video: Video) -> list[Column]:
        """The whole frames that each epoch samples, with their numbers in the video."""
        frames, stride = self.stage.frames, self.stage.data.stride
        columns = []
        for epoch in range(self.draws):
            offset = random_offset(sample_rng(self.seed, epoch, 0, "clip"), video.num_frames, frames, stride)
            numbers = frame_indices(video.num_frames, frames, stride, offset)
            notes = [f"{number} of {video.num_frames}" for number in numbers]
            columns.append(Column(f"epoch {epoch}", video.frames_at(numbers), notes))
        return columns

    @cached_property
    def centre(self) -> torch.Tensor:
        """The middle of the first video, uint8 (T, H, W, 3)."""
        video, frames, stride = self._video(0), self.stage.frames, self.stage.data.stride
        [offset] = view_offsets(video.num_frames, frames, stride, 1)
        return video.frames_at(frame_indices(video.num_frames, frames, stride, offset))

    def _alone(self, augment: AugmentBlock) -> list[Column]:
        """The centre clip under one augmentation, with the random numbers of each epoch."""
        return [Column(f"draw {epoch}", self._clip(augment, epoch)) for epoch in range(self.draws)]

    def _clip(self, augment: AugmentBlock, epoch: int) -> torch.Tensor:
        rng, crop = sample_rng(self.seed, epoch, 0, "augment"), self.stage.model.image_size
        return _shown(train_transform(self.centre, self.stage.data.resize, crop, augment, rng))

    def _operations(self, magnitude: int) -> list[Column]:
        """Each operation of RandAugment, on a clip of only the frames that the sheet shows."""
        whole = self._clip(NOTHING, 0)
        clip = whole[spread_frames(len(whole), self.rows)].permute(3, 0, 1, 2).contiguous()
        drawn = {name: sample_rng(self.seed, 0, 0, "augment") for name in OPERATIONS}
        return [Column(name, _shown(OPERATIONS[name](clip, magnitude, rng))) for name, rng in drawn.items()]

    def _mixed(self) -> list[Column]:
        """Batches of two clips from the real loader, without mixup and with it."""
        plain, mixed = (self._batches(augment) for augment in (_without_mixup(self.stage), self.stage.augment))
        columns = []
        for before, after in zip(plain, mixed, strict=True):
            assert before.clips is not None
            assert after.clips is not None
            assert after.mix is not None
            columns += [Column("clip" if row == 0 else "partner", _shown(before.clips[row])) for row in (0, 1)]
            for row in (0, 1):
                columns.append(Column(f"{float(after.mix.shares[row]):.2f} of itself", _shown(after.clips[row])))
        return columns

    def _batches(self, augment: AugmentBlock) -> list[Batch]:
        """The first BATCHES_MIXED global batches, of two clips each."""
        data, two = self.stage.data.model_copy(update={"workers": 0}), BatchBlock(size=2, micro=2)
        settings = LoaderSettings(data, two, augment, self.stage.frames, self.stage.model.image_size, self.seed)
        return [
            batch for batch, _ in zip(train_loader(self.index, settings, epoch=0), range(BATCHES_MIXED), strict=False)
        ]

    def _chain(self) -> list[Column]:
        """The first clip as training sees it in each epoch, but not blended with another one (see mixup.png)."""
        views, video = TrainViews(self._settings(), self.stage.augment), self._video(0)
        return [Column(f"epoch {epoch}", _shown(views(video, epoch, 0)[0])) for epoch in range(self.draws)]

    def _views(self) -> list[Column]:
        clips = EvalViews(self._settings(), 1, 3, self.stage.augment.resize)(self._video(0), 0, 0)
        return [Column(f"view {number}", _shown(clip)) for number, clip in enumerate(clips)]


@dataclass(frozen=True)
class _Short:
    """The first frames of a video, as a video."""

    whole: Video
    num_frames: int

    @property
    def fps(self) -> float:
        return self.whole.fps

    @property
    def height(self) -> int:
        return self.whole.height

    @property
    def width(self) -> int:
        return self.whole.width

    def frames_at(self, indices: FrameNumbers, shrink: Shrink | None = None) -> torch.Tensor:
        return self.whole.frames_at(indices, shrink)


def _without_mixup(stage: StageBlock) -> AugmentBlock:
    return stage.augment.model_copy(update={"mixup": None})


def _shown(clip: torch.Tensor) -> torch.Tensor:
    """uint8 (3, T, S, S) -> (T, S, S, 3)."""
    return clip.permute(1, 2, 3, 0)


def generated_shard(folder: Path) -> str:
    """Packs a few generated videos and returns the pattern of their shard.

    They make augmentation visible: coloured stripes, a grey ramp, a letter F, which shows mirroring, and a disc that
    moves to the right.
    """
    for number in range(GENERATED_CLIPS):
        (folder / "videos" / f"class{number}").mkdir(parents=True)
        write_video(folder / "videos" / f"class{number}" / "clip.mp4", drawn_clip(number), fps=25)
    pack(folder / "videos", folder / "shards")
    return str(folder / "shards" / "*.tar")


def drawn_clip(number: int, frames: int = GENERATED_FRAMES) -> np.ndarray:
    """A generated clip, uint8 (frames, 256, 340, 3); `number` shifts its colours."""
    height, width = GENERATED_SIZE
    rows, columns = np.mgrid[:height, :width]
    hues = np.array([[200, 60, 60], [60, 180, 70], [70, 80, 210], [210, 190, 60]], np.uint8)
    scene = np.roll(hues, number, axis=0)[columns * 4 // width]
    scene[rows > height * 3 // 4] = (columns[rows > height * 3 // 4] * 255 // width)[:, None]
    for top, left, tall, wide in ((30, 30, 100, 18), (30, 30, 18, 70), (70, 30, 18, 50)):  # The letter F.
        scene[top : top + tall, left : left + wide] = 255
    clip = np.repeat(scene[None], frames, axis=0)
    for frame in range(frames):
        middle = 20 + (width - 40) * frame / max(1, frames - 1)
        clip[frame][(rows - 150) ** 2 + (columns - middle) ** 2 < 18**2] = (20, 20, 20)
    return clip
