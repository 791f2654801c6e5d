"""The shards of the feature cache: plain WebDataset tars, their index, and a manifest that describes them.

    <cache>/train/view-00/      one augmented view of every training video
      part-000000-000.tar       samples of source shard 0: <key>.features.npy, <key>.json, <key>.cls
      index.json                as beside any shards
      frames.npy                int64 (samples,): number of frames of each source video, 0 where it is bad
      manifest.json             classes, shards, bad samples, and what the features depend on; written last
    <cache>/val-32f/view-00/    the centre clips of 32 frames

`features.npy` is (steps, width), float32 or the bits of bfloat16 as uint16, since numpy lacks bfloat16 (the .json
records the `dtype`). A part is the unit of work; the samples in it depend on the source alone. It is complete once
`<part>.json` lies beside it with its sha256; later the manifest takes over that record. Equal inputs give equal bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from webdataset import TarWriter

from sfa_dist.boundary.disk import file_sha256, read_object, read_plain
from sfa_dist.data.features.feature_slices import FeaturePart
from sfa_dist.data.shards.index_columns import UNREADABLE
from sfa_dist.data.shards.index_file import write_json_atomically
from sfa_dist.data.shards.shard_index import Int64, SampleIndex, build_index, load_index
from sfa_dist.errors import CheckpointError, DataError

PART_SAMPLES = 128  # 15 to 25 MB: cheap to lose when killed, large enough for a parallel file system.
MANIFEST_NAME, FRAMES_NAME = "manifest.json", "frames.npy"
BUILDING_NAME = "building.json"  # What the parts are made from, until the manifest records it.
MEMBER = "features.npy"
SEAL = "manifest sha256"  # Key in the manifest: sha256 of all other entries.
MAX_FRAMES = 2**31  # Bytes of frames.npy.
PART_FACTS: dict[str, Any] = {"size": int, "sha256": str, "frames": list, "bad": dict, "seconds": (int, float)}
STORED = {torch.bfloat16: ("bfloat16", "<u2"), torch.float32: ("float32", "<f4")}


def plan_parts(index: SampleIndex, view: int) -> list[FeaturePart]:
    """All parts of a view, each of at most PART_SAMPLES neighbouring samples of one source shard."""
    parts, first = [], 0
    for shard, size in enumerate(index.shard_sizes.tolist()):
        for piece, begin in enumerate(range(0, size, PART_SAMPLES)):
            samples = range(first + begin, first + min(begin + PART_SAMPLES, size))
            parts.append(FeaturePart(f"part-{shard:06d}-{piece:03d}", view, samples))
        first += size
    return parts


@lru_cache(maxsize=4096)
def npy_header(steps: int, width: int, descr: str) -> bytes:
    """The header of a .npy file of shape (steps, width)."""
    file = io.BytesIO()
    facts = {"descr": descr, "fortran_order": False, "shape": (steps, width)}
    np.lib.format.write_array_header_1_0(file, facts)
    return file.getvalue()


def begin_view(folder: Path, made_of: dict[str, Any]) -> dict[str, Any]:
    """Records what the parts in a folder are made from, `made_of`, unless it is recorded already; returns the record.

    Raises OSError, DataError where the record cannot be read.
    """
    path = folder / BUILDING_NAME
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(path, made_of, indent=1)
    return read_building(folder)


def read_building(folder: Path) -> dict[str, Any]:
    """The record of what the parts of an incomplete view are made from; empty where there is none."""
    path = folder / BUILDING_NAME
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path} cannot be read ({error}): remove {folder} to build the view again") from error


class PartWriter:
    """Writes one part under a temporary name; `finish` renames it and adds `<part>.json`. Raises OSError."""

    def __init__(self, folder: Path, part: FeaturePart, index: SampleIndex, facts: dict[str, Any]) -> None:
        self.part, self._folder, self._index, self._facts = part, folder, index, facts
        self._temporary = folder / f".{part.name}.tar.tmp"
        self._file = self._temporary.open("wb")
        self._tar = TarWriter(self._file, encoder=False, mtime=0, user="", group="")  # Equal inputs give equal bytes.
        self._frames: list[int] = []
        self._bad: dict[str, str] = {}

    @property
    def is_full(self) -> bool:
        """Whether all samples of the part have been added."""
        return len(self._frames) == len(self.part.samples)

    def add(self, sample: int, features: torch.Tensor, num_video_frames: int) -> None:
        """Adds the next sample: `features` (steps, width), float32 or bfloat16, on the CPU."""
        name, descr = STORED[features.dtype]
        bits = features.view(torch.uint16) if features.dtype == torch.bfloat16 else features
        array = np.ascontiguousarray(bits.numpy())
        data = npy_header(*array.shape, descr) + array.tobytes()
        self._write(sample, {MEMBER: data}, {"dtype": name, "frames": num_video_frames})
        self._frames.append(num_video_frames)

    def add_bad(self, sample: int, reason: str) -> None:
        """Adds a sample without features, so that the samples behind it keep their numbers."""
        self._write(sample, {}, {"error": reason})
        self._frames.append(0)
        self._bad[str(sample)] = reason

    def _write(self, sample: int, members: dict[str, bytes], facts: dict[str, Any]) -> None:
        labels = self._index.labels(sample)
        facts = {**self._facts, **facts, **labels, "view": self.part.view, "source": self._index.name(sample)}
        record: dict[str, Any] = {"__key__": self._index.keys[sample], **members}
        record["json"] = json.dumps(facts, sort_keys=True).encode()
        if "label" in labels:
            record["cls"] = str(labels["label"]).encode()
        self._tar.write(record)

    def finish(self, seconds: float) -> None:
        """Moves the part to its final name and records it; `seconds` is the time that it took."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = self._folder / f"{self.part.name}.tar"
        size, sha256 = self._temporary.stat().st_size, file_sha256(self._temporary)
        os.replace(self._temporary, path)
        done = {"size": size, "sha256": sha256, "frames": self._frames, "bad": self._bad, "seconds": seconds}
        write_json_atomically(path.with_suffix(".json"), done)

    def discard(self) -> None:
        """Removes an unfinished part."""
        with contextlib.suppress(OSError):  # Closing flushes, which fails on the full disk that was reported already.
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def missing_parts(folder: Path, parts: Sequence[FeaturePart], workers: int) -> list[FeaturePart]:
    """Parts that are absent or differ from their `.json`; reads every part in full, and removes temporary files."""
    for remains in folder.glob(".*.tmp"):
        remains.unlink()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        whole = pool.map(lambda part: _is_whole(folder / f"{part.name}.tar"), parts)
        return [part for part, is_whole in zip(parts, whole, strict=True) if not is_whole]


def _is_whole(path: Path) -> bool:
    try:
        done = read_object(path.with_suffix(".json"), size=int, sha256=str)
        return path.stat().st_size == done["size"] and file_sha256(path) == done["sha256"]
    except (FileNotFoundError, ValueError):
        return False


def close_view(folder: Path, parts: Sequence[FeaturePart], manifest: dict[str, Any], workers: int) -> None:
    """Writes index, frames and manifest of a view whose parts all exist, after reading every byte back.

    Raises DataError where a part or its record is not what was written.
    """
    paths = [folder / f"{part.name}.tar" for part in parts]
    try:
        records = [read_object(path.with_suffix(".json"), **PART_FACTS) for path in paths]
    except ValueError as error:
        raise DataError(
            f"the records of parts in {folder} cannot be read ({error}): remove the folder to build the view again"
        ) from error
    entries = build_index(paths, workers)
    changed = [path for path, done in zip(paths, records, strict=True) if entries[path].sha256 != done["sha256"]]
    if changed:
        raise DataError(f"{changed[0]} is not what was written: the disk or another job changed it; run again")
    frames = np.array([count for done in records for count in done["frames"]], dtype=np.int64)
    _save_array(folder / FRAMES_NAME, frames)
    bad = {sample: reason for done in records for sample, reason in done["bad"].items()}
    seconds = sum(done["seconds"] for done in records)
    shards = [path.name for path in paths]
    sums = {path.name: done["sha256"] for path, done in zip(paths, records, strict=True)}
    sums[FRAMES_NAME] = file_sha256(folder / FRAMES_NAME)
    content = {
        **manifest,
        **{"samples": len(frames), "shards": shards, "bad": bad, "rank_seconds": seconds, "sha256": sums},
    }
    write_json_atomically(folder / MANIFEST_NAME, {**content, SEAL: _seal(content)}, indent=1)
    drop_leftovers(folder, parts)


def drop_leftovers(folder: Path, parts: Sequence[FeaturePart]) -> None:
    """Removes the files that a complete view no longer needs."""
    for name in (BUILDING_NAME, *(f"{part.name}.json" for part in parts)):
        (folder / name).unlink(missing_ok=True)


def _save_array(path: Path, array: npt.NDArray[np.int64]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a view; None where the view is not complete.

    Raises DataError where it cannot be read, CheckpointError where it has been changed since it was written.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        content = read_object(path, key=dict, shards=list, bad=dict, samples=int, trunk_sha256=str)
        seal = content.pop(SEAL, None)
        if not all(isinstance(name, str) and name == Path(name).name for name in content["shards"]):
            raise ValueError("its shards are not file names")
        if not all(sample.isdecimal() for sample in content["bad"]):
            raise ValueError("its bad samples are not numbers")
    except ValueError as error:
        raise DataError(
            f"{path} is not the manifest of a feature cache ({error}): build the cache elsewhere"
        ) from error
    if seal not in (None, _seal(content)):  # Older caches have none.
        raise CheckpointError(f"{path} is damaged: its {SEAL} does not match its content; build the view again")
    return content


def _seal(content: dict[str, Any]) -> str:
    """sha256 of a manifest's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _require_recorded(folder: Path, manifest: dict[str, Any], found: dict[str, str]) -> None:
    """Raises CheckpointError where a file has changed since the view was built; `found` is name -> sha256."""
    recorded = manifest.get("sha256")
    if not isinstance(recorded, dict):  # An older cache.
        return
    for name in found:
        if recorded.get(name) != found[name]:
            raise CheckpointError(
                f"{folder / name} is not what was written (sha256 {found[name][:16]}..., {MANIFEST_NAME} says "
                f"{str(recorded.get(name))[:16]}...): restore it, or remove {folder} to build the view again"
            )


@dataclass(frozen=True, eq=False)
class CachedView:
    """An opened view: entry i of each field is sample i of the source's index; `bad` is sample -> reason."""

    index: SampleIndex
    frames: Int64
    bad: dict[int, str] = field(default_factory=dict)


@lru_cache(maxsize=2)
def open_view(folder: Path) -> CachedView:
    """Opens a complete view.

    Raises DataError where it is incomplete, unreadable or inconsistent, CheckpointError where a file has changed since
    it was written.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder} is not complete (it has no {MANIFEST_NAME}): run `sfa cache`")
    index = load_index([folder / name for name in manifest["shards"]])
    _require_recorded(folder, manifest, dict(zip(manifest["shards"], index.shard_sha256, strict=True)))
    try:
        data = read_plain(folder / FRAMES_NAME, MAX_FRAMES)
        _require_recorded(folder, manifest, {FRAMES_NAME: hashlib.sha256(data).hexdigest()})
        frames = np.load(io.BytesIO(data), allow_pickle=False)
    except UNREADABLE as error:
        raise DataError(f"{folder / FRAMES_NAME} cannot be read ({error}): build the cache again") from error
    if not len(index) == len(frames) == manifest["samples"]:
        raise DataError(
            f"{folder}: {len(index)} samples indexed, {manifest['samples']} in {MANIFEST_NAME}; build the view again"
        )
    return CachedView(index, frames, {int(sample): reason for sample, reason in manifest["bad"].items()})
