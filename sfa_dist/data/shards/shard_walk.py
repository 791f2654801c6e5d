"""A strict walk through one tar shard: where each member of each sample is, its checksum, and its label.

Readers that stream a tar take a damaged header for the end of the archive and silently drop the rest. This walk checks
the end: the last member must be followed by an end-of-archive marker and zeros only. Nothing is unpacked to disk, and
only labels are decoded.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from sfa_dist.boundary.disk import parse_json
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import LABEL_HEADS

Label = int | tuple[int, ...]
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "avi", "mov")
IMAGE_SUFFIXES = ("jpg", "png")
CLIP_SUFFIXES = (*VIDEO_SUFFIXES, "features.npy", *IMAGE_SUFFIXES)  # a sample's clip is its first member of these
KNOWN_SUFFIXES = (*CLIP_SUFFIXES, "cls", "json", "txt")

_BLOCK = 512
_CHUNK = 1 << 20
_MAX_LABEL_BYTES = 1 << 20
_MAX_EXTENDED_BYTES = 1 << 20
_EXTENDED_HEADERS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE),
    tarfile.SOLARIS_XHDTYPE,
)


class TarMember(NamedTuple):
    """One file inside a shard: the offset of its bytes, their number and their crc32."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class SampleEntry:
    """One sample of a shard.

    `label` is a number or one for each of LABEL_HEADS; `error` says why the sample cannot be used.
    """

    key: str
    members: dict[str, TarMember]
    label: Label | None
    error: str | None = None


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its size in bytes, sha256 (hex), samples in order, and the names of members with unknown suffixes."""

    size: int
    sha256: str
    samples: tuple[SampleEntry, ...]
    ignored: tuple[str, ...] = ()


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member; None if its name does not end in a known suffix.

    The suffix is lower-cased: `v1.2_clip.MP4` gives ("v1.2_clip", "mp4").
    """
    lowered = name.lower()
    for suffix in sorted(KNOWN_SUFFIXES, key=len, reverse=True):
        key = name[: -len(suffix) - 1]
        if lowered.endswith("." + suffix) and key and not key.endswith("/"):
            return key, suffix
    return None


def walk_shard(path: Path, shard: str = "") -> ShardEntry:
    """Reads a whole shard twice (checksums of members, then of the file) and returns its entry.

    `shard` is its name in messages, if `path` is a copy.

    Raises DataError, naming shard and byte offset, for anything but a complete plain tar of regular files: a cut or
    damaged archive, a compressed one, links and devices, absolute names or `..`, repeated or scattered members.
    A sample that merely lacks its clip or has no readable label is kept, with `error` set.
    """
    shard = shard or str(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            members, ignored = _members(shard, file, size)
            samples = tuple(_sample(file, key, found) for key, found in members.items())
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, OverflowError) as error:  # OverflowError: an offset too large for the system
        raise DataError(f"shard {shard}: cannot be read ({error}): check the path, the rights and the disk") from error
    return ShardEntry(size, sha256, samples, tuple(ignored))


def warn_of_ignored(entries: Iterable[ShardEntry]) -> None:
    """Warns once about all members with unknown suffixes."""
    unknown = sorted({name for entry in entries for name in entry.ignored})
    if unknown:
        some = ", ".join(repr(name) for name in unknown[:5])
        warnings.warn(f"{len(unknown)} members have unknown suffixes and are ignored: {some} ...", stacklevel=2)


def _members(shard: str, file: BinaryIO, size: int) -> tuple[dict[str, dict[str, TarMember]], list[str]]:
    """Members by key and suffix in the archive's order, and the names of members with unknown suffixes."""
    samples: dict[str, dict[str, TarMember]] = {}
    ignored: list[str] = []
    previous = ""
    for info in _tar_infos(shard, file, size):
        name = _checked_name(shard, info)
        split = split_name(name)
        if split is None:
            ignored.append(name)
            continue
        key, suffix = split
        found = samples.setdefault(key, {})
        first = min((member.offset for member in found.values()), default=info.offset_data)
        if suffix in found:
            _fail(shard, info.offset, f"repeats {name!r}, which is also at offset {found[suffix].offset}")
        if found and key != previous:
            _fail(shard, info.offset, f"sample {key!r} goes on here but began at offset {first}, others between")
        found[suffix] = TarMember(info.offset_data, info.size, _crc32(file, info.offset_data, info.size))
        previous = key
    if not samples:
        _fail(shard, 0, f"holds no sample (known suffixes: {', '.join(KNOWN_SUFFIXES)})")
    return samples, ignored


class _BoundedInfo(tarfile.TarInfo):
    """A header that bounds long names and extended headers, which tarfile reads into memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED_HEADERS and self.size > _MAX_EXTENDED_BYTES:
            raise tarfile.ReadError(f"a long name or extended header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def _tar_infos(shard: str, file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """Yields the headers of all members but folders, then checks that the archive ends where tarfile stopped."""
    end = 0
    try:
        archive = tarfile.open(fileobj=file, mode="r:", tarinfo=_BoundedInfo)  # noqa: SIM115 -- it owns nothing: `file` is closed by the caller
        for info in archive:
            end = info.offset_data + (-(-info.size // _BLOCK) * _BLOCK if info.isreg() else 0)
            if not 0 <= info.size <= size - info.offset_data:
                _fail(shard, info.offset, f"{info.name!r} claims {info.size} bytes, but the file ends before")
            if not info.isdir():
                yield info
    except (tarfile.TarError, ValueError) as error:  # ValueError: tarfile lets some damaged pax headers through
        _fail(shard, end, f"not a plain, complete tar ({error})")
    except RecursionError:  # tarfile recurses for each header that only extends the next.
        _fail(shard, end, "not a plain tar (long-name or extended headers that follow one another without a member)")
    _check_end(shard, file, end, size)


def _check_end(shard: str, file: BinaryIO, end: int, size: int) -> None:
    """Checks for at least two zero blocks (the end marker of POSIX tar) and only zeros after the last member."""
    if size - end < 2 * _BLOCK:
        _fail(shard, end, "the end-of-archive marker is missing: the file was cut")
    file.seek(end)
    offset = end
    while chunk := file.read(_CHUNK):
        if chunk.count(0) != len(chunk):
            _fail(shard, offset, "a header is damaged, and what follows would be lost")
        offset += len(chunk)


def _checked_name(shard: str, info: tarfile.TarInfo) -> str:
    name = info.name.removeprefix("./")
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
        _fail(shard, info.offset, f"{name!r} is not a regular file (links, devices and sparse files are refused)")
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        _fail(shard, info.offset, f"{name!r} is an absolute name or leads out of the archive")
    return name


def _fail(shard: str, offset: int, what: str) -> None:
    raise DataError(f"shard {shard}, offset {offset}: {what}. Copy or pack it again, then run `sfa index {shard}`")


def _crc32(file: BinaryIO, offset: int, size: int) -> int:
    file.seek(offset)
    crc = 0
    while size > 0:
        chunk = file.read(min(size, _CHUNK))
        crc = zlib.crc32(chunk, crc)
        size -= len(chunk) or size
    return crc


def _sample(file: BinaryIO, key: str, members: dict[str, TarMember]) -> SampleEntry:
    label, error = _label(file, members)
    if not any(suffix in members for suffix in CLIP_SUFFIXES):
        error = "label without a clip"
    return SampleEntry(key, members, label, error)


def _label(file: BinaryIO, members: dict[str, TarMember]) -> tuple[Label | None, str | None]:
    """(label, error) from .cls, else from `label`, or `noun` and `verb`, in .json."""
    for suffix in ("cls", "json"):
        member = members.get(suffix)
        if member is None:
            continue
        if member.size > _MAX_LABEL_BYTES:
            return None, f".{suffix} of {member.size} bytes is too large for a label"
        file.seek(member.offset)
        data = file.read(member.size)
        return _label_from_cls(data) if suffix == "cls" else _label_from_json(data)
    return None, "missing label"


def _label_from_cls(data: bytes) -> tuple[int | None, str | None]:
    text = data.strip()
    if re.fullmatch(rb"\d{1,18}", text):
        return int(text), None
    return None, f"label {text[:40]!r} is not a number from 0 up"


def _label_from_json(data: bytes) -> tuple[Label | None, str | None]:
    try:
        value = parse_json(data)
    except ValueError as error:
        return None, f"garbled .json ({error})"
    if not isinstance(value, dict):
        return None, "garbled .json (not an object)"
    wanted = LABEL_HEADS if "label" not in value and value.keys() >= set(LABEL_HEADS) else ("label",)
    if not value.keys() >= set(wanted):
        return None, "missing label"
    for head in wanted:
        if not (type(value[head]) is int and 0 <= value[head] < 10**18):  # not isinstance: True is not a label
            return None, f"{head} {value[head]!r:.40} is not a number from 0 up"
    numbers = tuple(value[head] for head in wanted)
    return numbers if len(numbers) > 1 else numbers[0], None
