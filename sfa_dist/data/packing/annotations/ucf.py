"""Reads the lists of UCF101: lines of `<class>/<file>.avi <number from 1>`, without the number in the test lists."""

from __future__ import annotations

import re
from pathlib import Path

from sfa_dist.data.packing.annotations.class_files import read_class_list
from sfa_dist.data.packing.annotations.rows import SINGLE, ClipRow, Say, VideoFiles
from sfa_dist.data.packing.annotations.tables import first_line, text_of
from sfa_dist.errors import DataError

CLASSES = "classInd.txt"
_LINE = re.compile(r"(?P<label>[^/\s]+)/(?P<stem>v_\w+_g\d+_c\d+)\.avi(\s+(?P<number>\d+))?\s*")


def matches(source: Path) -> bool:
    """Whether the first line has the form of an official list."""
    return source.suffix.lower() == ".txt" and _LINE.fullmatch(first_line(source)) is not None


def read(source: Path, videos: VideoFiles, say: Say) -> list[ClipRow]:
    """The clips of a list; a label is the name of the folder.

    Its number is compared with classInd.txt beside the list. Raises DataError where that file is missing or gives
    another number, and for a line that cannot be understood.
    """
    classes = source.parent / CLASSES
    if not classes.is_file():
        raise DataError(f"{source}: the official {CLASSES}, which numbers the classes, has to lie beside it")
    numbers = {name: number for number, name in enumerate(read_class_list(classes, say), 1)}
    rows = []
    for count, line in enumerate(text_of(source).splitlines(), 1):
        where = f"{source.name} line {count}"
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{where}: {line[:80]!r} is not <class>/v_<class>_g01_c01.avi and a number, as in UCF101")
        label, stem, number = match["label"], match["stem"], match["number"]
        if number is not None and numbers.get(label) != int(number):
            raise DataError(f"{where}: the class {label} has the number {number} here, another or none in {CLASSES}")
        # The folder HandstandPushups has files named v_HandStandPushups; some copies correct that.
        stems = [stem, stem.replace("HandStand", "Handstand")]
        rows.append(ClipRow(videos.find(stems, class_name=label), f"{label}/{stem}", {SINGLE: label}, where))
    return rows
