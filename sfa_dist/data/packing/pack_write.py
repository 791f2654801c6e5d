"""Writes clips into WebDataset shards. The same clips in the same order give the same bytes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from sfa_dist.data.packing.annotations.classes import Heads
from sfa_dist.data.packing.annotations.rows import SINGLE
from sfa_dist.data.packing.pack_settings import PackSettings
from sfa_dist.data.packing.pack_survey import Clip


def write_shards(clips: Sequence[Clip], heads: Heads, out_dir: Path, settings: PackSettings) -> list[Path]:
    """Writes all shards under temporary names, then renames them. Returns their paths in order."""
    temporary: list[Path] = []
    try:
        for number, group in enumerate(_grouped(clips, settings.shard_size, settings.shard_bytes)):
            temporary.append(out_dir / f".{settings.name}-{number:06d}.tar.tmp")
            _write_shard(temporary[-1], group, heads)
        shards = [out_dir / path.name[1:].removesuffix(".tmp") for path in temporary]
        for stale in set(shards_of(out_dir, settings.name)) - set(shards):
            stale.unlink()
        for path, shard in zip(temporary, shards, strict=True):
            os.replace(path, shard)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return shards


def shards_of(out_dir: Path, prefix: str) -> list[Path]:
    """The existing shards of this prefix, in order; those of `train-extra` do not belong to `train`."""
    name = re.compile(rf"{re.escape(prefix)}-\d{{6,}}\.tar")
    return sorted(path for path in out_dir.glob("*.tar") if name.fullmatch(path.name))


def _grouped(clips: Sequence[Clip], shard_size: int, shard_bytes: int | None) -> Iterator[list[Clip]]:
    group: list[Clip] = []
    size = 0
    for clip in clips:
        clip_size = clip.file.stat().st_size
        if group and (len(group) >= shard_size or (shard_bytes is not None and size + clip_size > shard_bytes)):
            yield group
            group, size = [], 0
        group.append(clip)
        size += clip_size
    if group:
        yield group


def _write_shard(path: Path, clips: Sequence[Clip], heads: Heads) -> None:
    with path.open("wb") as file:
        # Without time and user, so that the bytes are the same.
        with TarWriter(file, encoder=False, mtime=0, user="", group="") as writer:
            for clip in clips:
                writer.write(_sample(clip, heads))
        file.flush()
        os.fsync(file.fileno())


def _sample(clip: Clip, heads: Heads) -> dict[str, Any]:
    row, probe = clip.row, clip.probe
    facts: dict[str, Any] = {**row.extra}
    for head, names in heads.items():
        facts |= {head: clip.labels[head], f"{head}_name": names[clip.labels[head]]}
    facts |= {
        "duration": round(probe.duration, 6),
        "fps": round(probe.fps, 6),
        "frames": probe.frames,
        "path": row.name,
    }
    sample: dict[str, Any] = {
        "__key__": clip.key,
        clip.suffix: clip.file.read_bytes(),
        "json": json.dumps(facts, sort_keys=True).encode(),
    }
    return sample | ({"cls": str(clip.labels[SINGLE]).encode()} if SINGLE in heads else {})
