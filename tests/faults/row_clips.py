"""Clips for the rows of the fault catalogue, through both decoders where both load."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_samples import write_shard

from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.planned import LoaderSettings
from sfa_dist.data.batches.stream import eval_loader
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.video.decode import Decoder, choose_decoder
from sfa_dist.errors import RecipeError
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock, DataBlock, LimitsBlock

DATA = DataBlock(resize=32, stride=1, workers=0, decoder="pyav")


def usable() -> list[str]:
    try:
        return ["pyav", choose_decoder("torchcodec").name]
    except RecipeError:  # without FFmpeg's libraries
        return ["pyav"]


NAMES = usable()
each_decoder = pytest.mark.parametrize("name", NAMES)


def decoder(name: str, **limits: float) -> Decoder:
    return choose_decoder(name, LimitsBlock(**limits))  # type: ignore[arg-type]


def batch_of(folder: Path, clips: list[bytes], chosen: Decoder, frames: int = 4, **data: object) -> Batch:
    """One evaluation batch of all the clips, packed into a shard."""
    (folder / "index.json").unlink(missing_ok=True)
    shard = write_shard(folder / "x.tar", [(f"clip{n}", clip, 0) for n, clip in enumerate(clips)])
    block = DATA.model_copy(update=data)
    batch = BatchBlock(micro=1, eval_micro=len(clips))
    settings = LoaderSettings(block, batch, AugmentBlock(), frames=frames, crop=32, decoder=chosen)
    (only,) = eval_loader(load_index([shard]), settings)
    return only
