"""Reads class lists, names in label order, in all the forms in which people keep them."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfa_dist.data.packing.annotations.rows import Say, some
from sfa_dist.data.packing.annotations.tables import text_of
from sfa_dist.errors import DataError

FORMS = (
    "one name a line; lines of a number and a name; or JSON of names, {name: number}, {number: name} or [{id, name}]"
)
_NUMBER_WORDS = frozenset({"id", "index", "number", "no", "class_id", "classid", "label_id", "class_number", "idx"})
_NAME_WORDS = frozenset(
    {"name", "names", "class", "classes", "label", "labels", "class_name", "label_name", "category"}
)
# Unsupported forms of numbers, and lines of other kinds of files: read as names, they would shift the classes.
_OTHER_NUMBERED = re.compile(r"[-+]?\d+(\.\d*)?\s{0,9}[:;|.,)=\t]\s{0,9}\D.*|\D.*[:;|,=]\s*[-+]?\d+(\.\d*)?")
_NAME_THEN_NUMBER = re.compile(r"\D.*\s(\d{1,17})")
_OTHER_FILE = re.compile(r"#\s.*|\[.*\]|[\w-]+:|---")
Named = tuple[list[str], int]  # names in label order, and the number of the first


class _WrongListError(ValueError):
    """Describes what is wrong with a class list."""


def read_class_list(file: Path, say: Say = lambda line: None) -> list[str]:
    """The names of a class list in label order; see `read_numbered`."""
    return read_numbered(file, say)[0]


def read_numbered(file: Path, say: Say = lambda line: None) -> tuple[list[str], int]:
    """(names in label order, the number of the first) of a class list.

    Its form is one of: one name a line; lines of `name,number` (Moments in Time), `number,name` or `number name`
    (UCF101), from 0 or 1 on; a JSON list of names or of {id, name}; a JSON object of {name: number}
    (Something-Something) or {number: name}; the manifest.json of another pack. A heading such as `id,name` is not a
    class. Raises DataError for anything else.
    """
    try:
        names, first = _names(text_of(file), file.suffix.lower() == ".json", say)
        _check(names)
    except _WrongListError as error:
        raise DataError(f"class list {file}: {error}. Accepted: {FORMS}") from error
    return names, first


def is_number(label: str) -> bool:
    """Whether a label is a class number: digits alone."""
    return label.isascii() and label.isdigit() and len(label) < 18


def _names(text: str, is_json: bool, say: Say) -> Named:
    if is_json or text.lstrip()[:1] in ("{", "["):
        try:
            return _names_of_json(json.loads(text, object_pairs_hook=_object))
        except _WrongListError:
            raise
        except (ValueError, RecursionError) as error:
            if is_json or text.lstrip().startswith("{"):
                raise _WrongListError(f"it cannot be read as JSON ({error})") from error
    return _names_of_lines(text, say)


def _check(names: Sequence[str]) -> None:
    if not names:
        raise _WrongListError("it is empty")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise _WrongListError(f"it repeats {some(map(repr, repeated))}")
    if odd := [name for name in names if not name.strip() or not name.isprintable()]:
        raise _WrongListError(f"{some(map(repr, odd))} is not a printable name")


def _names_of_lines(text: str, say: Say) -> Named:
    lines = [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []
    blank = next((number for number, line in enumerate(lines, 1) if not line), None)
    for separator in (",", "\t", ";", " "):
        numbers = _numbered([line for line in lines if line], separator, say)
        if numbers is not None:
            return _ordered(numbers)
    if blank is not None:
        raise _WrongListError(f"line {blank} is empty, so the numbers of the lines below are ambiguous: remove it")
    if lines and lines[0].lower() in _NAME_WORDS | _NUMBER_WORDS and len(lines) > 1:
        say(f"{lines[0]!r} above the class list is read as a heading, not as a class")
        lines = lines[1:]
    _check_plain(lines)
    if lines and (columns := _fields(lines[0], "\t")) and len(columns) > 1:
        raise _WrongListError(f"line 1 has {len(columns)} columns")
    return lines, 0


def _check_plain(lines: Sequence[str]) -> None:
    """Raises _WrongListError where the lines are not plain names, one each."""
    trailing = [match[1] for match in map(_NAME_THEN_NUMBER.fullmatch, lines) if match]
    counted = len(trailing) == len(lines) > 1 and sorted(map(int, trailing)) in _counts(len(lines))
    if lines and (counted or all(map(_OTHER_NUMBERED.fullmatch, lines))):
        raise _WrongListError(
            f"line 1 {lines[0]!r:.60} has a number in an unsupported form: write 0,name or a name alone"
        )
    if lines and (_OTHER_FILE.fullmatch(lines[0]) or all(line.startswith("- ") for line in lines)):
        raise _WrongListError(f"line 1 {lines[0]!r:.60} is of another kind of file, not a class name")


def _numbered(lines: Sequence[str], separator: str, say: Say) -> list[tuple[int, str]] | None:
    """(number, name) of each line, or None where the lines are not a number and a name each.

    The number comes first or last, and before a space only first; a heading above is skipped. Raises _WrongListError
    where most lines are a number and a name, but not all.
    """
    rows = [_fields(line, separator) for line in lines]
    header = len(rows) > 1 and _is_heading(rows[0])
    body = rows[1:] if header else rows
    columns = (0,) if separator == " " else (0, -1)
    counts = [sum(len(row) > 1 and is_number(row[column]) for row in body) for column in columns]
    most = max(counts, default=0)
    if header and most == 0 and separator != " ":
        raise _WrongListError(f"its heading {lines[0]!r} names a column of numbers, and no line has a number")
    if not body or (most < len(body) and (most <= len(body) / 2 or separator == " ")):
        return None
    column = columns[counts.index(most)]
    odd = next((n for n, row in enumerate(body) if len(row) < 2 or not is_number(row[column])), None)
    if odd is not None:
        raise _WrongListError(
            f"line {odd + 1 + header}, {lines[odd + header]!r}, is not a number and a name like the others"
        )
    wide = next((n for n, row in enumerate(body) if len(row) > 2), None)
    if wide is not None:
        raise _WrongListError(f"line {wide + 1 + header} has {len(body[wide])} columns: keep only a number and a name")
    if separator == " " and sorted(int(row[0]) for row in body) not in _counts(len(body)):
        return None  # names such as `2 hands clap`
    if header:
        say(f"{lines[0]!r} above the class list is read as a heading, not as a class")
    return [(int(row[column]), row[1 if column == 0 else 0]) for row in body]


def _counts(count: int) -> tuple[list[int], list[int]]:
    return list(range(count)), list(range(1, count + 1))


def _fields(line: str, separator: str) -> list[str]:
    if separator == " ":
        return line.split(None, 1)
    try:
        fields = next(csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise _WrongListError(f"{line[:60]!r} has an unclosed quote") from error
    fields = [field.strip() for field in fields]
    if len(fields) > 2 and is_number(fields[-1]) and not is_number(fields[0]):
        return [separator.join(fields[:-1]), fields[-1]]  # a name with commas, before its number
    return fields


def _is_heading(fields: Sequence[str]) -> bool:
    words = [field.lower().replace(" ", "_") for field in fields]
    return len(words) > 1 and bool(_NUMBER_WORDS & set(words)) and not any(is_number(word) for word in words)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _WrongListError("a JSON object has a key twice")
    return found


def _names_of_json(content: Any) -> Named:
    if isinstance(content, dict) and "packs" in content:
        content = content.get("classes")  # a manifest; without classes where a pack has several heads
    if isinstance(content, list):
        if all(isinstance(each, str) for each in content):
            return content, 0
        if all(isinstance(each, dict) for each in content):
            return _ordered([_pair(each) for each in content])
        raise _WrongListError("its JSON list holds neither names alone nor objects of an id and a name")
    if isinstance(content, dict):
        by_number = bool(content) and all(map(is_number, content)) and not any(map(_whole_or_none, content.values()))
        pairs = [(int(key), value) if by_number else (value, key) for key, value in content.items()]
        return _ordered([(_whole(number), _text(name)) for number, name in pairs])
    raise _WrongListError("its JSON is neither a list nor an object of names")


def _pair(entry: dict[str, Any]) -> tuple[int, str]:
    numbers = [key for key in entry if key.lower() in _NUMBER_WORDS]
    names = [key for key in entry if key.lower() in _NAME_WORDS]
    if len(numbers) != 1 or len(names) != 1:
        raise _WrongListError(f"its JSON objects have the keys {some(entry)}, not one id and one name")
    return _whole(entry[numbers[0]]), _text(entry[names[0]])


def _whole_or_none(value: Any) -> str:
    """A class number as text; "" for anything else."""
    return str(value) if type(value) in (int, str) and is_number(str(value)) else ""


def _whole(value: Any) -> int:
    if not _whole_or_none(value):
        raise _WrongListError(f"{value!r:.40} is not a class number")
    return int(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _WrongListError(f"{value!r:.40} is not a name")
    return value.strip()


def _ordered(numbers: Sequence[tuple[int, str]]) -> Named:
    ordered = sorted(numbers)
    if [number for number, _ in ordered] not in _counts(len(ordered)):
        raise _WrongListError(f"its numbers are not 0 to {len(ordered) - 1}, nor 1 to {len(ordered)}, each once")
    return [name for _, name in ordered], ordered[0][0] if ordered else 0
