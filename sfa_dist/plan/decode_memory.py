"""The memory that decoding takes on a card (`data.decode_device: cuda`).

Decoding runs beside the step, one batch ahead, on a stream of its own, so its memory comes on top of the step's peak.
One video is decoded at a time, a few frames at their stored size. They are resized (and cropped, in training) before
the next few are decoded; the clip that they make up then gets its colour augmentation, or is cut into test views. The
code of these steps is traced on fake tensors. The decoder's own pictures are not torch tensors: that there are
`SURFACES` of them, in 4:2:0, is an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sfa_dist.data.batches.augment import SpatialViews, TrainView
from sfa_dist.data.batches.rand_augment import OPERATIONS
from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import INDEX_NAME, load_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.container import promised_video
from sfa_dist.data.video.gather import slice_frames
from sfa_dist.data.video.video import Shrink
from sfa_dist.errors import DataError
from sfa_dist.plan.memory_trace import MemoryTrace
from sfa_dist.recipe.blocks import AugmentBlock
from sfa_dist.recipe.schema import StageBlock

SURFACES = 20  # The 16 pictures that H.264 may refer to, and some on their way out.
SURFACE_BYTES = 1.5  # Bytes of a pixel in NV12.
ASSUMED_ASPECT = 16 / 9
TRACED = 64  # Frames; beyond them memory grows linearly.
# Its histogram needs pixel values, which fake tensors lack; it takes no more than the other operations.
UNTRACED = "equalize"


@dataclass(frozen=True)
class FrameSize:
    """Height and width of a stored frame in pixels, and where these numbers come from."""

    height: int
    width: int
    source: str


@dataclass(frozen=True)
class DecodePlan:
    """Bytes that decoding `frames` frames of one video takes on the card."""

    bytes: int
    frames: int
    size: FrameSize

    def __str__(self) -> str:
        size = f"{self.size.width}x{self.size.height}"
        return (
            f"{self.bytes / 2**20:.0f} MiB on the card for {self.frames} frames of {size} pixels ({self.size.source}) "
            f"and {SURFACES} pictures of the decoder's own (assumed)"
        )


def plan_decode(stage: StageBlock, frames: int | None = None) -> DecodePlan | None:
    """What decoding clips of `frames` frames (None: the stage's) takes on the card; None where it decodes none."""
    if stage.data.decode_device != "cuda" or (frames is None and stage.reads_features):
        return None
    size = frame_size_of(stage)
    most = max(1, (stage.data.limits.decoded_mib << 20) // (3 * stage.model.image_size**2))  # More is a bad sample.
    count = min(frames or stage.frames, most)
    augment = stage.augment.model_copy(update={"mixup": None}).model_dump_json()
    settings = (size.height, size.width, stage.data.resize, stage.model.image_size, augment)
    traced = _peak(min(count, TRACED), *settings)
    if count > TRACED:
        traced += (traced - _peak(TRACED // 2, *settings)) * (count - TRACED) // (TRACED // 2)
    own = int(SURFACES * SURFACE_BYTES * size.height * size.width)
    return DecodePlan(traced + own, count, size)


def frame_size_of(stage: StageBlock) -> FrameSize:
    """The size of the stage's stored frames."""
    return frame_size(tuple(stage.data.train), max(stage.data.resize, stage.model.image_size))


@lru_cache(maxsize=256)
def frame_size(patterns: tuple[str, ...], short_side: int) -> FrameSize:
    """The size of stored frames: that of the first training clip's header, else `short_side` at 16:9.

    The header is read where the shards are on this machine and indexed.
    """
    try:
        paths = expand_shards(patterns)
        if paths and all(isinstance(path, Path) and (path.parent / INDEX_NAME).is_file() for path in paths):
            promise = promised_video(read_clip_bytes(load_index(paths[:1]), 0))
            if promise.height and promise.width:
                return FrameSize(promise.height, promise.width, "as the first training clip's")
    except (DataError, BadSample):
        pass  # A plan does not judge the data; the size is reported as assumed.
    return FrameSize(short_side, round(short_side * ASSUMED_ASPECT), "assumed: data.resize at 16:9")


@lru_cache(maxsize=256)
def _peak(frames: int, height: int, width: int, resize: int, crop: int, augment: str) -> int:
    """Bytes of the frames and of the costliest augmentation that can be drawn for them."""
    own = AugmentBlock.model_validate_json(augment)
    high = max(own.scale_jitter or (1.0,))
    costly = own.model_copy(
        update={
            "scale_jitter": [high, high],
            **{name: float(getattr(own, name) > 0) for name in ("flip", "color", "gray")},
        }
    )
    names = list(OPERATIONS)
    draws = [0.0]
    if own.rand_augment is not None:
        draws = [(index + 0.5) / len(names) for index, name in enumerate(names) if name != UNTRACED]
    settings = (frames, height, width, resize, crop, costly)
    return max(_traced(*settings, draw) for draw in draws)


def _traced(frames: int, height: int, width: int, resize: int, crop: int, augment: AugmentBlock, draw: float) -> int:
    """The bytes of a training view or of a test view, whichever takes more."""
    train = TrainView(resize, crop, augment, _Always(draw))  # type: ignore[arg-type]
    test = SpatialViews(resize, crop, augment.resize)
    cases: list[tuple[Shrink, Shrink]] = [(train.shrink, train.finish), (test.shrink, test.cut)]
    return max(_gathered(frames, height, width, *case) for case in cases)


def _gathered(frames: int, height: int, width: int, shrink: Shrink, finish: Shrink) -> int:
    step = min(frames, slice_frames(height, width))
    with FakeTensorMode(allow_fallback_kernels=False), MemoryTrace() as trace:
        kept: torch.Tensor | None = None
        for start in range(0, frames, step):
            # The decoder returns single frames, which are then stacked: twice the bytes.
            stored = torch.empty((2 * step, height, width, 3), dtype=torch.uint8, device="cuda")
            small = shrink(stored[:step])
            if kept is None:
                kept = torch.empty((frames, *small.shape[1:]), dtype=torch.uint8, device="cuda")
            kept[start : start + step] = small[: frames - start]
            del stored, small
        assert kept is not None
        finish(kept).contiguous()
    return trace.peak


class _Always:
    """A generator that always draws the same number."""

    def __init__(self, number: float) -> None:
        self._number = number

    def random(self) -> float:
        """The given number."""
        return self._number
