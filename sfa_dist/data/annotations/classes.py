"""Class lists: which number a label is. One list a head, so that actions of a verb and a noun have two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfa_dist.data.annotations.rows import SINGLE, ClipRow
from sfa_dist.data.annotations.tables import records_of, require_columns
from sfa_dist.disk import parse_json
from sfa_dist.errors import DataError

Heads = dict[str, list[str]]  # Class names in label order, by head.

EPIC_CLASSES = {"verb": 97, "noun": 300}  # The action classes of EPIC-Kitchens-100.
_EPIC_FILES = {
    "verb": ("EPIC_100_verb_classes.csv",),
    "noun": ("EPIC_100_noun_classes_v2.csv", "EPIC_100_noun_classes.csv"),
}
_SOMETHING_FILES = ("labels.json", "something-something-v2-labels.json")
_MAX_CLASSES = 1_000_000


def class_lists(rows: Sequence[ClipRow], source: Path, format: str, file: Path | None) -> Heads:
    """The class list of each head: the lines of `file`, else the list that belongs to the data set and lies beside its
    annotations, else the sorted labels of all rows (of all splits, so that packs of different splits agree). Labels
    that are all whole numbers are class numbers already. Raises DataError."""
    heads = list(rows[0].labels)
    if file is not None:
        if heads != [SINGLE]:
            raise DataError(f"--classes {file}: clips with {' and '.join(heads)} take no single class list")
        return {SINGLE: read_class_list(file)}
    if format == "epic":
        return {head: _epic_names(source.parent, head) for head in heads}
    if format == "something":
        for name in _SOMETHING_FILES:
            if (source.parent / name).is_file():
                return {SINGLE: read_class_list(source.parent / name)}
    return {head: _names_of({row.labels[head] for row in rows}) for head in heads}


def class_numbers(rows: Sequence[ClipRow], heads: Heads) -> list[dict[str, int]]:
    """The class numbers of each row, by head: the place of its label in the list, or the label itself if that is a
    number. Raises DataError naming the first rows whose label is neither."""
    places = {head: {name: number for number, name in enumerate(names)} for head, names in heads.items()}
    numbers = []
    strangers = []
    for row in rows:
        own = {head: _number(label, places[head]) for head, label in row.labels.items()}
        numbers.append(own)
        strangers += [f"{row.labels[head]!r} ({row.where})" for head, n in own.items() if not 0 <= n < len(heads[head])]
    if strangers:
        sizes = ", ".join(f"{len(names)} {head} classes" for head, names in heads.items()).replace(
            "label classes", "classes"
        )
        raise DataError(
            f"{len(strangers)} rows have a label outside the {sizes}: {', '.join(strangers[:5])}. "
            "Correct the labels or give the class list with --classes"
        )
    return numbers


def read_class_list(file: Path) -> list[str]:
    """Names in label order from one of: one name a line; `name,number` lines (Moments in Time); a JSON object of
    {name: number} or a list (Something-Something); the manifest.json of another pack. Raises DataError."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        names = _names_of_json(parse_json(text.encode())) if file.suffix == ".json" else _names_of_lines(text)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"class list {file} cannot be read ({error}): one name a line, in UTF-8") from error
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated or not names:
        raise DataError(f"class list {file} {f'repeats {repeated[:5]}' if repeated else 'is empty'}: one name a line")
    return names


def _names_of_lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pairs = [line.rsplit(",", 1) for line in lines]
    if all(len(pair) == 2 and _is_number(pair[1].strip()) for pair in pairs):
        return _ordered({name.strip(): int(number) for name, number in pairs})
    return lines


def _names_of_json(content: object) -> list[str]:
    if isinstance(content, dict) and "packs" in content:
        content = content.get("classes")  # a manifest, of a pack with several heads without
    if isinstance(content, list):
        return [str(name) for name in content]
    if isinstance(content, dict):
        return _ordered({str(name): int(number) for name, number in content.items()})
    raise ValueError("neither a list nor an object")


def _ordered(numbers: dict[str, int]) -> list[str]:
    names = sorted(numbers, key=lambda name: numbers[name])
    if [numbers[name] for name in names] != list(range(len(names))):
        raise ValueError(f"its numbers are not 0 to {len(names) - 1}")
    return names


def _epic_names(folder: Path, head: str) -> list[str]:
    """From the official list beside the annotations (`id,key,...`), else the numbers."""
    names = [str(number) for number in range(EPIC_CLASSES[head])]
    for file in (folder / name for name in _EPIC_FILES[head]):
        if file.is_file():
            require_columns(file, ("id", "key"), "list of classes")
            found = {record["id"]: record["key"] for _, record in records_of(file)}
            return [found.get(name) or name for name in names]
    return names


def _names_of(labels: set[str]) -> list[str]:
    if not all(_is_number(label) for label in labels):
        return sorted(labels)
    largest = max(int(label) for label in labels)
    if largest >= _MAX_CLASSES:
        raise DataError(f"label {largest} is too large for a class number: labels count from 0")
    return [str(number) for number in range(largest + 1)]


def _number(label: str, places: dict[str, int]) -> int:
    return places.get(label, int(label) if _is_number(label) else -1)


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit() and len(label) < 18
