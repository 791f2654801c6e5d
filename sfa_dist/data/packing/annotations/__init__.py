"""What is to be packed, from the lists that the owners of data sets hand out or from a table of one's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sfa_dist.data.packing.annotations import activitynet, epic, hmdb, kinetics, moments, something, ucf
from sfa_dist.data.packing.annotations.class_folders import rows_of_folder
from sfa_dist.data.packing.annotations.rows import ClipRow, Say, VideoFiles, some
from sfa_dist.data.packing.annotations.tables import rows_of_csv
from sfa_dist.errors import DataError, UsageError

# In the order in which they are tried; a csv that is none of them has the columns path and label.
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

    `videos` is the folder below which the files lie; a table's paths start there, or at the table. Whether the files
    exist is not looked at here. What is left out, or read in another way than it stands, is told to `say`.

    Raises DataError for a source that cannot be understood, with the line, UsageError where an official list comes
    without `videos`.
    """
    chosen = _sniff(source) if format == "auto" else format
    if chosen == "folder":
        return chosen, rows_of_folder(source, say)
    if chosen == "table":
        return chosen, rows_of_csv(source, videos, say)
    if videos is None:
        own = " (a list of your own is a csv with the header path,label)" if chosen in ("moments", "something") else ""
        raise UsageError(f"{source} has the form of {chosen}{own}: say where the videos are, --videos DIR")
    if not videos.is_dir():
        raise DataError(f"--videos {videos}: no such folder")
    rows = OFFICIAL[chosen].read(source, VideoFiles(videos), say)
    if unnamed := [row.where for row in rows if not all(row.labels.values())]:
        raise DataError(f"{unnamed[0]}: a clip without a label ({len(unnamed)} in all): correct the list")
    return chosen, rows


def _sniff(source: Path) -> str:
    """The format by its form. Raises DataError for a source that cannot be read."""
    if source.is_dir():
        return "hmdb51" if hmdb.matches(source) else "folder"
    return next((name for name, module in OFFICIAL.items() if module.matches(source)), "table")


def select_split(
    rows: Sequence[ClipRow], column: str | None, split: str | None, say: Say = lambda line: None
) -> list[ClipRow]:
    """The rows whose `column` is `split`; all of them without a split. Raises DataError where that leaves none, or
    where there is no such column."""
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
