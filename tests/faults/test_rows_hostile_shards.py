"""Rows 41 to 43 of the fault catalogue: shards that lead out of themselves, run code or fill the memory."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_samples import write_shard
from memory_peak import peak_mib, reset_peak
from row_shards import CLIPS, DATA, evaluate, tar_of

from sfa_dist.data.shards.shard_index import build_index, load_index
from sfa_dist.data.shards.shard_walk import walk_shard
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import LimitsBlock

LINKS = {
    "symlink": (tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": (tarfile.LNKTYPE, "a.mp4"),
    "character device": (tarfile.CHRTYPE, ""),
    "block device": (tarfile.BLKTYPE, ""),
    "fifo": (tarfile.FIFOTYPE, ""),
}


@pytest.mark.fault(41)
@pytest.mark.parametrize("kind", [*LINKS, "../../x.mp4", "/tmp/x.mp4", "a/../../x.mp4"])
def test_row_41_nothing_leads_out_of_a_shard_and_nothing_is_unpacked(kind: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with tarfile.open(home / "x.tar", "w") as archive:
        first = tarfile.TarInfo("a.mp4")
        first.size = len(CLIPS[0])
        archive.addfile(first, io.BytesIO(CLIPS[0]))
        second = tarfile.TarInfo("b.mp4" if kind in LINKS else kind)
        if kind in LINKS:
            second.type, second.linkname = LINKS[kind]
        archive.addfile(second)
    with pytest.raises(DataError, match=r"x\.tar, offset \d+"):
        load_index([home / "x.tar"])
    assert [path.name for path in tmp_path.rglob("*")] == ["home", "x.tar"]


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.fault(42)
@pytest.mark.filterwarnings("ignore:.*members have unknown suffixes")
def test_row_42_nothing_in_a_shard_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "run by the shard"
    hostile = pickle.dumps(Payload(mark))
    objects = io.BytesIO()
    np.save(objects, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    members = [("a.mp4", CLIPS[0]), ("a.cls", b"1"), ("b.mp4", hostile), ("b.cls", hostile), ("b.json", hostile)]
    members += [(f"c{suffix}", hostile) for suffix in (".pyd", ".pkl", ".pickle", ".pth", ".pyd.gz", ".pt", ".py")]
    members += [("d.features.npy", objects.getvalue()), ("d.cls", b"1"), ("e.npy", objects.getvalue())]
    shard = tar_of(tmp_path / "x.tar", members)
    batch = evaluate(load_index([shard]))
    assert batch.weights.tolist() == [1, 0, 0]
    assert [key for key, _ in batch.bad] == ["x.tar/b", "x.tar/d"]
    assert not mark.exists()
    pickle.loads(hostile)
    assert mark.exists()  # it would have


def raw_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


BOMBS = {
    "member that claims 10 GB": raw_header("a.mp4", 10**10),
    "long name that claims 10 GB": raw_header("././@LongLink", 10**10, tarfile.GNUTYPE_LONGNAME),
    "attributes that claim 10 GB": raw_header("x", 10**10, tarfile.XHDTYPE),
    "sparse member": raw_header("a.mp4", 512, tarfile.GNUTYPE_SPARSE),
}


def gz_bomb(path: Path) -> None:
    """200 kB that unpack to 200 MB."""
    with tarfile.open(path, "w:gz", compresslevel=9) as archive:
        info = tarfile.TarInfo("a.mp4")
        info.size = 200 << 20
        with open("/dev/zero", "rb") as zeros:
            archive.addfile(info, zeros)


@pytest.mark.fault(43)
@pytest.mark.parametrize("what", [*BOMBS, "gz bomb"])
def test_row_43_a_bomb_is_refused_from_its_header(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    if what == "gz bomb":
        gz_bomb(path)
    else:
        path.write_bytes(BOMBS[what] + bytes(4096))
    assert path.stat().st_size < 1 << 20
    before = reset_peak()
    with pytest.raises(DataError, match=r"x\.tar, offset \d+"):
        load_index([path])
    assert peak_mib() - before < 8


@pytest.mark.fault(43)
def test_row_43_a_member_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    """A real one of 3 GB (a hole in the file), in an index that somebody else built."""
    shard = write_shard(tmp_path / "x.tar", [("a", CLIPS[0], 0), ("b", CLIPS[1], 1)])
    build_index([shard])
    known = load_index([shard])
    size = known.size.copy()
    size[0] = 3 << 30
    os.truncate(shard, 4 << 30)
    index = dataclasses.replace(known, size=size)
    before = reset_peak()
    batch = evaluate(index, DATA.model_copy(update={"limits": LimitsBlock(mib=100)}))
    assert peak_mib() - before < 60
    assert batch.weights.tolist() == [0, 1]
    assert "3221225472 bytes (data.limits.mib is 100)" in batch.bad[0][1]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_headers_that_only_tell_of_the_next_are_refused_however_many(kind: bytes, tmp_path: Path) -> None:
    path = tmp_path / "chain.tar"
    told = {tarfile.XHDTYPE: b"11 path=ab\n", tarfile.XGLTYPE: b"11 path=ab\n"}.get(kind, b"name\0").ljust(512, b"\0")
    header = raw_header("././@LongLink", 11 if kind in (tarfile.XHDTYPE, tarfile.XGLTYPE) else 5, kind)
    path.write_bytes((header + told) * 5000 + raw_header("a.cls", 0) + bytes(1024))
    with pytest.raises(DataError, match=r"chain\.tar"):
        walk_shard(path)
    path.write_bytes(raw_header("././@LongLink", 2 << 20, kind) + bytes(2 << 20) + raw_header("a.cls", 0) + bytes(1024))
    with pytest.raises(DataError, match="2097152 bytes"):
        walk_shard(path)
