"""Where clips come from: shards here and elsewhere, limits of a video, and how a clip is cut from one."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PlainValidator, model_validator

from sfa_dist.boundary.secret import shown_source
from sfa_dist.recipe.blocks.base import Fixed, Fraction, Free, NonNegative, PathText, Positive, RecipeBlock, field_error

MAX_FPS = 1000


def _rate(value: object) -> float | str | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_FPS:
        return float(value)
    if value in (None, "stored"):
        return value
    raise ValueError(f"expected frames a second (at most {MAX_FPS}), null or stored, got {value!r}")


Rate = Annotated[float | Literal["stored"] | None, PlainValidator(_rate)]


def shard_kind(shard: str) -> str:
    """`s3`, `https`, `pipe`, ... of a URL or pipe; "" for a local path."""
    if shard.startswith("pipe:"):
        return "pipe"
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", shard)
    return scheme.group(1).lower() if scheme else ""


class LimitsBlock(RecipeBlock):
    """What one video may take at most; one that takes more is a bad sample. Sizes are read from the file's header."""

    mib: Fixed[Positive] = 1024
    """Size of the file, MiB."""

    frames: Fixed[Positive] = 200_000
    """Length of the video, frames."""

    megapixels: Fixed[Annotated[float, Field(gt=0.0)]] = 17.0
    """Size of one frame, millions of pixels."""

    decoded_mib: Free[Positive] = 1024
    """Size of a clip with all its views, MiB: resized, since frames are resized while they are decoded, or as stored
    where nothing resizes them."""

    seconds: Free[Annotated[float, Field(gt=0.0)]] = 120.0
    """Time to open a video, and time to decode one clip, seconds."""


class RemoteBlock(RecipeBlock):
    """Shards that are not on this machine's disks (docs/shards.md). `s3://` is always read."""

    allow: Free[list[Literal["http", "https", "pipe"]]] = []
    """Further kinds of sources to read. `pipe` allows `pipe:COMMAND`, which runs COMMAND in a shell."""

    anonymous: Free[bool] = False
    """Read public S3 buckets without credentials."""

    cache_dir: Free[PathText | None] = None
    """Local folder that keeps whole shards; pipes need one. null reads each sample from its source."""

    cache_gib: Free[Annotated[float, Field(gt=0.0)] | None] = None
    """Limit of `cache_dir`, GiB; null for no limit but the disk."""

    stage: Free[bool] = False
    """Keep the shards of local paths in `cache_dir` too: for paths on a file system that many nodes share."""

    retries: Free[Annotated[int, Field(ge=0, le=20)]] = 4
    """How often a read that failed for a passing reason is repeated, local files included: after 0.1, 0.4, 1.6,
    ... seconds, at most 30."""

    @model_validator(mode="after")
    def _caches_somewhere(self) -> RemoteBlock:
        if self.cache_dir is None and "pipe" in self.allow:
            raise field_error("allow", "a pipe's output is kept on disk: set data.remote.cache_dir to a local folder")
        if self.cache_dir is None and self.cache_gib is not None:
            raise field_error("cache_gib", "limits a cache that is off: set data.remote.cache_dir to a local folder")
        if self.cache_dir is None and self.stage:
            raise field_error("stage", "has no folder for the shards: set data.remote.cache_dir to a local folder")
        return self

    def refusal(self, shard: str) -> str | None:
        """Why a shard, or a pattern of some, is not read, and what to set; None where it is."""
        kind = shard_kind(shard)
        if kind in ("", "s3", *self.allow):
            return None
        if kind not in ("http", "https", "pipe"):
            return f"{kind}:// is not read, only local paths, s3://, https://, http:// and pipe:"
        cache = " and data.remote.cache_dir: FOLDER" if kind == "pipe" and not self.cache_dir else ""
        return f"{kind} is off: set data.remote.allow: [{kind}]{cache} if you trust it"


class DataBlock(RecipeBlock):
    """Where the shards are and how a clip is cut from a video.

    `train`, `val` and `test` list paths, globs, brace patterns (`train-{000000..000099}.tar`), URLs or pipes.
    """

    train: Free[list[str]] = []
    """Shards to train on."""

    val: Free[list[str]] = []
    """Shards to validate on after each epoch; an empty list for no validation."""

    test: Free[list[str]] = []
    """Shards of the final test; an empty list takes those of `val`."""

    stride: Fixed[NonNegative] = 2
    """Distance in video frames between two frames of a clip; 0 repeats one frame (a static clip)."""

    fps: Fixed[Rate] = None
    """Frames a second to which a video is resampled, by time, before clips are cut. null: its own mean rate, so that
    frames are equally far apart in time. `stored`: frames as they are stored, whatever their times."""

    resize: Fixed[Positive] = 256
    """Short side of a frame before it is cropped to `model.image_size`, pixels."""

    frame_order: Fixed[Literal["time", "shuffled"]] = "time"
    """`shuffled` puts the frames of each clip in random order: a control for scores that need no time."""

    mean: Fixed[Annotated[list[float], Field(min_length=3, max_length=3)]] = [0.5, 0.5, 0.5]
    """Mean of the pixels of each channel, in 0 to 1, subtracted before the model."""

    std: Fixed[Annotated[list[float], Field(min_length=3, max_length=3)]] = [0.5, 0.5, 0.5]
    """Standard deviation of the pixels of each channel, in 0 to 1, by which they are divided."""

    decoder: Free[Literal["auto", "torchcodec", "pyav"]] = "auto"
    """Library that decodes; `auto` is torchcodec where it loads, else PyAV."""

    decode_device: Fixed[Literal["cpu", "cuda"]] = "cpu"
    """Device that decodes and augments; `cuda` is the rank's GPU, with torchcodec and `workers: 0`."""

    damaged: Fixed[Literal["strict", "salvage"]] = "strict"
    """A video that is truncated or does not decode: `strict` makes it a bad sample, `salvage` takes the clip from the
    frames before the damage, where there are enough."""

    limits: LimitsBlock = LimitsBlock()
    """What one video may take at most."""

    workers: Free[NonNegative] = 4
    """Loader processes of each rank; 0 loads in the rank's own process."""

    shuffle_shards: Fixed[Positive] = 64
    """Shards whose samples are shuffled together: an epoch reads from about so many at a time."""

    max_bad_fraction: Free[Fraction] = 0.01
    """Largest fraction of clips that may be bad; a run over it ends with exit code 65."""

    remote: RemoteBlock = RemoteBlock()
    """How shards elsewhere are read and cached."""

    @model_validator(mode="after")
    def _shards_are_allowed(self) -> DataBlock:
        for split in ("train", "val", "test"):
            for pattern in getattr(self, split):
                if why := self.remote.refusal(pattern):
                    raise field_error(split, f"{shown_source(pattern)!r}: {why}")
        return self

    @model_validator(mode="after")
    def _card_can_decode(self) -> DataBlock:
        if self.decode_device == "cuda" and self.decoder == "pyav":
            raise field_error(
                "decode_device", "only torchcodec decodes on a GPU: set data.decoder to auto or torchcodec"
            )
        if self.decode_device == "cuda" and self.workers:
            why = "a loader process cannot share its rank's GPU: set data.workers to 0"
            raise field_error("decode_device", why)
        return self
