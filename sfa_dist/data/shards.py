"""Turns the patterns of a recipe into one sorted list of shard files, the same on every rank."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path

from braceexpand import braceexpand

from sfa_dist.errors import DataError


def expand_shards(patterns: Sequence[str]) -> list[Path]:
    """Absolute paths of all shards that the patterns name, sorted and without repeats.

    Each pattern is a path, a glob (`train-*.tar`), a brace pattern (`train-{000000..000099}.tar`) or a mixture.
    Each name that braces expand to must be there, so a missing shard is found before the run starts.
    Raises DataError for a pattern that matches no file, and for URLs and pipes: only local files are read.
    """
    found = {os.path.abspath(path) for pattern in patterns for path in _expand(pattern)}
    return [Path(path) for path in sorted(found)]


def _expand(pattern: str) -> Iterator[str]:
    if pattern.startswith("pipe:") or "://" in pattern:
        raise DataError(f"shard pattern {pattern!r} is not a local file: copy the shards to a disk and give their path")
    if os.path.isfile(pattern):  # taken literally first: brackets and braces are legal in file names
        yield pattern
        return
    try:
        names = braceexpand(pattern)
    except ValueError as error:
        raise DataError(f"shard pattern {pattern!r} has unbalanced braces: {error}") from error
    for name in names:
        files = [path for path in glob(os.path.expanduser(name), recursive=True) if os.path.isfile(path)]
        if not files:
            part = "" if name == pattern else f" (at {name!r})"
            raise DataError(f"no shard matches {pattern!r}{part} in {os.getcwd()}: correct the path or pack the shards")
        yield from files
