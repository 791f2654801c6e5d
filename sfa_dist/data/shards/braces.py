"""Brace patterns. Their names are counted before they are made: `{0..999999999}` has only 14 characters."""

from __future__ import annotations

import re

from braceexpand import alphabet, braceexpand

MAX_NAMES = 1_000_000
MAX_CHARACTERS = 1 << 28  # of all names together
MAX_DEPTH = 8

_NUMBERS = re.compile(r"(-?\d{1,100})\.\.(-?\d{1,100})(?:\.\.-?(\d{1,100}))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d{1,100}))?")


def expand_braces(pattern: str) -> list[str]:
    """All names that a pattern stands for, in order.

    Raises ValueError for unbalanced braces, and for a pattern that is nested too deeply or stands for too many names.
    """
    names = count_names(pattern)
    if names > MAX_NAMES or names * len(pattern) > MAX_CHARACTERS:
        raise ValueError(f"braces that stand for {names:,} names, at most {MAX_NAMES:,} are read")
    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise ValueError("unbalanced braces") from None


def count_names(pattern: str, depth: int = 0) -> int:
    """The number of names, by the rules of `braceexpand`. Raises ValueError for braces nested too deeply."""
    if depth > MAX_DEPTH:
        raise ValueError(f"braces that are nested more than {MAX_DEPTH} deep")
    names = 1
    for group in _split(pattern)[0]:
        names *= _count_group(group, depth)
    return names


def _count_group(text: str, depth: int) -> int:
    """The number of names of the text between two braces: a range, alternatives, or neither."""
    for kind, value in ((_NUMBERS, int), (_LETTERS, alphabet.index)):
        if match := kind.fullmatch(text):
            first, last, step = value(match[1]), value(match[2]), int(match[3] or 1) or 1
            return abs(last - first) // step + 1
    return sum(count_names(part, depth + 1) for part in _split(text)[1])


def _split(text: str) -> tuple[list[str], list[str]]:
    """The outermost groups of a text, without their braces, and its parts between commas outside all groups."""
    groups, parts = [], []
    depth = start = part = position = 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
            start = position + 1 if depth == 1 else start
        elif character == "}":
            depth -= 1
            if depth == 0:
                groups.append(text[start:position])
        elif character == "," and depth == 0:
            parts.append(text[part:position])
            part = position + 1
        position += 1
    return groups, [*parts, text[part:]]
