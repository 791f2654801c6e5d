"""The settings of a pack. `sfa pack` has an option for each, with the same default."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sfa_dist.recipe.blocks import LimitsBlock, Rate

NO_PREFIX = "shard"  # the pack's name where neither a prefix nor a split is given


@dataclass(frozen=True)
class Reading:
    """How a run reads clips: `data.decoder`, `data.fps` and `data.limits` of its recipe."""

    decoder: Literal["auto", "torchcodec", "pyav"] = "auto"
    rate: Rate = None
    limits: LimitsBlock = field(default_factory=LimitsBlock)


@dataclass(frozen=True)
class Encoding:
    """H.264 in an mp4 file, upright and without sound."""

    short_side: int | None = None
    """Pixels, an upper bound; None keeps the size."""
    gop: int = 12
    """Frames from one key frame to the next."""
    crf: int = 23
    """Quality of x264, 0 to 51; lower is better, and 18 is hard to tell from the source."""


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What `pack` does with the clips of a source."""

    format: str = "auto"
    """The source's format, one of `annotations.FORMATS`; "auto" detects it."""
    videos: Path | None = None
    """The folder that holds the videos, which official lists need; None: the folder of the table."""
    classes: Path | None = None
    """A class list (`class_files.read_class_list`); None: the data set's own, else the sorted labels."""
    split_column: str | None = None
    """The column that names a row's split; None: `split`, where there is one."""
    split: str | None = None
    """The split to pack; None: all rows."""
    prefix: str | None = None
    """The first part of the shards' names; None: `split`, else NO_PREFIX."""
    shard_size: int = 1000
    """Clips in a shard, at most."""
    shard_bytes: int | None = None
    """Bytes of clips in a shard, at most; one clip may exceed it. None: no limit."""
    min_frames: int = 1
    """Clips with fewer frames are left out."""
    max_bad_fraction: float = 0.05
    """More bad clips than this fraction of all listed end the pack."""
    seed: int = 0
    """Seed of the order of clips in the shards."""
    workers: int = 0
    """Processes that check the files; 0: only this one."""
    readings: tuple[Reading, ...] = (Reading(),)
    """The ways in which runs will read the clips; a clip that one of them refuses is bad."""
    encoding: Encoding | None = None
    """How all videos are re-encoded; None: only clips cut out of longer videos are, with the defaults of Encoding."""
    decode_all: bool = False
    """Decode every frame, and compare with what a run would see, instead of the first, middle and last only."""
    overwrite: bool = False
    """Replace shards of the same prefix."""
    check: bool = False
    """Make the report and write nothing."""

    @property
    def name(self) -> str:
        """The pack's name in the manifest, and the first part of its shards' names."""
        return self.prefix or self.split or NO_PREFIX

    @property
    def column_of_splits(self) -> str:
        """The column that names a row's split."""
        return self.split_column or "split"


DEFAULTS = PackSettings()
