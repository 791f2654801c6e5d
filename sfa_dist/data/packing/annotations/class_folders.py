"""Reads a folder with one sub-folder per class. Whatever is left out of it is reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sfa_dist.data.packing.annotations.rows import SINGLE, ClipRow, Say, levels_below, some, visible
from sfa_dist.data.video.file_kinds import FRAME_SUFFIXES, HEAD_BYTES, foreign_kind, stored_suffix, suffix_of
from sfa_dist.errors import DataError

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


def rows_of_folder(source: Path, say: Say) -> list[ClipRow]:
    """One row for each video and picture in the sub-folders of `source`, whose names are the labels.

    Files of unsupported kinds have rows too, so that packing reports them. Raises DataError where there is no row, or
    where the sub-folders are splits.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder of class folders: give one, or another --format")
    entries = sorted(source.iterdir())
    folders = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
    _refuse_splits(source, folders)
    left: Counter[str] = Counter()
    rows: list[ClipRow] = []
    empty: list[str] = []
    deeper: list[Path] = []
    linked: list[Path] = []
    repeated: list[Path] = []
    seen: dict[Path, Path] = {}
    for folder in folders:
        found = list(_clips(folder, left))
        if not found:
            empty.append(folder.name)
        for path in found:
            name = visible(str(path.relative_to(source)))
            rows.append(ClipRow(path, name, {SINGLE: folder.name}, visible(str(path))))
            if path.parent != folder:
                deeper.append(path.relative_to(source))
            if seen.setdefault(path.resolve(), path) is not path:
                repeated.append(path.relative_to(source))
        linked += _links(folder)
    loose = [path.name for path in entries if path.is_file() and not path.name.startswith(".") and _has_frames(path)]
    if not rows:
        beside = f", and {len(loose)} videos or pictures beside them" if loose else ""
        raise DataError(f"{source} has no sub-folder with clips{beside}: give a csv, or one sub-folder per class")
    for path in entries:
        if path.name not in loose and path not in folders:
            left[_kind(path)] += 1
    _report(say, "files beside the class folders, left out because they have no label", loose)
    _report(say, "folders without a clip, which are not classes", empty)
    _report(say, "clips in deeper folders, labelled by their class folder", deeper)
    _report(say, "links to folders that are followed", [path.relative_to(source) for path in linked])
    _report(say, "clips that are reached by two paths", repeated)
    if left := +left:
        counts = ", ".join(f"{count} {kind}" for kind, count in left.most_common())
        say(f"other files, left out: {left.total()} ({counts})")
    return rows


def _refuse_splits(source: Path, folders: list[Path]) -> None:
    if len(folders) < 1 or not all(folder.name.lower() in _SPLITS for folder in folders):
        return
    if not any(path.is_dir() for folder in folders for path in folder.iterdir()):
        return  # clips directly below: these may be the classes
    names = [folder.name for folder in folders]
    commands = "; ".join(f"sfa pack {source / name} OUT --prefix {name}" for name in names)
    raise DataError(f"{source} holds the splits {', '.join(names)}, not classes: pack each on its own, {commands}")


def _clips(folder: Path, left: Counter[str]) -> Iterator[Path]:
    """The videos and pictures below a class folder, in order; all other files are counted in `left`, by kind."""
    for level in levels_below(folder):
        left["links to folders already seen"] += len(level.repeated)
        if any(part.startswith(".") for part in level.folder.relative_to(folder.parent).parts):
            left["in hidden folders"] += len(level.files)
            continue
        for name in level.files:
            path = level.folder / name
            if not name.startswith(".") and _has_frames(path):
                yield path
            else:
                left[_kind(path)] += 1


def _has_frames(path: Path) -> bool:
    """Whether a file is a video or a picture, by its name or its content."""
    if suffix_of(path) in FRAME_SUFFIXES:
        return True
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return False
    return bool(stored_suffix(head, "") or foreign_kind(head))


def _kind(path: Path) -> str:
    if path.name.startswith("."):
        return "hidden"
    if path.is_symlink() and not path.exists():
        return "links to nowhere"
    return f".{suffix_of(path)}" if suffix_of(path) else "without suffix"


def _links(folder: Path) -> Iterator[Path]:
    """The links to folders: the class folder itself, and those below it."""
    if folder.is_symlink():
        yield folder
    for level in levels_below(folder):
        yield from (level.folder / name for name in level.folders if (level.folder / name).is_symlink())


def _report(say: Say, what: str, names: list[str] | list[Path]) -> None:
    if names:
        say(f"{what}: {len(names)} ({visible(some(names, 3))})")
