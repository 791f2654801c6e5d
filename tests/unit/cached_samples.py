"""A feature cache of small videos, extracted in this process, for the tests of the cache's parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfa_dist.data.features.feature_grid import StepGrid
from sfa_dist.data.features.feature_shards import PartWriter, begin_view, close_view, plan_parts
from sfa_dist.data.features.feature_slices import CachedSteps, Slice, VideoSlices
from sfa_dist.data.features.feature_stream import CachedSplit
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.video.decode import choose_decoder
from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.vivit import Trunk, build
from sfa_dist.recipe.blocks import AugmentBlock, DataBlock, ModelBlock

WIDTH, CROP, FRAMES, STRIDE, CHUNK = 24, 16, 4, 2, 4
MODEL = ModelBlock(
    size="tiny", width=WIDTH, depth=1, heads=2, mlp=32, patch=8, image_size=CROP, temporal_depth=1, classes=3
)
DATA = DataBlock(resize=20, stride=STRIDE, workers=0, decoder="pyav", shuffle_shards=2)
STRONG = AugmentBlock()


def make_trunk(dtype: torch.dtype = torch.float32) -> FrozenTrunk:
    """The same small trunk each time."""
    torch.manual_seed(0)
    trunk = build(Trunk(MODEL))
    assert isinstance(trunk, Trunk)
    return FrozenTrunk(trunk, CHUNK, dtype=dtype)


def steps_of(phases: int, seed: int = 0, centre_frames: int | None = None, data: DataBlock = DATA) -> CachedSteps:
    return CachedSteps(data, STRONG, StepGrid(2, STRIDE, phases), CROP, seed, centre_frames)


def slices_of(index: SampleIndex, steps: CachedSteps, view: int = 0) -> list[Slice]:
    parts = plan_parts(index, view)
    return list(VideoSlices(index, choose_decoder("pyav"), steps, parts, CHUNK // 2))


def extract(folder: Path, index: SampleIndex, steps: CachedSteps, view: int, trunk: FrozenTrunk) -> None:
    """One view, part by part."""
    begin_view(folder, {})
    parts = plan_parts(index, view)
    writers = {part.name: PartWriter(folder, part, index, {}) for part in parts}
    pieces: list[Tensor] = []
    for piece in slices_of(index, steps, view):
        writer = writers[piece.part.name]
        if piece.clips is None:
            writer.add_bad(piece.sample, piece.bad or "")
            pieces.clear()
            continue
        pieces.append(trunk(piece.clips)[0])
        if piece.last:
            writer.add(piece.sample, torch.cat(pieces), piece.num_video_frames)
            pieces.clear()
    for writer in writers.values():
        assert writer.is_full
        writer.finish(0.0)
    manifest: dict[str, Any] = {"version": 1, "classes": None, "key": {}, "trunk_sha256": trunk.sha256()}
    close_view(folder, parts, manifest, 1)


def make_split(
    root: Path, index: SampleIndex, phases: int, views: int = 1, dtype: torch.dtype = torch.float32
) -> CachedSplit:
    """A training split with `views` views."""
    trunk = make_trunk(dtype)
    folders = tuple(root / f"view-{view:02d}" for view in range(views))
    for view, folder in enumerate(folders):
        extract(folder, index, steps_of(phases), view, trunk)
    return CachedSplit(folders, WIDTH, dtype)
