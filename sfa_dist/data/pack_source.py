"""What is to be packed: rows from a csv or from a folder with one sub-folder per class, and the list of classes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sfa_dist.data.shard_walk import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from sfa_dist.errors import DataError

PACKABLE = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
_MAX_CLASSES = 1_000_000
_ALIASES = {"jpeg": "jpg"}


@dataclass(frozen=True)
class ClipRow:
    """One clip to pack. `name` is its path as the source gives it, `where` the place in the source for messages."""

    path: Path
    name: str
    label: str
    where: str
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        """Of the file, in lower case and without the dot."""
        suffix = self.path.suffix.lower().removeprefix(".")
        return _ALIASES.get(suffix, suffix)


def read_rows(source: Path, root: Path | None = None) -> list[ClipRow]:
    """All rows of a csv (header with `path` and `label`; other columns are kept) or of a folder of class folders.

    Relative paths of a csv are relative to `root`, or to the csv itself. Raises DataError, with the line, for a source
    that cannot be understood; whether the files exist is not looked at here.
    """
    if source.is_dir():
        return _rows_of_folder(source)
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            return _rows_of_csv(source, csv.DictReader(file, skipinitialspace=True), root or source.parent)
    except OSError as error:
        raise DataError(
            f"{source} cannot be read ({error}): give a csv or a folder with one sub-folder a class"
        ) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"{source} is not a csv in UTF-8 ({error}): save it as one, with the header path,label"
        ) from error


def select_split(rows: Sequence[ClipRow], column: str | None, split: str | None) -> list[ClipRow]:
    """The rows whose `column` is `split`; all of them without a split. Raises DataError where that leaves none."""
    if split is None:
        return list(rows)
    column = column or "split"
    chosen = [row for row in rows if row.extra.get(column) == split]
    if not chosen:
        values = sorted({row.extra[column] for row in rows if column in row.extra})[:10]
        raise DataError(f"no row has {column} = {split!r} (its values are {values}): correct --split or --split-column")
    return chosen


def class_list(rows: Sequence[ClipRow], file: Path | None) -> list[str]:
    """Class names in label order: the lines of `file`, or else the sorted labels of all rows (of all splits, so that
    packs of different splits agree). Labels that are all whole numbers are class numbers already."""
    if file is not None:
        return _classes_of_file(file)
    labels = {row.label for row in rows}
    if not all(_is_number(label) for label in labels):
        return sorted(labels)
    largest = max(int(label) for label in labels)
    if largest >= _MAX_CLASSES:
        raise DataError(f"label {largest} is too large for a class number: labels count from 0")
    return [str(number) for number in range(largest + 1)]


def class_numbers(rows: Sequence[ClipRow], classes: Sequence[str]) -> list[int]:
    """The class number of each row: the place of its label in the list, or the label itself if that is a number.
    Raises DataError naming the first rows whose label is neither."""
    place = {name: number for number, name in enumerate(classes)}
    numbers = []
    strangers = []
    for row in rows:
        number = place.get(row.label, int(row.label) if _is_number(row.label) else -1)
        numbers.append(number)
        if not 0 <= number < len(classes):
            strangers.append(f"{row.label!r} ({row.where})")
    if strangers:
        raise DataError(
            f"{len(strangers)} rows have a label outside the {len(classes)} classes: {', '.join(strangers[:5])}. "
            "Correct the labels or give the class list with --classes"
        )
    return numbers


def _rows_of_csv(source: Path, reader: csv.DictReader[str], root: Path) -> list[ClipRow]:
    columns = list(reader.fieldnames or [])
    if not {"path", "label"} <= set(columns):
        raise DataError(f"{source}, line 1: the header needs the columns path and label, it has {columns}")
    rows = []
    for record in reader:
        where = f"{source.name} line {reader.line_num}"
        if None in record or None in record.values():
            raise DataError(f"{where}: not {len(columns)} fields as the header has: quote fields with commas")
        path, label = record.pop("path").strip(), record.pop("label").strip()
        if not path or not label:
            raise DataError(f"{where}: path and label must not be empty")
        rows.append(ClipRow(root / path, path, label, where, record))
    if not rows:
        raise DataError(f"{source} has no rows below its header")
    return rows


def _rows_of_folder(source: Path) -> list[ClipRow]:
    rows = []
    for folder in sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for path in sorted(folder.rglob("*")):
            row = ClipRow(path, str(path.relative_to(source)), folder.name, str(path))
            if path.is_file() and not path.name.startswith(".") and row.suffix in PACKABLE:
                rows.append(row)
    if not rows:
        raise DataError(f"{source} has no sub-folder with clips: give a csv, or one sub-folder a class ({PACKABLE})")
    return rows


def _classes_of_file(file: Path) -> list[str]:
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class list {file} cannot be read ({error}): one name a line, in UTF-8") from error
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated or not names:
        raise DataError(f"class list {file} {f'repeats {repeated[:5]}' if repeated else 'is empty'}: one name a line")
    return names


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit() and len(label) < 18
