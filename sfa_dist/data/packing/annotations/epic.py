"""Reads the lists of EPIC-Kitchens-100: actions of a verb and a noun, parts of long videos or of folders of frames."""

from __future__ import annotations

import math
import os
from pathlib import Path

from sfa_dist.data.packing.annotations.rows import ClipRow, Say, VideoFiles
from sfa_dist.data.packing.annotations.tables import columns_of, records_of, require_columns
from sfa_dist.errors import DataError

COLUMNS = frozenset({"narration_id", "video_id", "start_timestamp", "stop_timestamp", "start_frame", "stop_frame"})
USUAL_FPS = 59.94  # of the videos of EPIC-Kitchens-55; the later ones have 50
_KEPT = ("narration_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp", "narration")


def matches(source: Path) -> bool:
    """Whether a file has the header of EPIC-Kitchens-100."""
    return set(columns_of(source)) >= COLUMNS


def read(source: Path, videos: VideoFiles, say: Say) -> list[ClipRow]:
    """The segments of EPIC_100_train.csv or EPIC_100_validation.csv.

    `<video_id>.MP4`, anywhere below `videos`, is cut by time stamps. Where there is only a folder `<video_id>` of
    frames, its frames `start_frame` to `stop_frame` are taken. Raises DataError for the test list, which has no
    classes, and for a row that cannot be understood.
    """
    if not {"verb_class", "noun_class"} <= set(columns_of(source)):
        raise DataError(f"{source}: no columns verb_class and noun_class (a test list?): pack train and validation")
    require_columns(source, COLUMNS, "list of EPIC-Kitchens-100")
    rates = _frame_rates(source.parent / "EPIC_100_video_info.csv")
    return [_row(where, record, videos, rates) for where, record in records_of(source)]


def _frame_rates(info: Path) -> dict[str, float]:
    """Frames a second by video, from the official table beside the annotations; empty without it."""
    if not info.is_file():
        return {}
    require_columns(info, ("video_id", "fps"), "table of the videos")
    return {record["video_id"]: _rate(record["fps"], where) for where, record in records_of(info)}


def _rate(text: str, where: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise DataError(f"{where}: {text!r} is not a number of frames a second")
    return rate


def _frame(record: dict[str, str], column: str, where: str) -> int:
    text = record[column]
    if not (text.isascii() and text.isdigit()):
        raise DataError(f"{where}: {column} {text!r} is not the number of a frame")
    return int(text)


def _row(where: str, record: dict[str, str], videos: VideoFiles, rates: dict[str, float]) -> ClipRow:
    labels = {"verb": record["verb_class"], "noun": record["noun_class"]}
    extra = {key: record[key] for key in _KEPT if key in record}
    cut = (seconds_of(record["start_timestamp"], where), seconds_of(record["stop_timestamp"], where))
    if cut[1] <= cut[0]:
        raise DataError(f"{where}: the action ends at {record['stop_timestamp']}, before it starts")
    name, video = record["narration_id"], record["video_id"]
    path = videos.find([video])
    folder = None if os.path.isfile(path) else videos.folder(video)
    if folder is None:
        return ClipRow(path, name, labels, where, extra, cut=cut)
    frames = (_frame(record, "start_frame", where), _frame(record, "stop_frame", where))
    return ClipRow(folder, name, labels, where, extra, frames=frames, fps=rates.get(video, USUAL_FPS))


def seconds_of(text: str, where: str) -> float:
    """Seconds of a time stamp such as `00:01:02.50`. Raises DataError for another form."""
    try:
        hours, minutes, seconds = text.split(":")
        time = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        time = math.nan
    if not 0 <= time < math.inf:
        raise DataError(f"{where}: {text!r} is not a time stamp HH:MM:SS.ss")
    return time
