"""Notices about a stage's training clips before it starts: classes that do not fit, videos that are too short.

Neither is an error, and without a notice they would show only in the result, if at all. The lengths are those that
`sfa pack` wrote beside each clip. Shards from elsewhere lack them; their short videos are counted in the first epoch
(`Batch.looped`). No clip is decoded here: one that crashes the decoder would take the rank down, without a loader
process to contain it and name it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfa_dist.data.shards.index_columns import Int64
from sfa_dist.data.shards.index_file import RawShard, read_raw
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.shards.shard_names import shard_name
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import DataBlock, ModelBlock, Rate

MOST_LOOKED_AT = 2000  # Clips whose lengths are read: takes milliseconds on a local disk, seconds on a slow one.
NAMED = 5  # Classes that a notice names.
_MOST_JSON_BYTES = 1 << 16


def class_notices(index: SampleIndex, model: ModelBlock) -> list[str]:
    """One notice for each head whose classes the training clips do not have, with what to set.

    The reverse, labels that the model does not have, is an error (`stream.check_labels`).
    """
    heads = {"": model.classes} if model.class_heads is None else model.class_heads
    columns = index.label.reshape(len(index), -1)
    notices = []
    for (head, classes), labels in zip(heads.items(), columns.T, strict=True):
        known = index.classes.get(head) if isinstance(index.classes, dict) else index.classes
        notices += _of_head(f"model.class_heads.{head}" if head else "model.classes", classes, labels, known)
    return notices


def _of_head(key: str, classes: int, labels: Int64, names: Sequence[str] | None) -> list[str]:
    used = set(np.unique(labels[labels >= 0]).tolist())
    if names is not None and len(names) != classes:
        have = f"the shards have {len(names)} classes ({_listed(names)})"
        return [f"{key} is {classes}, and {have}: set {key}={len(names)}"]
    if names is None and used and max(used) + 1 < classes:
        most = max(used)
        return [f"{key} is {classes}, and the labels of the training clips end at {most}: set {key}={most + 1}"]
    absent = [number for number in range(classes) if number not in used]
    if not absent:
        return []
    named = _listed([names[number] if names is not None else str(number) for number in absent])
    return [f"{len(absent)} of {classes} classes have no training clip ({named}): they cannot be learned"]


def _listed(names: Sequence[str]) -> str:
    """The first names, quoted by `repr`, since a name may hold any character."""
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*map(repr, names[:NAMED]), *more])


def loop_notices(index: SampleIndex, data: DataBlock, frames: int, key: str) -> list[str]:
    """A notice of how many videos are shorter than a clip of `frames` frames spans; empty where none is known to be.

    Such a video is looped: it starts again from its first frame. `key` is the stage's, to name what to set.
    """
    span = (frames - 1) * data.stride + 1
    lengths = recorded_lengths(index, data.fps)
    short = lengths[lengths < span]
    if not len(short):
        return []
    of = f"{len(lengths):,} videos" if len(lengths) == len(index) else f"the {len(lengths):,} videos looked at"
    least, most = int(short.min()), int(short.max())
    long = f"{least} frames" if least == most else f"{least} to {most} frames"
    fitting = (least - 1) // max(frames - 1, 1)
    todo = f"{key}.data.stride={fitting} fits all of them" if fitting else f"{key}.frames has to be {least} or fewer"
    spans = f"a clip spans {span} frames of a video ({frames} frames, stride {data.stride})"
    return [f"{spans}, and {len(short):,} of {of} are shorter ({long}) and looped, from their first frame on; {todo}"]


def recorded_lengths(index: SampleIndex, rate: Rate) -> Int64:
    """Numbers of frames at `data.fps`, int64, from the json of all videos or of MOST_LOOKED_AT evenly spaced ones.

    Videos whose json has no length, or whose shard is not on a local disk, are left out.
    """
    folders: dict[Path, dict[str, RawShard]] = {}
    firsts = np.concatenate([[0], np.cumsum(index.shard_sizes)])
    step = -(-len(index) // MOST_LOOKED_AT)
    lengths = []
    for sample in range(0, len(index), step):
        number = int(index.shard[sample])
        shard = index.shards[number]
        if not isinstance(shard, Path):
            continue
        if shard.parent not in folders:
            folders[shard.parent] = _known(shard.parent)
        facts = _facts(shard, folders[shard.parent].get(shard_name(shard)), sample - int(firsts[number]))
        lengths += _length(facts, rate)
    return np.array(lengths, dtype=np.int64)


def _known(folder: Path) -> dict[str, RawShard]:
    try:
        return read_raw(folder)
    except DataError:  # A notice is optional; whoever needs the index reports what is wrong with it.
        return {}


def _facts(shard: Path, entry: RawShard | None, row: int) -> Any:
    """The content of a sample's json; None where it cannot be read, since a notice must not end a run."""
    try:
        offsets, sizes, _ = (entry or {})["members"]["json"]
        offset, size = int(offsets[row]), int(sizes[row])
        if offset < 0 or size > _MOST_JSON_BYTES:
            return None
        with shard.open("rb", buffering=0) as file:
            return json.loads(os.pread(file.fileno(), size, offset))
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None


def _length(facts: Any, rate: Rate) -> list[int]:
    frames, fps = (facts.get("frames"), facts.get("fps")) if isinstance(facts, dict) else (None, None)
    if type(frames) is not int or frames < 1:
        return []
    if rate is None or rate == "stored":
        return [frames]
    if not isinstance(fps, int | float) or not 0 < fps < 1e6:
        return []
    return [max(1, round(frames * float(rate) / fps))]
