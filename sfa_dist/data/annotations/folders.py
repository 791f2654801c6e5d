"""Data of one's own in a folder with one sub-folder a class. Nothing in it is passed over without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sfa_dist.data.annotations.rows import SINGLE, ClipRow, Say, files_below, some
from sfa_dist.data.file_kinds import FRAME_SUFFIXES, HEAD_BYTES, foreign_kind, stored_suffix, suffix_of
from sfa_dist.errors import DataError

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


def rows_of_folder(source: Path, say: Say) -> list[ClipRow]:
    """One row for each file of frames in the sub-folders of `source`, whose names are the labels; of a kind that is
    not read too, so that it is reported. Raises DataError where there is none, or where they are splits."""
    if not source.is_dir():
        raise DataError(f"{source} is no folder of class folders: give one, or another --format")
    entries = sorted(source.iterdir())
    folders = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
    _refuse_splits(source, folders)
    left: Counter[str] = Counter()
    rows: list[ClipRow] = []
    empty, deeper, linked, repeated = [], [], [], []
    seen: dict[Path, Path] = {}
    for folder in folders:
        found = list(_clips(folder, left))
        if not found:
            empty.append(folder.name)
        for path in found:
            rows.append(ClipRow(path, str(path.relative_to(source)), {SINGLE: folder.name}, str(path)))
            if path.parent != folder:
                deeper.append(path.relative_to(source))
            if seen.setdefault(path.resolve(), path) is not path:
                repeated.append(path.relative_to(source))
        linked += [place for place in _links(folder) if place.exists()]
    if not rows:
        kinds = ", ".join(("mp4", "mov", "avi", "mkv", "webm", "png", "jpg"))
        raise DataError(f"{source} has no sub-folder with clips ({kinds}): give a csv, or one sub-folder a class")
    loose = [path.name for path in entries if path.is_file() and not path.name.startswith(".") and _has_frames(path)]
    for path in entries:
        if path.name not in loose and path not in folders:
            left[_kind(path)] += 1
    _tell(say, "files lie beside the class folders, so they have no label and are left out", loose)
    _tell(say, "folders hold no clip and are no class", empty)
    _tell(say, "clips lie deeper than their class folder, and have its name as their label", deeper)
    _tell(say, "links to folders were followed", [place.relative_to(source) for place in linked])
    _tell(say, "clips are reached by two paths", repeated)
    if left:
        counts = ", ".join(f"{count} {kind}" for kind, count in left.most_common())
        say(f"{left.total()} other files and links are left out: {counts}")
    return rows


def _refuse_splits(source: Path, folders: list[Path]) -> None:
    if len(folders) < 1 or not all(folder.name.lower() in _SPLITS for folder in folders):
        return
    if not any(path.is_dir() for folder in folders for path in folder.iterdir()):
        return  # clips without classes below: the names may be meant
    names = [folder.name for folder in folders]
    commands = "; ".join(f"sfa pack {source / name} OUT --prefix {name}" for name in names)
    raise DataError(f"{source} holds the splits {', '.join(names)}, not classes: pack each by itself, {commands}")


def _clips(folder: Path, left: Counter[str]) -> Iterator[Path]:
    """The files of frames below a class folder in order; all others are counted in `left` by their kind."""
    for place, _, files in files_below(folder):
        if any(part.startswith(".") for part in place.relative_to(folder.parent).parts):
            left["in hidden folders"] += len(files)
            continue
        for name in files:
            path = place / name
            if not name.startswith(".") and _has_frames(path):
                yield path
            else:
                left[_kind(path)] += 1


def _has_frames(path: Path) -> bool:
    """Whether a file is, or calls itself, a video or a picture."""
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
    """Links to folders: the class folder itself, and those below it."""
    if folder.is_symlink():
        yield folder
    for place, folders, _ in files_below(folder):
        yield from (place / name for name in folders if (place / name).is_symlink())


def _tell(say: Say, what: str, names: list[str] | list[Path]) -> None:
    if names:
        say(f"{len(names)} {what}: {some(names, 3)}")
