"""Reads the lists of HMDB51: a folder of `<class>_test_split<1..3>.txt` with lines of `<file>.avi <0, 1 or 2>`."""

from __future__ import annotations

import re
from pathlib import Path

from sfa_dist.data.packing.annotations.rows import SINGLE, ClipRow, Say, VideoFiles
from sfa_dist.data.packing.annotations.tables import text_of
from sfa_dist.errors import DataError

_FILE = re.compile(r"(?P<label>.+)_test_split(?P<split>[123])\.txt")
_USES = {"0": "unused", "1": "train", "2": "test"}


def matches(source: Path) -> bool:
    """Whether a folder holds the official lists, or a file is one of them."""
    if source.is_dir():
        return any(_FILE.fullmatch(path.name) for path in source.iterdir())
    return _FILE.fullmatch(source.name) is not None


def read(source: Path, videos: VideoFiles, say: Say) -> list[ClipRow]:
    """Every video of all classes once; its columns split1, split2 and split3 are train, test or unused.

    Raises DataError for a single file, and where a list is missing or cannot be understood.
    """
    if not source.is_dir():
        raise DataError(f"{source} lists one class of HMDB51: give its folder, and --split-column split1 --split train")
    uses: dict[tuple[str, str], dict[str, str]] = {}
    files = [(match, path) for path in sorted(source.iterdir()) if (match := _FILE.fullmatch(path.name))]
    splits = sorted({f"split{match['split']}" for match, _ in files})
    for match, path in files:
        for count, line in enumerate(text_of(path).splitlines(), 1):
            fields = line.split()
            if fields and (len(fields) != 2 or fields[1] not in _USES):
                raise DataError(f"{path.name} line {count}: {line[:80]!r} is not a video and 0, 1 or 2, as in HMDB51")
            if fields:
                uses.setdefault((match["label"], fields[0]), {})[f"split{match['split']}"] = _USES[fields[1]]
    rows = []
    for (label, name), own in uses.items():
        where = f"{label}_test_split*.txt, {name}"
        if absent := [split for split in splits if split not in own]:
            raise DataError(f"{where}: not in {', '.join(absent)}: the lists of all splits name the same videos")
        path = videos.find([Path(name).stem], class_name=label)
        rows.append(ClipRow(path, f"{label}/{name}", {SINGLE: label}, where, own))
    return rows
