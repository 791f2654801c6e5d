"""Reads lists of clips to pack: official lists of data sets, the user's own tables, and folders of class folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sfa_dist.data.packing.annotations import activitynet, epic, hmdb, kinetics, moments, something, ucf
from sfa_dist.data.packing.annotations.class_folders import rows_of_folder
from sfa_dist.data.packing.annotations.rows import ClipRow, Say, VideoFiles, some
from sfa_dist.data.packing.annotations.tables import rows_of_csv
from sfa_dist.errors import DataError, UsageError

# In the order in which they are tried; a source that matches none is a table with the columns path and label.
OFFICIAL = {
    "hmdb51": hmdb,
    "activitynet": activitynet,
    "something": something,
    "ucf101": ucf,
    "kinetics": kinetics,
    "epic": epic,
    "moments": moments,
}
FORMATS = ("auto", "table", "folder", *OFFICIAL)


def read_rows(
    source: Path, format: str = "auto", videos: Path | None = None, say: Say = lambda line: None
) -> tuple[str, list[ClipRow]]:
    """(format, all clips) of an annotation file or a folder of class folders.

    `videos` is the folder that holds the files; the paths of a table are relative to it, or to the table's folder.
    Whether the files exist is not checked here. say(line) is called for whatever is left out, guessed or read
    differently from how it is written.

    Raises DataError, with the line, for a source that cannot be understood, and UsageError for an official list
    without `videos`.
    """
    chosen = _sniff(source) if format == "auto" else format
    if chosen == "folder":
        return chosen, rows_of_folder(source, say)
    if chosen == "table":
        return chosen, rows_of_csv(source, videos, say)
    if videos is None:
        own = " (a list of your own is a csv with the header path,label)" if chosen in ("moments", "something") else ""
        raise UsageError(f"{source} has the form of {chosen}{own}: give the folder of the videos, --videos DIR")
    if not videos.is_dir():
        raise DataError(f"--videos {videos}: no such folder, correct its path")
    rows = OFFICIAL[chosen].read(source, VideoFiles(videos), say)
    if unnamed := [row.where for row in rows if not all(row.labels.values())]:
        raise DataError(f"{unnamed[0]}: a clip without a label ({len(unnamed)} in all): correct the list")
    return chosen, rows


def _sniff(source: Path) -> str:
    """Detects the format of a source. Raises DataError for one that cannot be read."""
    if source.is_dir():
        return "hmdb51" if hmdb.matches(source) else "folder"
    return next((name for name, module in OFFICIAL.items() if module.matches(source)), "table")


def select_split(
    rows: Sequence[ClipRow], column: str | None, split: str | None, say: Say = lambda line: None
) -> list[ClipRow]:
    """The rows whose `column` (None: "split") is `split`; all rows where `split` is None.

    Raises DataError where no row is left, or where no row has the column.
    """
    columns = sorted({name for row in rows for name in row.extra})
    if column is not None and column not in columns:
        raise DataError(f"--split-column {column}: no row has such a column (they have: {some(columns)})")
    if split is not None and (column or "split") not in columns:
        advice = f"give --split-column, one of {some(columns, 10)}" if columns else "leave --split out"
        raise DataError(f"--split {split}: no row has a column split: {advice}")
    if split is None:
        by_split = Counter(row.extra["split"] for row in rows if "split" in row.extra)
        if len(by_split) > 1:
            each = ", ".join(f"{count} of {name!r}" for name, count in by_split.most_common(5))
            say(f"all splits are packed together ({each}): --split NAME packs one of them")
        return list(rows)
    column = column or "split"
    chosen = [row for row in rows if row.extra.get(column) == split]
    if not chosen:
        values = sorted({row.extra[column] for row in rows if column in row.extra})
        advice = f"correct --split, or --split-column, one of {some(columns, 10)}"
        raise DataError(f"no row has {column} = {split!r} (its values are: {some(values, 10)}): {advice}")
    if others := Counter(row.extra.get(column, "") for row in rows if row.extra.get(column) != split):
        counts = ", ".join(f"{count} of {name!r}" for name, count in others.most_common(5))
        say(f"rows of other splits, left out: {others.total()} of {len(rows)} ({counts})")
    return chosen
