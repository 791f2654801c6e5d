"""Finds clips that are in two packs, or in two splits of a list, and so would be trained on and tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sfa_dist.data.packing.annotations.rows import ClipRow, Say, some
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.shards.shard_names import Shard
from sfa_dist.data.shards.shard_walk import CLIP_SUFFIXES, ShardEntry
from sfa_dist.errors import DataError


def note_shared_files(rows: Sequence[ClipRow], column: str, say: Say) -> None:
    """Reports files, or parts of videos, that a list has in several splits; `column` holds a row's split."""
    splits: dict[tuple[object, ...], set[str]] = {}
    names: dict[tuple[object, ...], str] = {}
    for row in rows:
        if column in row.extra:
            clip = (row.path, row.cut, row.frames)
            splits.setdefault(clip, set()).add(row.extra[column])
            names.setdefault(clip, row.name)
    shared = [names[clip] for clip, found in splits.items() if len(found) > 1]
    if shared:
        say(f"clips in several splits, which are trained on and tested: {len(shared)} ({some(shared, 3)})")


def shared_with(
    packs: Mapping[str, Sequence[Path]],
    entries: Mapping[Shard, ShardEntry],
    names: Mapping[str, str],
    prefix: str,
    say: Say,
) -> dict[str, list[str]]:
    """The clips that other packs share with the new one, by size and crc32: {pack: names of the new pack's clips}.

    packs: the shards of all packs by name.   entries, names: of the new pack, called `prefix`; `names` are its clips'
    by key. Reports how many clips are shared.
    """
    own = {
        (member.size, member.crc32): names[sample.key]
        for entry in entries.values()
        for sample in entry.samples
        for suffix, member in sample.members.items()
        if suffix in CLIP_SUFFIXES
    }
    shared: dict[str, list[str]] = {}
    for pack, shards in packs.items():
        if pack == prefix:
            continue
        try:
            index = load_index(shards)
        except DataError as error:
            say(f"cannot check whether {pack} has the same clips: {error}")
            continue
        contents = zip(index.size.tolist(), index.crc32.tolist(), strict=True)
        if common := sorted({own[content] for content in contents if content in own}):
            shared[pack] = common
            say(f"clips of {prefix} that are in {pack} too, by content: {len(common)} ({some(common, 3)})")
    return shared
