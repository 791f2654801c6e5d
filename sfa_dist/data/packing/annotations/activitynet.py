"""Reads the list of ActivityNet 1.2 and 1.3: one JSON of all videos, each with labelled parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sfa_dist.data.packing.annotations.rows import SINGLE, ClipRow, Say, VideoFiles, some
from sfa_dist.data.packing.annotations.tables import text_of
from sfa_dist.errors import DataError


def matches(source: Path) -> bool:
    """Whether a file is JSON with a database of videos."""
    if source.suffix.lower() != ".json":
        return False
    content = _content(source)
    return isinstance(content, dict) and isinstance(content.get("database"), dict)


def read(source: Path, videos: VideoFiles, say: Say) -> list[ClipRow]:
    """One clip for each labelled part, cut out of `v_<id>.mp4` or another container.

    Its `split` is the video's subset: training or validation. Videos without labels (the test set) and parts that do
    not end after their start are left out and reported. Raises DataError for a file of another form.
    """
    content = _content(source)
    if not isinstance(content, dict) or not isinstance(content.get("database"), dict):
        raise DataError(f"{source}: not a list of ActivityNet, {{version, taxonomy, database: {{id: ...}}}}")
    rows: list[ClipRow] = []
    unlabelled, empty = [], []
    for video, entry in content["database"].items():
        try:
            subset, parts = str(entry["subset"]), list(entry["annotations"])
            found = [(str(part["label"]), [float(time) for time in part["segment"]]) for part in parts]
        except (KeyError, TypeError, ValueError) as error:
            what = "needs subset and annotations of a label and a segment of two times"
            raise DataError(f"{source.name}, video {video}: {what} ({error!r:.80})") from error
        if not found:
            unlabelled.append(video)
        path = videos.find([f"v_{video}", video]) if found else Path()
        for number, (label, times) in enumerate(found):
            name = f"{video}_{number}"
            if len(times) != 2 or not 0 <= times[0] < times[1] < float("inf"):
                empty.append(name)
                continue
            where = f"{source.name}, video {video}, part {number}"
            extra = {"id": str(video), "split": subset}
            rows.append(ClipRow(path, name, {SINGLE: label}, where, extra, cut=(times[0], times[1])))
    if unlabelled:
        say(f"{len(unlabelled)} videos have no label (the test set) and are left out: {some(unlabelled, 3)}")
    if empty:
        say(f"{len(empty)} parts do not end after their start and are left out: {some(empty, 3)}")
    if not rows:
        raise DataError(f"{source}: no part of any video has a label")
    return rows


def _content(source: Path) -> Any:
    try:
        return json.loads(text_of(source))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} cannot be read as JSON ({error})") from error
