"""Clips that lie in two packs, or in two splits of a list: what is tested would have been trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sfa_dist.data.packing.annotations.rows import ClipRow, Say, some
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.shards.shard_names import Shard
from sfa_dist.data.shards.shard_walk import CLIP_SUFFIXES, ShardEntry
from sfa_dist.errors import DataError


def note_shared_files(rows: Sequence[ClipRow], column: str, say: Say) -> None:
    """Tells the files that a list has in several splits (or parts of a video at the same times)."""
    splits: dict[tuple[object, ...], set[str]] = {}
    names: dict[tuple[object, ...], str] = {}
    for row in rows:
        if column in row.extra:
            what = (row.path, row.cut, row.frames)
            splits.setdefault(what, set()).add(row.extra[column])
            names.setdefault(what, row.name)
    shared = [names[what] for what, found in splits.items() if len(found) > 1]
    if shared:
        say(f"clips in several splits, so that what is tested is trained on: {len(shared)} ({some(shared, 3)})")


def shared_with(
    packs: Mapping[str, Sequence[Path]],
    entries: Mapping[Shard, ShardEntry],
    names: Mapping[str, str],
    prefix: str,
    say: Say,
) -> dict[str, list[str]]:
    """By the name of another pack (its shards in `packs`): which clips of the new pack it has too, by size and crc32.
    `entries` are the new pack's shards, `names` its clips by key. Tells how many."""
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
            say(f"whether {pack} has the same clips cannot be told: {error}")
            continue
        marks = zip(index.size.tolist(), index.crc32.tolist(), strict=True)
        if common := sorted({own[mark] for mark in marks if mark in own}):
            shared[pack] = common
            say(f"clips of {prefix} that {pack} has too, by their content: {len(common)} ({some(common, 3)})")
    return shared
