"""What the method costs beside end-to-end training, in operations, and why that may be more.

All operations count as equally fast and loading is left out, so this is the least that the method can cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from sfa_dist.boundary.counted import counted
from sfa_dist.plan.dataset import count_clips
from sfa_dist.plan.duration import trained_flops
from sfa_dist.plan.feature_cache_plan import extraction_flops
from sfa_dist.plan.flops import clip_flops, forward_macs
from sfa_dist.recipe.schema import Recipe, Stage2, StageBlock, sweep_members


@dataclass(frozen=True)
class CostShares:
    """Operations of each part of the method, over those of training stage 2's frames end to end."""

    stage1: float
    cache: float
    stage2: float

    @property
    def ratio(self) -> float:
        """Of the whole method."""
        return self.stage1 + self.cache + self.stage2


def cost_shares(recipe: Recipe, clips: int | None = None) -> CostShares | None:
    """The shares of stage 1, the feature cache and stage 2; None where the recipe lacks one of the two stages.

    The end-to-end training has as many epochs as stage 2. A sweep counts with all of its members.
    """
    if recipe.stage1 is None or recipe.stage2 is None:
        return None
    first, second = recipe.stage1, recipe.stage2
    macs = forward_macs(second.model, second.frames)
    baseline = 6.0 * (macs.trunk + macs.tail) * second.schedule.epochs
    members = [member.stage for member in sweep_members(recipe)] or [second]
    cache = 0.0
    if second.cache is not None:
        known = count_clips(second, clips)
        cache = extraction_flops(second, known) / known.train if known.train else 0.0
    stage1 = 0.0 if first.weights else clip_flops(first, recomputed=True) * first.schedule.epochs
    stage2 = sum(trained_flops(member) for member in members) * second.schedule.epochs
    return CostShares(stage1 / baseline, cache / baseline, stage2 / baseline)


def cost_ratio(recipe: Recipe, clips: int | None = None) -> float | None:
    """Operations of the method over those of training stage 2's frames end to end; None as in `cost_shares`."""
    shares = cost_shares(recipe, clips)
    return None if shares is None else shares.ratio


def why_above_one(recipe: Recipe, clips: int | None = None) -> str | None:
    """Why the method costs more than end-to-end training, the largest share first; None where it does not."""
    shares = cost_shares(recipe, clips)
    if shares is None or shares.ratio <= 1:
        return None
    assert recipe.stage1 is not None
    assert recipe.stage2 is not None
    second = recipe.stage2
    cure = "a larger model" if second.freeze_trunk else "stage2.freeze_trunk: true"
    parts = [
        (shares.stage1, f"stage 1 {shares.stage1:.2f} ({_stage1_words(recipe)})", "fewer epochs or frames in stage 1"),
        (shares.stage2, f"stage 2 {shares.stage2:.2f} ({_stage2_words(recipe, second)})", cure),
    ]
    if second.cache is not None:
        words = f"{counted(second.cache.views, 'view')} of whole videos for {_epochs(second)}"
        parts.append((shares.cache, f"the cache {shares.cache:.2f} ({words})", "fewer stage2.cache.views"))
    parts.sort(reverse=True)
    words = ", ".join(words for _, words, _ in parts)
    return f"{words}, as shares of end to end; lower with {parts[0][2]}, or with more frames in stage 2"


def _stage1_words(recipe: Recipe) -> str:
    first, second = recipe.stage1, recipe.stage2
    assert first is not None
    assert second is not None
    again = ", its activations computed twice" if first.activation.startswith("checkpoint") else ""
    return f"{_epochs(first)} x {first.frames} frames; end to end {second.schedule.epochs} x {second.frames}{again}"


def _stage2_words(recipe: Recipe, stage: Stage2) -> str:
    if not stage.freeze_trunk:
        return "its trunk is trained too"
    macs = forward_macs(stage.model, stage.frames, stage.adapter_block)
    tail = f"{macs.tail / (macs.trunk + macs.tail):.0%} of the model's operations are trained"
    members = len(sweep_members(recipe))
    return f"{counted(members, 'member')}, {tail}" if members > 1 else tail


def _epochs(stage: StageBlock) -> str:
    return counted(stage.schedule.epochs, "epoch")
