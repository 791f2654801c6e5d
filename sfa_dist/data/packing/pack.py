"""Packs videos into indexed WebDataset shards: check each file, shuffle, write, index, describe.

The same source, seed and options give the same bytes. A file under its final name is always complete.
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
from sfa_dist.data.packing.pack_probe import VideoProber
from sfa_dist.data.packing.pack_settings import DEFAULTS, NO_PREFIX, PackSettings
from sfa_dist.data.packing.pack_shared import note_shared_files, shared_with
from sfa_dist.data.packing.pack_survey import PROBLEMS, Clip, Progress, probe_all, sort_out
from sfa_dist.data.packing.pack_write import shards_of, write_shards
from sfa_dist.data.sampling.sample_plan import permuted
from sfa_dist.data.shards.index_file import write_json_atomically
from sfa_dist.data.shards.shard_index import build_index
from sfa_dist.data.video.decode import choose_decoder
from sfa_dist.errors import DataError, UsageError

MANIFEST_NAME = "manifest.json"


def pack(
    source: Path,
    out_dir: Path,
    settings: PackSettings = DEFAULTS,
    *,
    progress: Progress | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Packs the clips that an annotation file (annotations/) or a folder of class folders lists; returns the report.

    Writes shards `<name>-000000.tar` ... into `out_dir`, then index.json, manifest.json and the report (`report_name`).
    With `settings.check` it only makes the report, and writes nothing. Of files with the same content only the first
    is packed, and none where their labels differ. A pack that was interrupted goes on with what it had checked and
    encoded. Parts of longer videos are always encoded.

    progress(done, total) is called as files are checked. say(line) is called for whatever is left out, guessed or read
    differently from how it is written; the report has these lines as `notes`.

    Raises UsageError for settings that do not fit the source; DataError for a label outside the classes, and, with the
    report, when no clip is left or too many are bad; CheckpointError where an encoded clip cannot be written.
    """
    _check_names(out_dir, settings)
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        say(line)

    chosen, all_rows = read_rows(source, settings.format, settings.videos, note)
    heads = class_lists(all_rows, source, chosen, settings.classes, note)
    rows = select_split(all_rows, settings.split_column, settings.split, note)
    numbers = class_numbers(rows, heads, note, numbered=chosen == "epic")
    note_shared_files(all_rows, settings.column_of_splits, note)
    if settings.decode_all and any(row.cut or row.frames for row in rows):
        raise UsageError("--decode-all checks whole files, and these clips are parts of videos: leave it out")
    if not settings.check:  # refused before the work
        _manifest_to_extend(out_dir, heads, settings.name, settings.overwrite)

    work = out_dir / f".{settings.name}-work"
    probes = probe_all(rows, VideoProber(settings, work), None if settings.check else work / "journal.jsonl", progress)
    clips, report = sort_out(rows, numbers, probes, heads)
    report = {"source": str(source), "prefix": settings.name, "format": chosen, **report, "notes": notes}
    if settings.check:
        _check_budget(report, settings.max_bad_fraction, None)
        return report
    report_file = out_dir / report_name(settings.name)
    write_json_atomically(report_file, report, indent=1)
    _check_budget(report, settings.max_bad_fraction, report_file)

    order = permuted(np.arange(len(clips), dtype=np.int64), settings.seed)
    shards = write_shards([clips[i] for i in order], heads, out_dir, settings)
    entries = build_index(shards, workers=settings.workers)
    # Read again: another pack may have come into the folder meanwhile.
    manifest = _manifest_to_extend(out_dir, heads, settings.name, overwrite=True)
    manifest["packs"][settings.name] = {
        "shards": [path.name for path in shards],
        **_counts(clips, heads, settings.column_of_splits),
        "source": source.name,
        "format": chosen,
        **_provenance(settings),
        "clips": report["clips"],
    }
    manifest["samples"] = sum(each["samples"] for each in manifest["packs"].values())
    write_json_atomically(out_dir / MANIFEST_NAME, manifest, indent=1)
    shutil.rmtree(work, ignore_errors=True)
    others = {name: [out_dir / shard for shard in each["shards"]] for name, each in manifest["packs"].items()}
    if shared := shared_with(others, entries, {clip.key: clip.row.name for clip in clips}, settings.name, note):
        report["shared"] = shared
    write_json_atomically(report_file, report, indent=1)
    return report


def _check_names(out_dir: Path, settings: PackSettings) -> None:
    """Raises UsageError where the shards cannot have this name, or cannot lie there."""
    name = settings.name
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UsageError(f"shards cannot be called {name!r}-000000.tar: give --prefix of letters, digits and . + - _")
    if out_dir.exists() and not out_dir.is_dir():
        raise UsageError(f"{out_dir} is a file: give a folder for the shards")


def _provenance(settings: PackSettings) -> dict[str, Any]:
    """What made the shards, for the manifest."""
    decoders = [choose_decoder(reading.decoder).version for reading in settings.readings]
    return {
        "program": f"sfa_dist {__version__}",
        "decoder": ", ".join(dict.fromkeys(decoders)),
        "fps": [reading.rate for reading in settings.readings],
        "options": {key: getattr(settings, key) for key in ("seed", "shard_size", "shard_bytes", "min_frames")},
        "encoding": asdict(settings.encoding) if settings.encoding else None,
    }


def report_name(prefix: str) -> str:
    """The name of a pack's report: report-train.json, report-val.json, or report.json for the pack named "shard"."""
    return "report.json" if prefix == NO_PREFIX else f"report-{prefix}.json"


def _counts(clips: Sequence[Clip], heads: Heads, split_column: str) -> dict[str, Any]:
    """Clips in all, by class (by head where there are several) and by split."""
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
    """The folder's manifest without this pack; a folder may hold several packs (train, val) of the same classes.

    Its `classes` is the list of class names, or null where there are several heads, whose lists are under `heads`.
    Raises DataError where the pack's shards exist and must not be overwritten, where the manifest cannot be read, and
    where it has other classes.
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
            raise DataError(f"{path} is not a manifest of this program ({error!r}): give another folder") from error
        manifest["packs"] = {name: each for name, each in packs.items() if name != prefix}
        if manifest["packs"] and old_names != names:
            raise DataError(f"{path} has other classes: use the same --classes for all packs of one folder")
    out_dir.mkdir(parents=True, exist_ok=True)
    return manifest


def _check_budget(report: dict[str, Any], max_bad_fraction: float, file: Path | None) -> None:
    """Raises DataError with the report where too many clips are bad; `file` holds it (None: nothing is written)."""
    if report["packed"] and report["bad_fraction"] <= max_bad_fraction:
        return
    counts = ", ".join(f"{len(report[problem])} {problem}" for problem in PROBLEMS if report[problem])
    first = next(entry for problem in PROBLEMS for entry in report[problem])
    rest = f"All are in {file}; nothing was packed" if file else "--json prints them all"
    error = DataError(
        f"{counts} of {report['listed']} clips, more than --max-bad-fraction {max_bad_fraction} allows; first: "
        f"{first['path']} ({first['where']}): {first['reason']}. {rest}"
    )
    error.report = report
    raise error
