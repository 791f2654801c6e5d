"""Reads the lists of Moments in Time 1: `<class>/<file>.mp4,<class>,<votes for>,<votes against>`, no header."""

from __future__ import annotations

import os
from pathlib import Path

from sfa_dist.data.packing.annotations.rows import SINGLE, ClipRow, Say, VideoFiles, plain
from sfa_dist.data.packing.annotations.tables import columns_of, fields_of
from sfa_dist.data.video.file_kinds import FRAME_SUFFIXES, suffix_of
from sfa_dist.errors import DataError

_SUB_FOLDERS = ("", "training", "validation")


def matches(source: Path) -> bool:
    """Whether the first line is a video in a class folder, the name of the class, and two votes."""
    first = columns_of(source)
    if len(first) != 4 or not all(vote.isdigit() for vote in first[2:]):
        return False
    video = Path(first[0])
    return suffix_of(video) in FRAME_SUFFIXES and plain(video.parent.name) == plain(first[1])


def read(source: Path, videos: VideoFiles, say: Say) -> list[ClipRow]:
    """The clips of trainingSet.csv or validationSet.csv.

    Their files are in `videos`, or in its folders training and validation. Raises DataError for a line with several
    classes (Multi-Moments in Time) or of another form.
    """
    rows = []
    for where, fields in fields_of(source):
        if len(fields) < 2 or not fields[0] or not fields[1]:
            raise DataError(f"{where}: not a path and a class, as in <class>/<file>.mp4,<class>,3,1")
        path, label, *votes = fields
        if not all(vote.isdigit() for vote in votes):
            raise DataError(f"{where}: several labels for one clip; only version 1 with one label each can be packed")
        candidates = [videos.root / folder / path for folder in _SUB_FOLDERS]
        found = next((candidate for candidate in candidates if os.path.isfile(candidate)), candidates[0])
        rows.append(ClipRow(found, path, {SINGLE: label}, where))
    return rows
