"""How many clips a stage trains on: by its shards' index, by the command line, or by the size of a public set.

The counts of the public sets are those of copies in use (mmaction2's and scenic's lists): videos disappear over time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sfa_dist.data.shards.shard_index import INDEX_NAME, load_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.errors import DataError
from sfa_dist.recipe.schema import StageBlock


@dataclass(frozen=True)
class ClipCounts:
    """Clips for training and for one evaluation, None where they are not known.

    `source` says where the numbers come from. `video_frames` is the length of a usual video, where it is known.
    """

    train: int | None
    val: int | None
    source: str
    video_frames: int | None = None


# Found by a word in the shards' path, else by the number of classes.
PUBLIC = {
    "kinetics400": (400, ClipCounts(240_436, 19_796, "Kinetics-400 as it is in use", 300)),
    "kinetics600": (600, ClipCounts(383_393, 27_910, "Kinetics-600 as it is in use", 300)),
    "moments": (339, ClipCounts(791_297, 33_900, "Moments in Time v1", 90)),
    "something_else": (None, ClipCounts(54_919, 57_876, "Something-Else, compositional split")),
    "something": (174, ClipCounts(168_913, 24_777, "Something-Something v2")),
    "epic": (397, ClipCounts(67_217, 9_668, "EPIC-Kitchens-100")),
}


def count_clips(stage: StageBlock, given: int | None) -> ClipCounts:
    """The clips of a stage: of its indexed shards, else `given` (`--clips`), else of the public set that it looks like.

    Where the path names a public set, its usual length of a video is taken, whatever the number of clips.
    """
    public = _named(stage.data.train)
    length = public.video_frames if public else None
    train = _indexed(stage.data.train)
    if train is not None:
        return ClipCounts(train, _indexed(stage.data.val) or 0, "the shards' index", length)
    if given is not None:
        return ClipCounts(given, 0, "--clips", length)
    if public is not None:
        return public
    for _, (classes, clips) in PUBLIC.items():
        if classes == stage.model.classes:
            return replace(clips, source=f"{clips.source}, by its number of classes")
    return ClipCounts(None, None, "unknown: give --clips N")


def _named(patterns: Sequence[str]) -> ClipCounts | None:
    """The public set that the shards' paths name; None where they name none."""
    where = " ".join(patterns).lower().replace("-", "_").replace("kinetics_", "kinetics")
    return next((clips for word, (_, clips) in PUBLIC.items() if word in where), None)


def _indexed(patterns: Sequence[str]) -> int | None:
    """Clips of indexed shards on this machine, else None. Only an index is read, and none is built."""
    try:
        paths = expand_shards(patterns)
        if not paths or not all(isinstance(path, Path) and (path.parent / INDEX_NAME).is_file() for path in paths):
            return None
        return len(load_index(paths))
    except DataError:
        return None
