"""How close the features of a trunk in eight bits are to those of the same trunk in bf16, on real clips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_dist.data.batches.planned import LoaderSettings
from sfa_dist.data.batches.stream import train_loader
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.errors import DataError
from sfa_dist.models.assembly import freeze
from sfa_dist.models.footprint import takes_tokens, trunk_eight_bits
from sfa_dist.recipe.blocks import BatchBlock
from sfa_dist.recipe.schema import Stage2
from sfa_dist.run.context import Run
from sfa_dist.stages.assemble import assemble_trunk
from sfa_dist.stages.trunk_setup import require_units

CLIPS = 4


def report_fidelity(run: Run, name: str, stage: Stage2, index: SampleIndex, weights: Path) -> None:
    """Measures the fidelity of a trunk in eight bits on rank 0, and reports it on the console and in log.jsonl.

    Does nothing for another trunk, and measures nothing where stage 1's `weights` do not exist yet. Collective. Raises
    RecipeError for fp8 on a device without it, DataError where no clip can be read.
    """
    kind = trunk_eight_bits(stage)
    if kind is None:
        return
    run.runtime.everywhere(lambda: require_units(stage, run.runtime.device))

    def measure() -> list[float]:
        if not weights.is_file():  # A dry run before stage 1.
            return []
        cosines = cosines_with_bf16(stage, index, weights, run.recipe.seed, run.runtime.device)
        return [float(cosines.mean()), float(cosines.min())]

    found = run.runtime.on_main(measure)
    if found:
        mean, least = found
        run.tracker.event("trunk_precision", stage=name, precision=kind, cosine=mean, least_cosine=least)
        values = f"{mean:.5f} on average and {least:.5f} at least, on {CLIPS} training clips"
        run.tracker.say(f"{name}: trunk in {kind}: cosine of its features with bf16's is {values}")


def cosines_with_bf16(stage: Stage2, index: SampleIndex, weights: Path, seed: int, device: torch.device) -> Tensor:
    """The cosine of each feature vector of CLIPS training clips, fp32 (vectors,) on the host.

    The bf16 trunk is converted to eight bits in place, so only one of them is in memory at a time.
    """
    pooled = not takes_tokens(stage)
    plain = assemble_trunk(stage.model_copy(update={"trunk_precision": "bf16"}), weights, pooled).to(device)
    clips = list(_good_clips(stage, index, seed))
    wanted = [plain(clip).cpu() for clip in clips]
    rounded = freeze(plain.trunk, stage, pooled)
    found = [rounded(clip).cpu() for clip in clips]
    return F.cosine_similarity(torch.cat(found).float(), torch.cat(wanted).float(), dim=-1).flatten()


def _good_clips(stage: Stage2, index: SampleIndex, seed: int) -> Iterator[Tensor]:
    """CLIPS training clips (1, 3, T, S, S), or all where there are fewer. Raises DataError where none can be read."""
    data, one = stage.data.model_copy(update={"workers": 0}), BatchBlock(size=1, micro=1)
    settings = LoaderSettings(data, one, stage.augment, stage.frames, stage.model.image_size, seed)
    good = 0
    for batch in train_loader(index, settings, epoch=0):
        if batch.weights.sum() > 0:
            assert batch.clips is not None
            yield batch.clips
            good += 1
        if good == CLIPS:
            return
    if not good:
        raise DataError("stage2.data.train: no clip can be read, so the trunk in eight bits cannot be compared")
