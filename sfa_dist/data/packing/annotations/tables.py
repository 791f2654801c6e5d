"""Reads the user's own table, with a path and a label in each line."""

from __future__ import annotations

import csv
import io
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from sfa_dist.data.packing.annotations.rows import SINGLE, ClipRow, Say, some
from sfa_dist.data.video.file_kinds import FRAME_SUFFIXES, suffix_of
from sfa_dist.errors import DataError

HEADS = ((SINGLE,), ("verb", "noun"))
OWN_FACTS = frozenset({"duration", "fps", "frames", "label_name", "verb_name", "noun_name"})  # written for each clip
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons"}
MAX_BYTES = 1 << 30
_NOT_TEXT = (
    (b"PK\x03\x04", "an Excel workbook or another zip file"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook"),
    (b"PAR1", "a Parquet file"),
    (b"\x1f\x8b", "compressed by gzip"),
    (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"),
    (b"\x80\x04", "a Python pickle"),
)
_SPACED = re.compile(r"(\S.*?\.\w+)\s+(\S+)\s*")  # `a video.mp4 3`: the label is one word
_ADVICE = "save it as a csv in UTF-8, with the header path,label"

Line = tuple[str, list[str]]  # its position, for messages, and its fields


def rows_of_csv(source: Path, root: Path | None, say: Say) -> list[ClipRow]:
    """The rows of a table whose header has `path` and either `label` or `verb` and `noun`; other columns are kept.

    Without a header, rows of two columns are a path and a label. Columns are separated by commas, tabs or semicolons,
    two columns also by spaces. Relative paths are relative to `root`, or to the folder of the table. Raises DataError,
    with the line, for a table that cannot be understood.
    """
    heads, records = _records(source, say)
    rows = [_row(where, record, heads, root or source.parent) for where, record in records]
    if first_line(source)[:1] in tuple(SEPARATORS):
        say(f"the first column of {source.name} has no name and is left out")
    replaced = sorted(OWN_FACTS & {name for row in rows[:1] for name in row.extra})
    if replaced:
        say(f"columns replaced by the values of the files and classes: {some(replaced)}")
    return rows


def _records(source: Path, say: Say) -> tuple[tuple[str, ...], Iterator[tuple[str, dict[str, str]]]]:
    """(heads, records), each record with a path and a label for each head."""
    first = first_line(source)
    separator = _separator(first)
    if separator is None:
        if _SPACED.fullmatch(first) is None and first.split() != ["path", SINGLE]:
            raise _no_columns(source, columns_of(source))
        return (SINGLE,), _spaced_records(source, say)
    columns = columns_of(source, separator)
    if separator != ",":
        say(f"the columns of {source.name} are separated by {SEPARATORS[separator]}")
    if heads := next((heads for heads in HEADS if {"path", *heads} <= set(columns)), None):
        return heads, records_of(source, separator)
    if len(columns) != 2 or not _is_video(columns[0]):
        raise _no_columns(source, columns)
    say(f"{source.name} has no header: its columns are read as path and label")
    return (SINGLE,), _without_header(source, separator)


def _no_columns(source: Path, columns: list[str]) -> DataError:
    if columns and _is_video(columns[0]):
        what = f"its first line has {len(columns)} columns and is not a header"
        return DataError(f"{source}, line 1: {what}: add one that names the columns path and label")
    return DataError(
        f"{source}, line 1: the header needs the columns path and label (or path, verb and noun), it has: "
        f"{some((repr(name) for name in columns), 12)}"
    )


def _row(where: str, record: dict[str, str], heads: tuple[str, ...], root: Path) -> ClipRow:
    path = record.pop("path")
    labels = {head: record.pop(head) for head in heads}
    if not path or not all(labels.values()):
        raise DataError(f"{where}: {' and '.join(('path', *heads))} must not be empty")
    if any(character < " " for character in path):
        raise DataError(f"{where}: the path {path!r} has invisible characters: rename the file")
    record.pop("", None)  # the unnamed column that some programs write
    return ClipRow(root / path, path, labels, where, record)


def _separator(first: str) -> str | None:
    """The separator of the columns in the first line; None for spaces or a single column."""
    return next((separator for separator in SEPARATORS if len(_split(first, separator)) > 1), None)


def _split(line: str, separator: str) -> list[str]:
    return [field.strip() for field in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])]


def _is_video(name: str) -> bool:
    return suffix_of(Path(name)) in FRAME_SUFFIXES


def _without_header(source: Path, separator: str) -> Iterator[tuple[str, dict[str, str]]]:
    for where, fields in fields_of(source, separator):
        if len(fields) != 2:
            raise DataError(f"{where}: not 2 columns as in the first line: quote fields that contain a separator")
        yield where, {"path": fields[0], SINGLE: fields[1]}


def _spaced_records(source: Path, say: Say) -> Iterator[tuple[str, dict[str, str]]]:
    """The records of lines of `path label`, with or without these words above."""
    say(f"{source.name} has lines of a path and a label, separated by spaces")
    for number, line in enumerate(text_of(source).splitlines(), 1):
        where = f"{source.name} line {number}"
        if not line.strip() or (number == 1 and line.split() == ["path", "label"]):
            continue
        match = _SPACED.fullmatch(line.strip())
        if match is None or not _is_video(match[1]):
            advice = "write a csv with the header path,label if names have spaces or there are more columns"
            raise DataError(f"{where}: {line[:80]!r} is not a video and a label of one word: {advice}")
        yield where, {"path": match[1], SINGLE: match[2]}


def columns_of(source: Path, separator: str = ",") -> list[str]:
    """The fields of the first line of a csv, which is its header if it has one."""
    return next((fields for _, fields in fields_of(source, separator)), [])


def require_columns(source: Path, wanted: Iterable[str], what: str) -> None:
    """Raises DataError where the header of a csv lacks one of the columns."""
    columns = columns_of(source)
    missing = sorted(set(wanted) - set(columns))
    if missing:
        has = some((repr(name) for name in columns), 12)
        raise DataError(f"{source}, line 1: a {what} needs the columns {', '.join(missing)} too, this one has: {has}")


def records_of(source: Path, separator: str = ",") -> Iterator[tuple[str, dict[str, str]]]:
    """(position, {column: stripped value}) of each row of a csv with a header.

    Raises DataError for a row with more or fewer fields than the header, and where there is no row.
    """
    columns: list[str] = []
    count = 0
    for where, fields in fields_of(source, separator):
        if not columns:
            columns = fields
            if repeated := sorted({name for name in columns if columns.count(name) > 1}):
                raise DataError(f"{where}: the column {repeated[0]!r} appears twice: remove one of them")
            continue
        if len(fields) != len(columns):
            what = f"{len(fields)} fields, and the header has {len(columns)}"
            raise DataError(f"{where}: {what}: quote fields that contain a separator")
        count += 1
        yield where, dict(zip(columns, fields, strict=True))
    if count == 0:
        raise DataError(f"{source} has no rows below its header")


def fields_of(source: Path, separator: str = ",") -> Iterator[Line]:
    """(position, stripped fields) of each non-empty line of a csv.

    Each line is a row: a quote left open at the end of its line would swallow the lines below. Raises DataError where
    the file cannot be read.
    """
    before = 0
    reader = csv.reader(_lines(source), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        for fields in reader:
            if reader.line_num != before + 1:
                raise _unclosed(source, before + 1)
            before = reader.line_num
            if fields:
                yield f"{source.name} line {reader.line_num}", [field.strip() for field in fields]
    except csv.Error as error:
        if reader.line_num != before + 1 or "unexpected end" in str(error):
            raise _unclosed(source, before + 1) from error
        raise DataError(
            f"{source.name} line {reader.line_num}: not a row of a csv ({error}): double the quotes in a quoted field"
        ) from error


def _unclosed(source: Path, line: int) -> DataError:
    return DataError(
        f"{source.name} line {line}: a quoted field does not end in its line, and would swallow the lines below: close "
        "the quote, or leave it out"
    )


def first_line(source: Path) -> str:
    """The first non-empty line, unchanged; "" where there is none."""
    return next((line.strip("\r\n") for line in _lines(source) if line.strip()), "")


def _lines(source: Path) -> Iterator[str]:
    text = text_of(source)
    if text.lstrip()[:1] in ("{", "["):
        raise DataError(f"{source} is JSON, or lines of JSON, of no known data set: {_ADVICE}")
    return iter(io.StringIO(text, newline=""))


def text_of(source: Path) -> str:
    """The text of a list. Raises DataError, naming the kind of file, for anything but text in UTF-8."""
    try:
        state = source.stat()
        if not stat.S_ISREG(state.st_mode):
            raise DataError(f"{source} is not a file: give a csv, or a folder with one sub-folder per class")
        if state.st_size > MAX_BYTES:
            raise DataError(
                f"{source} has {state.st_size} bytes, but lists of clips are limited to {MAX_BYTES}: split it"
            )
        data = source.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{source} cannot be read ({reason}): give a csv or a folder with one sub-folder per class"
        ) from error
    if kind := next((kind for start, kind in _NOT_TEXT if data.startswith(start)), ""):
        raise DataError(f"{source} is {kind}: {_ADVICE}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not text in UTF-8 (byte {error.start}): {_ADVICE}") from error
    if "\0" in text:
        raise DataError(f"{source} line {text.count(chr(10), 0, text.index(chr(0))) + 1}: a NUL byte: {_ADVICE}")
    return text
