"""Turns labels into class numbers. Each head has a class list, so that actions of a verb and a noun have two."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from sfa_dist.data.packing.annotations import ucf
from sfa_dist.data.packing.annotations.class_files import is_number, read_class_list, read_numbered
from sfa_dist.data.packing.annotations.rows import SINGLE, ClipRow, Say, plain, some
from sfa_dist.data.packing.annotations.tables import records_of, require_columns
from sfa_dist.errors import DataError

Heads = dict[str, list[str]]  # Class names in label order, by head.

EPIC_CLASSES = {"verb": 97, "noun": 300}  # The action classes of EPIC-Kitchens-100.
_EPIC_FILES = {
    "verb": ("EPIC_100_verb_classes.csv",),
    "noun": ("EPIC_100_noun_classes_v2.csv", "EPIC_100_noun_classes.csv"),
}
_SOMETHING_FILES = ("labels.json", "something-something-v2-labels.json")
_MAX_CLASSES = 1_000_000
_NUMBERLIKE = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_EMPTY_CELLS = frozenset({"nan", "<na>", "null", "#n/a"})  # what programs write for an empty cell


def class_lists(
    rows: Sequence[ClipRow], source: Path, format: str, file: Path | None, say: Say = lambda line: None
) -> Heads:
    """The class list of each head.

    It is read from `file`, else from the data set's own list beside its annotations; else it is the sorted labels of
    all rows (of all splits, so that packs of different splits agree). Labels that are all whole numbers are class
    numbers already. Raises DataError for a list that cannot be used, and for labels that can be read in two ways.
    """
    heads = list(rows[0].labels)
    if file is not None:
        if heads != [SINGLE]:
            raise DataError(f"--classes {file}: leave it out, {' and '.join(heads)} have no single class list")
        return {SINGLE: _given_list(rows, file, say)}
    if format == "epic":
        return {head: _epic_names(source.parent, head) for head in heads}
    beside = {"something": _SOMETHING_FILES, "ucf101": (ucf.CLASSES,)}
    for name in beside.get(format, ()):
        if (source.parent / name).is_file():
            return {SINGLE: read_class_list(source.parent / name, say)}
    return {head: _names_of(rows, head, say) for head in heads}


def class_numbers(
    rows: Sequence[ClipRow], heads: Heads, say: Say = lambda line: None, numbered: bool = False
) -> list[dict[str, int]]:
    """The class numbers of each row, by head.

    A label's number is its position in the class list. It is the label itself where the format says so (`numbered`),
    and where all labels are numbers and none is a name in the list. Raises DataError, with the first rows, for labels
    that are neither.
    """
    readings = {
        head: _as_number if numbered else _reading([row.labels[head] for row in rows], names, say)
        for head, names in heads.items()
    }
    numbers = []
    unknown = []
    for row in rows:
        own = {head: readings[head](label) for head, label in row.labels.items()}
        numbers.append(own)
        unknown += [f"{row.labels[head]!r} ({row.where})" for head, n in own.items() if not 0 <= n < len(heads[head])]
    if unknown:
        kinds = {head: "classes" if head == SINGLE else f"{head} classes" for head in heads}
        sizes = ", ".join(f"{len(names)} {kinds[head]}" for head, names in heads.items())
        raise DataError(
            f"{len(unknown)} rows have a label outside the {sizes}: {some(unknown)}. "
            "Correct the labels or give the class list with --classes"
        )
    return numbers


def _given_list(rows: Sequence[ClipRow], file: Path, say: Say) -> list[str]:
    names, first = read_numbered(file, say)
    labels = {row.labels[SINGLE] for row in rows}
    if first and not labels & set(names) and all(map(is_number, labels)):
        raise DataError(
            f"the numbers of --classes {file} count from {first}, and the labels are numbers too: write the names as "
            "labels, or count both from 0"
        )
    return names


def _reading(labels: Sequence[str], names: Sequence[str], say: Say) -> Callable[[str], int]:
    """How the labels of a head are read: as names, or all as class numbers."""
    numbers = {name: number for number, name in enumerate(names)}
    if any(label in numbers for label in labels) and not all(map(is_number, names)):
        return lambda label: numbers.get(label, -1)
    if all(map(is_number, names)):
        return lambda label: numbers.get(label, numbers.get(str(int(label)), -1) if is_number(label) else -1)
    if labels and all(map(is_number, labels)):
        say(f"the labels are numbers and are read as positions in the class list, from 0 = {names[0]!r} on")
    return _as_number


def _as_number(label: str) -> int:
    return int(label) if is_number(label) else -1


def _epic_names(folder: Path, head: str) -> list[str]:
    """The names in the official list beside the annotations (`id,key,...`), else the numbers as text."""
    names = [str(number) for number in range(EPIC_CLASSES[head])]
    for file in (folder / name for name in _EPIC_FILES[head]):
        if file.is_file():
            require_columns(file, ("id", "key"), "list of classes")
            found = {record["id"]: record["key"] for _, record in records_of(file)}
            return [found.get(name) or name for name in names]
    return names


def _names_of(rows: Sequence[ClipRow], head: str, say: Say) -> list[str]:
    """The class list made of the labels alone. Raises DataError where they can be read in two ways."""
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row.labels[head], row.where)
    _refuse_odd_labels(first)
    if not all(map(is_number, first)):
        _refuse_variants(first)
        return sorted(first)
    if padded := [label for label in first if str(int(label)) != label]:
        say(f"labels such as {padded[0]!r} are read as class numbers: {padded[0]} is {int(padded[0])}")
    largest = max(map(int, first))
    if largest >= _MAX_CLASSES:
        raise DataError(f"label {largest} is too large for a class number: labels count from 0")
    used = set(map(int, first))
    absent = sorted(set(range(largest + 1)) - used)
    if absent == [0]:
        say(
            f"the labels go from 1 to {largest}, and class numbers count from 0: class 0 stays empty, which makes "
            f"{largest + 1} classes. If that is not meant, subtract 1 or write names"
        )
    elif absent:
        say(f"no clip has {len(absent)} of the class numbers 0 to {largest}: {some(absent)}")
    return [str(number) for number in range(largest + 1)]


def _refuse_odd_labels(first: dict[str, str]) -> None:
    """Raises DataError for labels that are unprintable, stand for an empty cell, or are numbers but not class numbers.

    Also where some labels are numbers and some are names. `first` gives the position of each label's first row.
    """
    for label, where in first.items():
        if not label.isprintable():
            raise DataError(f"{where}: the label {label!r} has invisible characters: remove them")
        if label.lower() in _EMPTY_CELLS:
            raise DataError(
                f"{where}: the label {label!r} is what programs write for an empty cell: leave these rows out, or name "
                "the class in a list (--classes)"
            )
        if not is_number(label) and _NUMBERLIKE.fullmatch(unicodedata.normalize("NFKC", label)):
            raise DataError(
                f"{where}: the label {label!r} is a number but not a class number (a whole number from 0 on): leave "
                "out rows without a class, or write names"
            )
    numbers = [label for label in first if is_number(label)]
    names = [label for label in first if not is_number(label)]
    if numbers and names:
        raise DataError(
            f"labels are numbers ({numbers[0]!r}, {first[numbers[0]]}) and names ({names[0]!r}, {first[names[0]]}): "
            "write only one kind, or give the class list with --classes"
        )


def _refuse_variants(first: dict[str, str]) -> None:
    """Raises DataError for labels that differ only in case, separators or the encoding of an accent."""
    groups: dict[str, list[str]] = {}
    for label in first:
        groups.setdefault(plain(unicodedata.normalize("NFKC", label)), []).append(label)
    variants = [group for group in groups.values() if len(group) > 1]
    if variants:
        each = " and ".join(f"{label!a} ({first[label]})" for label in variants[0][:3])
        raise DataError(
            f"classes that are written in several ways: {len(variants)}, such as {each}. Write each in one way, or, if "
            "they are different classes, give the class list with --classes"
        )
