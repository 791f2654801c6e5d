"""What a feature cache costs: operations to fill it, and disk.

A view holds the steps of a whole video at `phases` temporal phases, so it is as much larger than a clip as the video is
longer (`ClipCounts.video_frames`; where that is not known, the clip's own span, which is the least that it can be).
"""

from __future__ import annotations

from sfa_dist.models.footprint import trunk_dtype
from sfa_dist.models.vivit import dims_of
from sfa_dist.plan.dataset import ClipCounts
from sfa_dist.plan.flops import forward_macs
from sfa_dist.recipe.schema import StageBlock


def mean_live_share(stage: StageBlock) -> float:
    """Share of the schedule's clips that run through the trunk; 1 without a cache."""
    cache, epochs = stage.cache_block, stage.schedule.epochs
    return 1.0 if cache is None else sum(cache.live_share(epoch) for epoch in range(epochs)) / epochs


def clips_in_a_view(stage: StageBlock, clips: ClipCounts) -> float:
    """The steps that a view stores of a video, as a multiple of a clip's."""
    span = max(1, stage.frames * stage.data.stride)
    phases = stage.cache_block.phases if stage.cache_block else 1
    return phases * max(1.0, (clips.video_frames or span) / span)


def extraction_flops(stage: StageBlock, clips: ClipCounts) -> float:
    """Operations to fill the cache: all views of the training clips, and the centre clip of each validation clip."""
    if stage.cache_block is None or clips.train is None:
        return 0.0
    trunk = 2.0 * forward_macs(stage.model, stage.frames).trunk
    return trunk * (stage.cache_block.views * clips.train * clips_in_a_view(stage, clips) + (clips.val or 0))


def cache_bytes(stage: StageBlock, clips: ClipCounts) -> float | None:
    """Disk bytes of the stage's cache, or of one with one view where it has none; None without a number of clips."""
    if clips.train is None:
        return None
    clip = stage.frames // stage.model.tubelet * dims_of(stage.model).width * trunk_dtype(stage).itemsize
    views = stage.cache_block.views if stage.cache_block else 1
    return float(clip * (views * clips.train * clips_in_a_view(stage, clips) + (clips.val or 0)))
