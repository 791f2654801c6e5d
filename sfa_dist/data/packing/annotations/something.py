"""Reads the lists of Something-Something v2 and Something-Else: a JSON list of {id, template, ...}.

A class is a template without its brackets: "Putting [something] into [something]" is "Putting something into
something". Something-Else has lists of the same form for its compositional and few-shot splits of the same videos,
each with a label list of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfa_dist.boundary.disk import parse_json
from sfa_dist.data.packing.annotations.rows import SINGLE, ClipRow, Say, VideoFiles
from sfa_dist.data.packing.annotations.tables import text_of
from sfa_dist.errors import DataError


def matches(source: Path) -> bool:
    """Whether a file is called JSON; activitynet is tried before."""
    return source.suffix.lower() == ".json"


def read(source: Path, videos: VideoFiles, say: Say) -> list[ClipRow]:
    """The clips of a list; files are `<id>.webm` or another container.

    Raises DataError for a test list, which has no templates, and for a file of another form.
    """
    rows = []
    for number, entry in enumerate(_entries(source)):
        where = f"{source.name} entry {number}"
        if not isinstance(entry, dict) or "id" not in entry:
            raise DataError(f"{where}: not an object with an id")
        if not isinstance(entry.get("template"), str) or not entry["template"]:
            raise DataError(f"{where}: no template (a test list without labels?): pack train and validation")
        clip = str(entry["id"])
        label = entry["template"].replace("[", "").replace("]", "")
        extra = {"id": clip, "caption": str(entry.get("label", ""))}
        rows.append(ClipRow(videos.find([clip]), clip, {SINGLE: label}, where, extra))
    return rows


def _entries(source: Path) -> list[Any]:
    try:
        entries = parse_json(text_of(source).encode())
    except ValueError as error:
        raise DataError(f"{source} cannot be read as JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{source}: not a list of clips, [{{id, template, ...}}, ...]")
    return entries
