"""One clip as an annotation file names it, and the search for the file that holds it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sfa_dist.data.shard_walk import IMAGE_SUFFIXES, VIDEO_SUFFIXES

PACKABLE = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
SINGLE = "label"  # The head of a data set that has one label a clip.
_ALIASES = {"jpeg": "jpg"}


@dataclass(frozen=True)
class ClipRow:
    """One clip to pack.

    `name` is what the source calls it, `where` the place in the source for messages. `labels` has one entry a head:
    {"label": "walk"}, or {"verb": "3", "noun": "14"}. `cut` is (start, end) in seconds where the clip is a part of the
    video; `frames` is (first, last) where `path` is a folder of numbered pictures, `fps` of them a second. `extra` is
    kept with the clip.
    """

    path: Path
    name: str
    labels: dict[str, str]
    where: str
    extra: dict[str, str] = field(default_factory=dict)
    cut: tuple[float, float] | None = None
    frames: tuple[int, int] | None = None
    fps: float = 0.0

    @property
    def suffix(self) -> str:
        """Of the file, in lower case and without the dot."""
        return suffix_of(self.path)


def suffix_of(path: Path) -> str:
    """A file's suffix in lower case and without the dot; `jpeg` is `jpg`."""
    suffix = path.suffix.lower().removeprefix(".")
    return _ALIASES.get(suffix, suffix)


class VideoFiles:
    """The videos below a folder, found by name without suffix: data sets are stored flat, or with a folder a class, a
    split or a participant, and in the container that the download gave. Links to folders are followed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files: dict[str, list[Path]] = {}
        self._folders: dict[str, list[Path]] = {}
        seen: set[tuple[int, int]] = set()
        for folder, folders, files in os.walk(root, followlinks=True):
            folders[:] = [name for name in folders if _is_new(Path(folder, name), seen)]  # a link may lead upwards
            for name in files:
                path = Path(folder, name)
                if suffix_of(path) in VIDEO_SUFFIXES:
                    self._files.setdefault(path.stem, []).append(path)
            for name in folders:
                self._folders.setdefault(name, []).append(Path(folder, name))

    def find(self, stems: Sequence[str], class_name: str = "") -> Path:
        """The file of the first of `stems` that is there; of several, the one in the folder of its class. Where there
        is none, the path at which it was to be."""
        for stem in stems:
            if found := self._files.get(stem):
                return min(found, key=lambda path: (_plain(path.parent.name) != _plain(class_name), path))
        return self.root / f"{stems[0]}.mp4"

    def folder(self, name: str) -> Path | None:
        """A folder of this name that holds pictures, or None."""
        for folder in sorted(self._folders.get(name, [])):
            if any(suffix_of(Path(entry.name)) in IMAGE_SUFFIXES for entry in os.scandir(folder)):
                return folder
        return None


def _is_new(folder: Path, seen: set[tuple[int, int]]) -> bool:
    try:
        state = folder.stat()
    except OSError:  # a link to nowhere
        return False
    place = (state.st_dev, state.st_ino)
    new = place not in seen
    seen.add(place)
    return new


def _plain(name: str) -> str:
    """`Playing Guitar`, `playing_guitar` and `playing+guitar` are the same folder name."""
    return name.lower().replace("_", " ").replace("+", " ")
