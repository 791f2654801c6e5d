"""Shards for the rows of the fault catalogue."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from data_samples import encode
from odd_samples import blocks

from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.planned import LoaderSettings
from sfa_dist.data.batches.stream import eval_loader
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock, DataBlock

DATA = DataBlock(resize=32, stride=1, workers=0, decoder="pyav")
CLIPS = [encode([blocks(10 * n + k, 32, 32) for k in range(4)]) for n in range(5)]


def evaluate(index: SampleIndex, data: DataBlock = DATA) -> Batch:
    """All samples of the index in one batch."""
    batch = BatchBlock(micro=1, eval_micro=len(index))
    (only,) = eval_loader(index, LoaderSettings(data, batch, AugmentBlock(), frames=4, crop=32))
    return only


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
