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
    """What one video may take at most; one that takes more is a bad sample. Sizes are judged from the file's header.

    `mib` is the size of the file and `frames` its length. `megapixels` is the size of one frame, and `decoded_mib`
    that of a whole clip (all its views) once it is resized, or as it is stored where nothing resizes it: frames are
    made smaller a few at a time, while they are decoded. `seconds` is for opening a video or decoding one clip.
    """

    mib: Fixed[Positive] = 1024
    frames: Fixed[Positive] = 200_000
    megapixels: Fixed[Annotated[float, Field(gt=0.0)]] = 17.0
    decoded_mib: Free[Positive] = 1024
    seconds: Free[Annotated[float, Field(gt=0.0)]] = 120.0


class RemoteBlock(RecipeBlock):
    """Shards that are not on this machine's disks (docs/data.md).

    `s3://` is always read; `allow` opens `http://`, `https://` and `pipe:COMMAND`, which runs COMMAND in a shell.
    `anonymous` reads public S3 buckets without credentials. `cache_dir` keeps whole shards in a local folder, which
    pipes need, at most `cache_gib` GiB of them; with `stage` those of paths too, which are on a file system that many
    nodes share. `retries` is how often a read that failed for a passing reason is tried again, local files included:
    after 0.1, 0.4, 1.6, ... seconds, at most 30.
    """

    allow: Free[list[Literal["http", "https", "pipe"]]] = []
    anonymous: Free[bool] = False
    cache_dir: Free[PathText | None] = None
    cache_gib: Free[Annotated[float, Field(gt=0.0)] | None] = None
    stage: Free[bool] = False
    retries: Free[Annotated[int, Field(ge=0, le=20)]] = 4

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

    `train`, `val` and `test` are paths, globs or brace patterns (`train-{000000..000099}.tar`), URLs or pipes.
    `stride` is the distance in video frames between two frames of a clip; 0 repeats one frame (a static clip).
    `fps` brings videos to so many frames a second, by time, before clips are cut. null leaves each at its own mean
    rate: frames come as stored where that is constant, and equally far apart in time where it is not. `stored` counts
    frames whatever their times.
    `resize` is the short side in pixels before cropping to `model.image_size`.
    `decode_device: cuda` decodes and augments on the rank's card, by torchcodec and without loader processes.
    `damaged: strict` takes a video that is cut or does not decode for a bad sample; `salvage` takes the clip from the
    frames before the damage, where there are enough.
    """

    train: Free[list[str]] = []
    val: Free[list[str]] = []
    test: Free[list[str]] = []
    stride: Fixed[NonNegative] = 2
    fps: Fixed[Rate] = None
    resize: Fixed[Positive] = 256
    frame_order: Fixed[Literal["time", "shuffled"]] = "time"
    mean: Fixed[Annotated[list[float], Field(min_length=3, max_length=3)]] = [0.5, 0.5, 0.5]
    std: Fixed[Annotated[list[float], Field(min_length=3, max_length=3)]] = [0.5, 0.5, 0.5]
    decoder: Free[Literal["auto", "torchcodec", "pyav"]] = "auto"
    decode_device: Fixed[Literal["cpu", "cuda"]] = "cpu"
    damaged: Fixed[Literal["strict", "salvage"]] = "strict"
    limits: LimitsBlock = LimitsBlock()
    workers: Free[NonNegative] = 4
    shuffle_shards: Fixed[Positive] = 64
    max_bad_fraction: Free[Fraction] = 0.01
    remote: RemoteBlock = RemoteBlock()

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
