"""Malformed containers, tars and indexes: refused by name, or read as other readers do."""

from __future__ import annotations

import contextlib
import inspect
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_samples import video_bytes
from fuzzing import amounts, fuzz

from sfa_dist.data.shards.index_columns import (
    SIDECAR_NAME,
    Columns,
    Strings,
    _check_columns,
    read_sidecar,
    write_sidecar,
)
from sfa_dist.data.shards.index_file import format_index, parse_index, to_columns, to_entry, to_raw
from sfa_dist.data.shards.shard_walk import ShardEntry, split_name, walk_shard
from sfa_dist.data.video import container
from sfa_dist.errors import DataError

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x20\0\0\0\x20\x08\x02\0\0\0" + bytes(30)
JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xc0\0\x11\x08\0\x20\0\x20\3" + bytes(40)


@pytest.fixture(scope="module")
def videos() -> list[bytes]:
    return [video_bytes(container=kind) for kind in ("mp4", "mov", "matroska", "avi")]


@amounts
def test_containers(videos: list[bytes], inputs: int) -> None:
    """What a header promises is read, or it promises nothing."""
    readers = [
        function
        for name, function in vars(container).items()
        if inspect.isfunction(function)
        and function.__module__ == container.__name__
        and not name.startswith("_")
        and list(inspect.signature(function).parameters) == ["data"]
    ]
    assert len(readers) >= 4

    def parse(data: bytes) -> None:
        for read in readers:
            read(data)
        promise = container.promised_video(data)
        assert min(promise.frames, promise.height, promise.width, container.promised_size(data)) >= 0

    fuzz("containers", [*videos, PNG, JPEG], parse, repair=None, inputs=inputs)


def tar(kind: int, name: str = "a", **pax: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind, pax_headers=pax) as archive:
        for number in range(3):
            for suffix, data in (("mp4", bytes([number]) * 700), ("json", b'{"label": 1, "fps": 5}'), ("cls", b"1")):
                info = tarfile.TarInfo(f"{name}{number}.{suffix}")
                info.size, info.pax_headers = (
                    len(data),
                    {"mtime": "1.5"} if number and kind == tarfile.PAX_FORMAT else {},
                )
                archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


TARS = [
    tar(tarfile.USTAR_FORMAT),
    tar(tarfile.PAX_FORMAT),
    tar(tarfile.PAX_FORMAT, "long" * 40),
    tar(tarfile.PAX_FORMAT, "ж", comment="c"),
    tar(tarfile.GNU_FORMAT, "long" * 40),
]


def right_checksums(data: bytes) -> bytes:
    """Makes each block that looks like a tar header one with a right checksum."""
    whole = bytearray(data)
    for start in range(0, len(data) - 511, 512):
        if whole[start + 257 : start + 262] == b"ustar":
            whole[start + 148 : start + 156] = b" " * 8
            whole[start + 148 : start + 156] = b"%06o\0 " % sum(whole[start : start + 512])
    return bytes(whole)


@amounts
def test_tars(tmp_path: Path, inputs: int) -> None:
    """What is accepted is what Python's reader finds, member by member and byte by byte."""
    path = tmp_path / "x.tar"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        entry = walk_shard(path)
        found = {
            (sample.key, suffix): (data[member.offset : member.offset + member.size], member.crc32)
            for sample in entry.samples
            for suffix, member in sample.members.items()
        }
        expected = {}
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for info in archive:
                file = archive.extractfile(info) if info.isreg() else None
                if file is not None and (split := split_name(info.name.removeprefix("./"))):
                    content = file.read()
                    expected[split] = (content, zlib.crc32(content))
        assert found == expected, "another reader finds other members"

    fuzz("tars", TARS, parse, (DataError,), right_checksums, inputs)


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> ShardEntry:
    path = tmp_path_factory.mktemp("entry") / "x.tar"
    path.write_bytes(TARS[0])
    return walk_shard(path)


@amounts
def test_index_json(entry: ShardEntry, inputs: int) -> None:
    """What is accepted fits together and points into its shards."""
    raw = to_raw(entry)
    two_heads = {**raw, "labels": [[1, 2]] * 3, "errors": {"1": "a fault"}}
    seeds = [format_index({"s.tar": raw, "t.tar": raw}), format_index({"s.tar": two_heads})]

    def parse(data: bytes) -> None:
        shards = parse_index(data, "index.json")
        columns = to_columns(shards, "index.json")
        check(columns)
        for each in shards.values():
            to_entry(each)

    fuzz("index.json", seeds, parse, (DataError,), inputs=inputs)


def check(columns: Columns) -> None:
    """Everything that training reads of columns can be read, and lies in its shard."""
    try:
        _check_columns(columns)
    except ValueError as error:
        raise AssertionError(str(error)) from error
    for texts in (columns.names, columns.keys, columns.error_texts):
        list(texts)
    assert columns.errors.keys() <= set(range(len(columns.keys)))


def right_crcs(data: bytes) -> bytes:
    """Makes the checksums of a zip's stored members right."""
    whole = bytearray(data)
    place = 0
    while (place := whole.find(b"PK\1\2", place)) >= 0:
        with contextlib.suppress(struct.error):  # Cut off.
            size, header = *struct.unpack_from("<I", whole, place + 20), *struct.unpack_from("<I", whole, place + 42)
            start = header + 30 + sum(struct.unpack_from("<HH", whole, header + 26))
            crc = zlib.crc32(whole[start : start + size])
            struct.pack_into("<I", whole, place + 16, crc)
            struct.pack_into("<I", whole, header + 14, crc)
        place += 4
    return bytes(whole)


@amounts
def test_index_npz(entry: ShardEntry, tmp_path: Path, inputs: int) -> None:
    """A damaged index.npz is not used; what is used points into its shards."""
    raw = to_raw(entry)
    columns = to_columns({"s.tar": raw, "t.tar": {**raw, "errors": {"1": "a fault"}}}, "index.json")
    write_sidecar(tmp_path, "hash", columns)
    path = tmp_path / SIDECAR_NAME
    seed = path.read_bytes()
    assert right_crcs(seed) == seed

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        read = read_sidecar(tmp_path, "hash")
        if read is not None:
            check(read)

    fuzz("index.npz", [seed], parse, (), right_crcs, inputs)


@pytest.mark.parametrize("text", [b"\xff", b"\x80"])
def test_an_index_npz_of_texts_that_are_none_is_not_used(entry: ShardEntry, tmp_path: Path, text: bytes) -> None:
    columns = to_columns({"s.tar": to_raw(entry)}, "index.json")
    spoiled = columns.keys.text.copy()
    spoiled[:1] = np.frombuffer(text, np.uint8)
    write_sidecar(tmp_path, "hash", replace(columns, keys=Strings(spoiled, columns.keys.ends)))
    assert read_sidecar(tmp_path, "hash") is None
    split = Strings.of(["", "\N{LATIN SMALL LETTER E WITH ACUTE}", "b"])
    for ends, used in (([0, 2, 3], True), ([0, 1, 3], False)):
        write_sidecar(tmp_path, "hash", replace(columns, keys=Strings(split.text, np.array(ends))))
        assert (read_sidecar(tmp_path, "hash") is not None) == used


def test_a_header_larger_than_all_files_is_refused(tmp_path: Path) -> None:
    """Its size in eight bytes, as GNU tar writes those that do not fit into digits."""
    for kind in (TARS[3], TARS[4]):
        whole = bytearray(kind)
        whole[124:136] = b"\x80" + b"\0" * 2 + b"\x7f" + b"\xff" * 8
        (tmp_path / "x.tar").write_bytes(right_checksums(bytes(whole)))
        with pytest.raises(DataError):
            walk_shard(tmp_path / "x.tar")


def npz(name: str, shape: str, packed: bool) -> Callable[[bytes], bytes]:
    """An index.npz with one array of another kind."""

    def change(seed: bytes) -> bytes:
        out = io.BytesIO()
        kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
        with zipfile.ZipFile(io.BytesIO(seed)) as old, zipfile.ZipFile(out, "w", kind) as new:
            for member in old.namelist():
                data = old.read(member)
                if member == f"{name}.npy" and shape:
                    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
                    data = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
                new.writestr(member, data)
        return out.getvalue()

    return change


@pytest.mark.parametrize(
    "change",
    [
        npz("offset", "(1000000000000,)", False),
        npz("offset", "(0,)", False),
        npz("offset", "(-1,)", False),
        npz("offset", "", True),
        lambda seed: np.lib.format.MAGIC_PREFIX + b"\1\0" + seed,
        lambda _: b"",
    ],
    ids=["terabytes", "none", "negative", "packed", "no zip", "empty"],
)
def test_an_index_npz_that_claims_too_much_is_not_used(
    entry: ShardEntry, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    write_sidecar(tmp_path, "hash", to_columns({"s.tar": to_raw(entry)}, "index.json"))
    path = tmp_path / SIDECAR_NAME
    assert read_sidecar(tmp_path, "hash") is not None
    path.write_bytes(change(path.read_bytes()))
    assert read_sidecar(tmp_path, "hash") is None
