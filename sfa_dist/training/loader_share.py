"""Advice when training waits for its loader: the console's line, and what would help."""

from __future__ import annotations

from collections.abc import Callable

from sfa_dist.data.video.clip_encoding import ClipEncoding
from sfa_dist.models.footprint import takes_tokens
from sfa_dist.recipe.blocks import shard_kind
from sfa_dist.recipe.schema import StageBlock

REPORTED_SHARE = 0.05  # Of the step; a smaller wait is not reported.
GOP = 12  # Frames from one key frame to the next: decodes fast, and files grow little.


def loader_line(
    share: float,
    stage: StageBlock,
    cores: int,
    clips: ClipEncoding | None = None,
    more_cores: bool = True,
    is_new: Callable[[str], bool] = lambda advice: True,
) -> str | None:
    """The advice for a stage whose slowest rank spends `share` of its step waiting for the loader.

    None for a small share, or where no advice `is_new`. The other arguments are those of `advice`.
    """
    if share <= REPORTED_SHARE:
        return None
    ways = [way for way in advice(stage, cores, clips, more_cores) if is_new(way)]
    what = "features" if stage.reads_features else "clips"
    return f"loader: {share:.0%} of the step is waiting for {what}; {', or '.join(ways)}" if ways else None


def advice(stage: StageBlock, cores: int, clips: ClipEncoding | None = None, more_cores: bool = True) -> list[str]:
    """What would help, the cheapest first, at most two.

    `cores` is the number of CPU cores of each rank, `more_cores` whether it could get more, `clips` how the clips are
    encoded (None: unknown).
    """
    data = stage.data
    ways = []
    on_card = data.decode_device == "cuda"
    if on_card and not stage.reads_features:
        ways.append(f"decode in loader processes (data.decode_device: cpu, data.workers: {cores})")
    elif data.workers < cores and cores > 1 and not on_card:  # On a single core a worker would compete with training.
        ways.append(f"raise data.workers (now {data.workers}; a rank has {cores} cores here)")
    if any(map(shard_kind, data.train)) and data.remote.cache_dir is None:
        ways.append("keep the shards on a local disk (data.remote.cache_dir)")
    if stage.reads_features:
        ways.append("put the feature cache on a faster disk (stage2.cache.dir)")
    else:
        if stage.freezes_trunk and stage.cache_block is None and not takes_tokens(stage):
            ways.append("decode and run the trunk once for all epochs (stage2.cache)")
        if clips is None or clips.is_cheaper_after(GOP, data.resize):
            ways.append(f"re-encode the clips (sfa pack --gop {GOP} --short-side {data.resize})")
    if more_cores and (data.workers >= cores or cores == 1) and not on_card:
        now = f"{cores} core{'s' * (cores > 1)}"
        ways.append(f"give each rank more than {now} (cpus-per-task under Slurm) and as many data.workers")
    return ways[:2]
