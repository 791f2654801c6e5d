"""Packs videos into indexed WebDataset shards: check each file, shuffle, write, index, describe.

The same source, seed and options give the same bytes. Nothing under its final name is ever incomplete.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sfa_dist import __version__
from sfa_dist.boundary.disk import parse_json, read_plain
from sfa_dist.data.packing.annotations import read_rows, select_split
from sfa_dist.data.packing.annotations.classes import Heads, class_lists, class_numbers
from sfa_dist.data.packing.annotations.rows import SINGLE, Say
from sfa_dist.data.packing.pack_probe import Reading, VideoProber
from sfa_dist.data.packing.pack_shared import note_shared_files, shared_with
from sfa_dist.data.packing.pack_survey import PROBLEMS, Clip, Progress, probe_all, sort_out
from sfa_dist.data.packing.pack_write import shards_of, write_shards
from sfa_dist.data.packing.reencode import Encoding
from sfa_dist.data.sampling.sample_plan import permuted
from sfa_dist.data.shards.index_file import write_json_atomically
from sfa_dist.data.shards.shard_index import build_index
from sfa_dist.data.video.decode import choose_decoder
from sfa_dist.errors import DataError, UsageError

MANIFEST_NAME = "manifest.json"
NO_PREFIX = "shard"  # what shards are called that were given no name


def pack(
    source: Path,
    out_dir: Path,
    *,
    format: str = "auto",
    videos: Path | None = None,
    prefix: str | None = None,
    classes: Path | None = None,
    split_column: str | None = None,
    split: str | None = None,
    shard_size: int = 1000,
    shard_bytes: int | None = None,
    min_frames: int = 1,
    max_bad_fraction: float = 0.05,
    seed: int = 0,
    workers: int = 0,
    readings: Sequence[Reading] = (Reading(),),
    decode_all: bool = False,
    encoding: Encoding | None = None,
    overwrite: bool = False,
    check: bool = False,
    progress: Progress | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Packs what an annotation file (annotations/) or a folder of class folders lists; returns the report.

    Writes `<prefix>-000000.tar` ... of at most `shard_size` clips and `shard_bytes` bytes into `out_dir`, then
    index.json, manifest.json and the report (`report_name`). videos: the folder below which the files lie. prefix: the
    split's name, or "shard". classes: a class list (`annotations.classes.read_class_list`). workers: processes that
    look at files, 0 for none. encoding: encodes all videos anew; parts of longer videos always are.
    progress(done, total) is called as files are looked at. say(line) is called for what was left out, guessed or read
    in another way than it stands; the report has these lines as `notes`. Of files with the same content only the first
    is packed, and none where their labels differ. An
    interrupted pack goes on with what it had looked at and encoded. With `check` the report is all that is made, and
    nothing is written.

    Raises DataError for a label outside the classes, and, with the report, when nothing is left or more than
    `max_bad_fraction` of the clips are bad; CheckpointError where what is encoded cannot be written.
    """
    prefix = prefix or split or NO_PREFIX
    if not re.fullmatch(r"\w[\w.+-]*", prefix):
        raise UsageError(f"shards cannot be called {prefix!r}-000000.tar: give --prefix of letters, digits and . + - _")
    if out_dir.exists() and not out_dir.is_dir():
        raise UsageError(f"{out_dir} is a file: give a folder for the shards")
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        say(line)

    chosen, all_rows = read_rows(source, format, videos, note)
    heads = class_lists(all_rows, source, chosen, classes, note)
    rows = select_split(all_rows, split_column, split, note)
    numbers = class_numbers(rows, heads, note, numbered=chosen == "epic")
    note_shared_files(all_rows, split_column or "split", note)
    if decode_all and any(row.cut or row.frames for row in rows):
        raise UsageError("--decode-all looks at whole files, and these clips are parts of videos: leave it out")
    if not check:
        _manifest_to_extend(out_dir, heads, prefix, overwrite)  # what it refuses is refused before the work

    work = out_dir / f".{prefix}-work"
    prober = VideoProber(tuple(readings), min_frames, decode_all, work, encoding, dry=check)
    probes = probe_all(rows, prober, None if check else work / "journal.jsonl", workers, progress)
    clips, report = sort_out(rows, numbers, probes, heads)
    report = {"source": str(source), "prefix": prefix, "format": chosen, **report, "notes": notes}
    if check:
        _check_budget(report, max_bad_fraction, None)
        return report
    write_json_atomically(out_dir / report_name(prefix), report, indent=1)
    _check_budget(report, max_bad_fraction, out_dir / report_name(prefix))

    order = permuted(np.arange(len(clips), dtype=np.int64), seed)
    shards = write_shards([clips[i] for i in order], heads, out_dir, prefix, shard_size, shard_bytes)
    entries = build_index(shards, workers=workers)
    manifest = _manifest_to_extend(out_dir, heads, prefix, overwrite=True)  # another pack may have come into the folder
    manifest["packs"][prefix] = {
        "shards": [path.name for path in shards],
        **_counts(clips, heads, split_column or "split"),
        "source": source.name,
        "format": chosen,
        "program": f"sfa_dist {__version__}",
        "decoder": ", ".join(dict.fromkeys(choose_decoder(reading.decoder).version for reading in readings)),
        "fps": [reading.rate for reading in readings],
        "options": {"seed": seed, "shard_size": shard_size, "shard_bytes": shard_bytes, "min_frames": min_frames},
        "encoding": asdict(encoding) if encoding else None,
        "clips": report["clips"],
    }
    manifest["samples"] = sum(each["samples"] for each in manifest["packs"].values())
    write_json_atomically(out_dir / MANIFEST_NAME, manifest, indent=1)
    shutil.rmtree(work, ignore_errors=True)
    others = {name: [out_dir / shard for shard in each["shards"]] for name, each in manifest["packs"].items()}
    if report_shared := shared_with(others, entries, {clip.key: clip.row.name for clip in clips}, prefix, note):
        report["shared"] = report_shared
    write_json_atomically(out_dir / report_name(prefix), report, indent=1)
    return report


def report_name(prefix: str) -> str:
    """The report's file, one for each pack of a folder: report-train.json, report-val.json; report.json of "shard"."""
    return "report.json" if prefix == NO_PREFIX else f"report-{prefix}.json"


def _counts(clips: Sequence[Clip], heads: Heads, split_column: str) -> dict[str, Any]:
    splits = Counter(clip.row.extra[split_column] for clip in clips if split_column in clip.row.extra)
    per_class = {
        head: np.bincount([clip.labels[head] for clip in clips], minlength=len(names)).tolist()
        for head, names in heads.items()
    }
    return {
        "samples": len(clips),
        "per_class": per_class[SINGLE] if SINGLE in heads else per_class,
        "splits": dict(sorted(splits.items())),
    }


def _manifest_to_extend(out_dir: Path, heads: Heads, prefix: str, overwrite: bool) -> dict[str, Any]:
    """The manifest to add this pack to: a folder may hold several packs (train, val) with the same classes.

    `classes` is the list of class names; null where there are several heads, whose lists stand under `heads`.
    """
    present = shards_of(out_dir, prefix)
    if present and not overwrite:
        raise DataError(f"{out_dir} already holds {present[0].name}: give another folder or --prefix, or --overwrite")
    path = out_dir / MANIFEST_NAME
    names = {"classes": heads[SINGLE]} if SINGLE in heads else {"classes": None, "heads": heads}
    manifest: dict[str, Any] = {"version": 1, **names, "samples": 0, "packs": {}}
    if path.exists():
        try:
            old = parse_json(read_plain(path))
            packs, old_names = dict(old["packs"]), {key: old[key] for key in ("classes", "heads") if key in old}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a manifest of this program ({error!r}): pack elsewhere") from error
        manifest["packs"] = {name: each for name, each in packs.items() if name != prefix}
        if manifest["packs"] and old_names != names:
            raise DataError(f"{path} has other classes: use the same --classes for all that lies in one folder")
    out_dir.mkdir(parents=True, exist_ok=True)
    return manifest


def _check_budget(report: dict[str, Any], max_bad_fraction: float, file: Path | None) -> None:
    """Raises DataError, with the report, which lies in `file` (None: it was only to be checked)."""
    if report["packed"] and report["bad_fraction"] <= max_bad_fraction:
        return
    counts = ", ".join(f"{len(report[problem])} {problem}" for problem in PROBLEMS if report[problem])
    first = next(entry for problem in PROBLEMS for entry in report[problem])
    rest = f"All are in {file}; nothing was packed" if file else "All of them: --json"
    error = DataError(
        f"{counts} of {report['listed']} clips, more than --max-bad-fraction {max_bad_fraction} allows; first: "
        f"{first['path']} ({first['where']}): {first['reason']}. {rest}"
    )
    error.report = report
    raise error
