"""What is to be packed, from the lists that the owners of data sets hand out or from a table of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfa_dist.data.annotations import epic, kinetics, moments, something
from sfa_dist.data.annotations.rows import ClipRow, VideoFiles
from sfa_dist.data.annotations.tables import rows_of_csv, rows_of_folder
from sfa_dist.errors import DataError, UsageError

# In the order in which they are tried; a csv that is none of them has the columns path and label.
OFFICIAL = {"something": something, "kinetics": kinetics, "epic": epic, "moments": moments}
FORMATS = ("auto", "table", "folder", *OFFICIAL)


def read_rows(source: Path, format: str = "auto", videos: Path | None = None) -> tuple[str, list[ClipRow]]:
    """(format, all clips) of an annotation file or a folder of class folders.

    `videos` is the folder below which the files lie; a table's paths start there, or at the table. Whether the files
    exist is not looked at here. Raises DataError for a source that cannot be understood, with the line, UsageError
    where an official list comes without `videos`.
    """
    chosen = _sniff(source) if format == "auto" else format
    if chosen == "folder":
        return chosen, rows_of_folder(source)
    if chosen == "table":
        return chosen, rows_of_csv(source, videos)
    if videos is None:
        own = " (a list of your own begins with the header path,label)" if chosen == "moments" else ""
        raise UsageError(f"{source} has the form of {chosen}{own}: say where the videos are, --videos DIR")
    if not videos.is_dir():
        raise DataError(f"--videos {videos}: no such folder")
    return chosen, OFFICIAL[chosen].read(source, VideoFiles(videos))


def _sniff(source: Path) -> str:
    if source.is_dir():
        return "folder"
    return next((name for name, module in OFFICIAL.items() if module.matches(source)), "table")


def select_split(rows: Sequence[ClipRow], column: str | None, split: str | None) -> list[ClipRow]:
    """The rows whose `column` is `split`; all of them without a split. Raises DataError where that leaves none, or
    where there is no such column."""
    if column is not None and not any(column in row.extra for row in rows):
        columns = sorted({name for row in rows for name in row.extra})
        raise DataError(f"--split-column {column}: no row has such a column (they have {columns})")
    if split is None:
        return list(rows)
    column = column or "split"
    chosen = [row for row in rows if row.extra.get(column) == split]
    if not chosen:
        values = sorted({row.extra[column] for row in rows if column in row.extra})[:10]
        raise DataError(f"no row has {column} = {split!r} (its values are {values}): correct --split or --split-column")
    return chosen
