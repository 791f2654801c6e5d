"""Packs videos into indexed WebDataset shards: check each file, shuffle, write, index, describe.

The same source, seed and options give the same bytes. Nothing under its final name is ever incomplete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from webdataset import TarWriter

from sfa_dist import __version__
from sfa_dist.data.decode import choose_decoder
from sfa_dist.data.pack_probe import Probe, Prober, start_probe_process
from sfa_dist.data.pack_source import ClipRow, class_list, class_numbers, read_rows, select_split
from sfa_dist.data.reencode import SUFFIX, Encoding, Reencoder
from sfa_dist.data.sample_plan import permuted
from sfa_dist.data.shard_index import build_index, write_json_atomically
from sfa_dist.errors import DataError

MANIFEST_NAME = "manifest.json"
REPORT_NAME = "report.json"
_PROBLEMS = ("missing", "corrupt", "short")


@dataclass(frozen=True)
class _Clip:
    """A good clip with its key in the shards and its class number."""

    key: str
    row: ClipRow
    probe: Probe
    label: int

    @property
    def file(self) -> Path:
        """What is packed: the source's file, or what it was encoded to."""
        return self.probe.encoded or self.row.path

    @property
    def suffix(self) -> str:
        """Of `file`."""
        return SUFFIX if self.probe.encoded else self.row.suffix


def pack(
    source: Path,
    out_dir: Path,
    *,
    prefix: str | None = None,
    root: Path | None = None,
    classes: Path | None = None,
    split_column: str | None = None,
    split: str | None = None,
    shard_size: int = 1000,
    shard_bytes: int | None = None,
    min_frames: int = 1,
    max_bad_fraction: float = 0.05,
    seed: int = 0,
    workers: int = 0,
    decoder: Literal["auto", "torchcodec", "pyav"] = "auto",
    decode_all: bool = False,
    encoding: Encoding | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Packs a csv (columns path, label, others) or a folder of class folders into `out_dir`; returns report.json.

    Writes `<prefix>-000000.tar` ... of at most `shard_size` clips and `shard_bytes` bytes, then index.json,
    manifest.json and report.json. prefix: the split's name, or "shard". classes: a file with one class name a line.
    workers: processes that check files, 0 for none. progress(done, total) is called as files are checked.
    encoding: encodes videos anew; what an interrupted pack has encoded is not encoded again.
    Of files with the same content only the first is packed. Raises DataError for a label outside the classes, and,
    after the report is written, when nothing is left or more than `max_bad_fraction` of the clips are bad.
    """
    prefix = prefix or split or "shard"
    all_rows = read_rows(source, root)
    names = class_list(all_rows, classes)
    rows = select_split(all_rows, split_column, split)
    numbers = class_numbers(rows, names)
    manifest = _manifest_to_extend(out_dir, names, prefix, overwrite)

    work = out_dir / f".encoded-{prefix}"
    reencoder = Reencoder(encoding, work) if encoding else None
    probes = _probe_all(rows, Prober(decoder, min_frames, decode_all, reencoder), workers, progress)
    clips, report = _sort_out(rows, numbers, probes)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json_atomically(out_dir / REPORT_NAME, {"source": str(source), **report}, indent=1)
    _check_budget(report, max_bad_fraction, out_dir)

    order = permuted(np.arange(len(clips), dtype=np.int64), seed)
    shards = _write_shards([clips[i] for i in order], names, out_dir, prefix, shard_size, shard_bytes)
    shutil.rmtree(work, ignore_errors=True)
    build_index(shards, workers=workers)
    manifest["packs"][prefix] = {
        "shards": [path.name for path in shards],
        **_counts(clips, len(names), split_column or "split"),
        "source": source.name,
        "program": f"sfa_dist {__version__}",
        "decoder": choose_decoder(decoder).version,
        "options": {"seed": seed, "shard_size": shard_size, "shard_bytes": shard_bytes, "min_frames": min_frames},
        "encoding": asdict(encoding) if encoding else None,
    }
    manifest["samples"] = sum(each["samples"] for each in manifest["packs"].values())
    write_json_atomically(out_dir / MANIFEST_NAME, manifest, indent=1)
    return {"source": str(source), **report}


def _counts(clips: Sequence[_Clip], num_classes: int, split_column: str) -> dict[str, Any]:
    splits = Counter(clip.row.extra[split_column] for clip in clips if split_column in clip.row.extra)
    per_class = np.bincount([clip.label for clip in clips], minlength=num_classes).tolist()
    return {"samples": len(clips), "per_class": per_class, "splits": dict(sorted(splits.items()))}


def _manifest_to_extend(out_dir: Path, names: list[str], prefix: str, overwrite: bool) -> dict[str, Any]:
    """The manifest to add this pack to: a folder may hold several packs (train, val) with the same classes."""
    present = sorted(out_dir.glob(f"{prefix}-*.tar"))
    if present and not overwrite:
        raise DataError(f"{out_dir} already holds {present[0].name}: give another folder or --prefix, or --overwrite")
    path = out_dir / MANIFEST_NAME
    manifest: dict[str, Any] = {"version": 1, "classes": names, "samples": 0, "packs": {}}
    if path.exists():
        try:
            old = json.loads(path.read_bytes())
            packs, old_names = dict(old["packs"]), old["classes"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a manifest of this program ({error!r}): pack elsewhere") from error
        manifest["packs"] = {name: each for name, each in packs.items() if name != prefix}
        if manifest["packs"] and old_names != names:
            raise DataError(f"{path} has other classes ({len(old_names)} against {len(names)}): use the same --classes")
    return manifest


def _probe_all(
    rows: Sequence[ClipRow], prober: Prober, workers: int, progress: Callable[[int, int], None] | None
) -> list[Probe]:
    """The probe of each row, in order, from `workers` processes (0: from this one)."""
    choose_decoder(prober.decoder)  # a decoder that cannot be used is said here, once

    def collect(results: Iterator[Probe]) -> list[Probe]:
        found = []
        for result in results:
            found.append(result)
            if progress is not None:
                progress(len(found), len(rows))
        return found

    if workers < 1:
        return collect(map(prober, rows))
    try:
        with ProcessPoolExecutor(workers, initializer=start_probe_process) as pool:
            return collect(pool.map(prober, rows, chunksize=8))
    except BrokenProcessPool as error:
        raise DataError("a file crashed the decoder: pack with --workers 0 to see which one is the last") from error


def _sort_out(
    rows: Sequence[ClipRow], numbers: Sequence[int], probes: Sequence[Probe]
) -> tuple[list[_Clip], dict[str, Any]]:
    """(clips to pack, report). Keys are the rows' numbers in the source, so they are unique and stay the same."""
    clips: list[_Clip] = []
    first_with: dict[str, _Clip] = {}
    report: dict[str, Any] = {"listed": len(rows), "packed": 0, "bad_fraction": 0.0}
    report |= {problem: [] for problem in (*_PROBLEMS, "duplicate")}
    for number, (row, label, probe) in enumerate(zip(rows, numbers, probes, strict=True)):
        if probe.problem:
            report[probe.problem].append({"path": row.name, "where": row.where, "reason": probe.reason})
            continue
        clip = _Clip(f"{number:08d}", row, probe, label)
        first = first_with.setdefault(probe.sha256, clip)
        if first is clip:
            clips.append(clip)
            continue
        same_label = first.label == label
        report["duplicate"].append({"path": row.name, "same_as": first.row.name, "same_label": same_label})
    report["packed"] = len(clips)
    report["bad_fraction"] = sum(len(report[problem]) for problem in _PROBLEMS) / len(rows)
    return clips, report


def _check_budget(report: dict[str, Any], max_bad_fraction: float, out_dir: Path) -> None:
    if report["packed"] and report["bad_fraction"] <= max_bad_fraction:
        return
    counts = ", ".join(f"{len(report[problem])} {problem}" for problem in _PROBLEMS)
    first = next(entry for problem in _PROBLEMS for entry in report[problem])
    raise DataError(
        f"{counts} of {report['listed']} clips, more than --max-bad-fraction {max_bad_fraction} allows; first: "
        f"{first['path']} ({first['where']}): {first['reason']}. All are in {out_dir / REPORT_NAME}; nothing was packed"
    )


def _write_shards(
    clips: Sequence[_Clip], names: Sequence[str], out_dir: Path, prefix: str, shard_size: int, shard_bytes: int | None
) -> list[Path]:
    """Writes all shards under temporary names, then moves them to their own. Returns their paths in order."""
    temporary: list[Path] = []
    try:
        for number, group in enumerate(_grouped(clips, shard_size, shard_bytes)):
            temporary.append(out_dir / f".{prefix}-{number:06d}.tar.tmp")
            _write_shard(temporary[-1], group, names)
        shards = [out_dir / path.name[1:].removesuffix(".tmp") for path in temporary]
        for stale in set(out_dir.glob(f"{prefix}-*.tar")) - set(shards):
            stale.unlink()
        for path, shard in zip(temporary, shards, strict=True):
            os.replace(path, shard)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return shards


def _grouped(clips: Sequence[_Clip], shard_size: int, shard_bytes: int | None) -> Iterator[list[_Clip]]:
    group: list[_Clip] = []
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


def _write_shard(path: Path, clips: Sequence[_Clip], names: Sequence[str]) -> None:
    with path.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0, user="", group="") as writer:  # no time, no user: same bytes
            for clip in clips:
                writer.write(_sample(clip, names))
        file.flush()
        os.fsync(file.fileno())


def _sample(clip: _Clip, names: Sequence[str]) -> dict[str, Any]:
    row, probe = clip.row, clip.probe
    facts = {
        **row.extra,
        "label": clip.label,
        "label_name": names[clip.label],
        "duration": round(probe.duration, 6),
        "fps": round(probe.fps, 6),
        "frames": probe.frames,
        "path": row.name,
    }
    return {
        "__key__": clip.key,
        clip.suffix: clip.file.read_bytes(),
        "json": json.dumps(facts, sort_keys=True).encode(),
        "cls": str(clip.label).encode(),
    }
