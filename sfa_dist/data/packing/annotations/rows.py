"""One clip as an annotation file names it, and the search for the file that holds it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sfa_dist.data.shards.shard_walk import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from sfa_dist.data.video.file_kinds import FRAME_SUFFIXES, suffix_of

SINGLE = "label"  # The only head of a data set with one label per clip.
Say = Callable[[str], None]  # Reports what is left out, guessed or read differently from how it is written.


@dataclass(frozen=True)
class ClipRow:
    """One clip to pack.

    `name` is its name in the source and `where` its position there, for messages. `labels` has one entry per head:
    {"label": "walk"}, or {"verb": "3", "noun": "14"}. `cut` is (start, end) in seconds for a part of a video. `frames`
    is (first, last), both included, where `path` is a folder of numbered pictures, `fps` of them a second. `extra` is
    stored with the clip.
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
        """The file's suffix, in lower case and without the dot."""
        return suffix_of(self.path)


def some(things: Iterable[object], most: int = 5) -> str:
    """The first few for a message: `a, b, c ...`."""
    listed = [str(thing) for thing in things]
    return ", ".join(listed[:most]) + (" ..." if len(listed) > most else "")


def visible(text: str) -> str:
    """A name for messages and reports, with unprintable characters, such as terminal sequences, escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class Level(NamedTuple):
    """A folder and the names in it, sorted; `repeated` are the sub-folders that the walk has already seen."""

    folder: Path
    folders: list[str]
    files: list[str]
    repeated: list[str]


def levels_below(root: Path) -> Iterator[Level]:
    """`root` and all folders below it.

    Links to folders are followed, except to a folder above `root` or one that the walk has already seen.
    """
    seen: set[tuple[int, int]] = set()
    for folder in (root, *root.resolve().parents):
        _is_new(folder, seen)
    for name, folders, files in os.walk(root, followlinks=True):
        new = sorted(each for each in folders if _is_new(Path(name, each), seen))
        yield Level(Path(name), new, sorted(files), sorted(set(folders) - set(new)))
        folders[:] = new


class VideoFiles:
    """The videos below a folder, found by name without suffix. Links to folders are followed.

    Data sets are stored flat or with a folder per class, split or participant, and in the container that the download
    had.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files: dict[str, list[Path]] = {}
        self._folders: dict[str, list[Path]] = {}
        for level in levels_below(root):
            for name in level.files:
                path = level.folder / name
                if suffix_of(path) in FRAME_SUFFIXES and not name.startswith("."):
                    self._files.setdefault(path.stem, []).append(path)
            for name in level.folders:
                self._folders.setdefault(name, []).append(level.folder / name)

    def find(self, stems: Sequence[str], class_name: str = "") -> Path:
        """The file of the first of `stems` that exists; otherwise the path where the file would be expected.

        Of several files, one in the folder of its class is preferred, then one of a supported kind.
        """
        for stem in stems:
            if found := self._files.get(stem):
                return min(found, key=lambda path: (not _in_folder_of(class_name, path), not _is_supported(path), path))
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
    identity = (state.st_dev, state.st_ino)
    new = identity not in seen
    seen.add(identity)
    return new


def plain(name: str) -> str:
    """A name without case and separators: `Playing Guitar`, `playing_guitar` and `playing+guitar` become the same."""
    return " ".join(name.casefold().replace("_", " ").replace("+", " ").split())


def _in_folder_of(class_name: str, path: Path) -> bool:
    return plain(path.parent.name) == plain(class_name)


def _is_supported(path: Path) -> bool:
    return suffix_of(path) in VIDEO_SUFFIXES
