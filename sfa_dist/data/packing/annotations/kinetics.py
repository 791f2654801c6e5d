"""Reads the lists of Kinetics-400, 600 and 700: a csv of `label,youtube_id,time_start,time_end,split`."""

from __future__ import annotations

from pathlib import Path

from sfa_dist.data.packing.annotations.rows import SINGLE, ClipRow, Say, VideoFiles
from sfa_dist.data.packing.annotations.tables import columns_of, records_of, require_columns
from sfa_dist.errors import DataError

COLUMNS = frozenset({"youtube_id", "time_start", "time_end"})


def matches(source: Path) -> bool:
    """Whether a file has the header of Kinetics."""
    return set(columns_of(source)) >= COLUMNS


def read(source: Path, videos: VideoFiles, say: Say) -> list[ClipRow]:
    """The clips of an official list; files hold the trimmed clips.

    They are named `<id>_<start>_<end>`, in seconds of six digits, as the usual downloads do, or `<id>`. Raises
    DataError for the test list, which has no labels, and for a row that cannot be understood.
    """
    if "label" not in columns_of(source):
        raise DataError(f"{source}: it has no column label (a test list without labels?): pack train and validation")
    require_columns(source, COLUMNS, "list of Kinetics")
    rows = []
    for where, record in records_of(source):
        label, youtube_id = record.pop("label"), record["youtube_id"]
        start, end = (_seconds(record[column], where) for column in ("time_start", "time_end"))
        path = videos.find([f"{youtube_id}_{start:06d}_{end:06d}", youtube_id], class_name=label)
        rows.append(ClipRow(path, f"{youtube_id}_{start:06d}_{end:06d}", {SINGLE: label}, where, record))
    return rows


def _seconds(text: str, where: str) -> int:
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise DataError(f"{where}: {text[:40]!r} is not a number of seconds") from None
