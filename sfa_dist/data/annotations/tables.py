"""Data of one's own: a csv with a path and a label in each row, or a folder with one sub-folder a class."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from sfa_dist.data.annotations.rows import PACKABLE, SINGLE, ClipRow, suffix_of
from sfa_dist.errors import DataError

HEADS = ((SINGLE,), ("verb", "noun"))


def rows_of_csv(source: Path, root: Path | None) -> list[ClipRow]:
    """Rows of a csv whose header has `path` and either `label` or `verb` and `noun`; other columns are kept.

    Relative paths are relative to `root`, or to the csv itself. Raises DataError, with the line, for what cannot be
    understood.
    """
    columns = columns_of(source)
    heads = next((heads for heads in HEADS if {"path", *heads} <= set(columns)), None)
    if heads is None:
        raise DataError(
            f"{source}, line 1: the header needs the columns path and label (or path, verb and noun), it has {columns}"
        )
    rows = []
    for where, record in records_of(source):
        path = record.pop("path")
        labels = {head: record.pop(head) for head in heads}
        if not path or not all(labels.values()):
            raise DataError(f"{where}: {' and '.join(('path', *heads))} must not be empty")
        rows.append(ClipRow((root or source.parent) / path, path, labels, where, record))
    return rows


def rows_of_folder(source: Path) -> list[ClipRow]:
    """One row for each video or picture in the sub-folders of `source`, whose names are the labels."""
    if not source.is_dir():
        raise DataError(f"{source} is no folder of class folders: give one, or another --format")
    rows = []
    for folder in sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith(".") and suffix_of(path) in PACKABLE:
                rows.append(ClipRow(path, str(path.relative_to(source)), {SINGLE: folder.name}, str(path)))
    if not rows:
        raise DataError(f"{source} has no sub-folder with clips: give a csv, or one sub-folder a class ({PACKABLE})")
    return rows


def columns_of(source: Path) -> list[str]:
    """The first line of a csv, its header where it has one."""
    return next((fields for _, fields in fields_of(source)), [])


def require_columns(source: Path, wanted: Iterable[str], what: str) -> None:
    """Raises DataError where the header of a csv lacks one of the columns."""
    columns = columns_of(source)
    missing = sorted(set(wanted) - set(columns))
    if missing:
        raise DataError(f"{source}, line 1: a {what} has the columns {', '.join(missing)} too, this one has {columns}")


def records_of(source: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, {column: stripped value}) of each row of a csv with a header. Raises DataError for a row with more or
    fewer fields, and where there is none."""
    columns: list[str] = []
    count = 0
    for where, fields in fields_of(source):
        if not columns:
            columns = fields
            if repeated := sorted({name for name in columns if columns.count(name) > 1}):
                raise DataError(f"{where}: the column {repeated[0]!r} is there twice: remove one of them")
            continue
        if len(fields) != len(columns):
            raise DataError(f"{where}: not {len(columns)} fields as the header has: quote fields with commas")
        count += 1
        yield where, dict(zip(columns, fields, strict=True))
    if count == 0:
        raise DataError(f"{source} has no rows below its header")


def fields_of(source: Path) -> Iterator[tuple[str, list[str]]]:
    """(place, stripped fields) of each line of a csv that is not empty. Raises DataError where it cannot be read."""
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True)
            for fields in reader:
                if fields:
                    yield f"{source.name} line {reader.line_num}", [field.strip() for field in fields]
    except OSError as error:
        raise DataError(
            f"{source} cannot be read ({error}): give a csv or a folder with one sub-folder a class"
        ) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"{source} is not a csv in UTF-8 ({error}): save it as one, with the header path,label"
        ) from error
