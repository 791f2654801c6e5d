"""Large indexes: the columns of index.json, its old version, and the binary copy beside it."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from data_samples import write_shard

from sfa_dist.data.shards import index_file
from sfa_dist.data.shards.index_columns import SIDECAR_NAME, Strings, Suffixes
from sfa_dist.data.shards.index_file import INDEX_NAME, read_columns, to_entry, to_raw
from sfa_dist.data.shards.shard_index import SampleIndex, build_index, load_index, verify_index
from sfa_dist.data.shards.shard_walk import SampleEntry, ShardEntry, TarMember
from sfa_dist.errors import DataError

TEXTS = ["", "a", "clip 7", "ä→漢", "\udcff is no utf-8", "x" * 300]


def test_texts_in_arrays_are_the_texts() -> None:
    strings = Strings.of(TEXTS)
    assert (list(strings), len(strings), strings == TEXTS, strings != TEXTS[:-1]) == (TEXTS, len(TEXTS), True, True)
    assert (strings[-1], strings[1:3], strings[np.int64(2)]) == (TEXTS[-1], TEXTS[1:3], TEXTS[2])
    with pytest.raises(IndexError):
        strings[len(TEXTS)]
    assert strings.part(2, 5) == TEXTS[2:5]
    assert Strings.joined([strings.part(0, 2), Strings.of([]), strings.part(2, 6)]) == TEXTS
    assert pickle.loads(pickle.dumps(strings)) == TEXTS
    assert Suffixes(np.array([0, 1, 6], np.uint8)) == ["", "mp4", "features.npy"]


ENTRIES = {
    "a.tar": ShardEntry(
        9000,
        "aa" * 32,
        (
            SampleEntry("k0", {"mp4": TarMember(512, 100, 7), "cls": TarMember(1536, 1, 8)}, 3),
            SampleEntry("k1", {"cls": TarMember(2560, 1, 9)}, 1, "label without a clip"),
            SampleEntry(
                "k\udcff", {"jpg": TarMember(3584, 5, 2**32 - 1), "webm": TarMember(4608, 6, 1)}, None, "no label"
            ),
        ),
    ),
    "b.tar": ShardEntry(5000, "bb" * 32, (SampleEntry("k0", {"png": TarMember(512, 4, 1)}, None),)),
}


def test_entries_survive_index_json_and_give_the_columns() -> None:
    raw = json.loads(index_file.format_index({name: to_raw(entry) for name, entry in ENTRIES.items()}))["shards"]
    assert {name: to_entry(value) for name, value in raw.items()} == ENTRIES
    columns = index_file.to_columns(raw, "x")
    assert list(columns.keys) == ["k0", "k1", "k\udcff", "k0"]
    assert Suffixes(columns.suffix) == ["mp4", "", "webm", "png"]  # a video before a picture
    assert columns.offset.tolist() == [512, -1, 4608, 512]
    assert columns.label.tolist() == [3, 1, -1, -1]
    assert columns.errors == {1: "label without a clip", 2: "no label"}
    assert columns.shard(1).keys == ["k0"]
    assert columns.shard(0).errors == columns.errors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        samples: list[tuple[str, bytes, object]] = [(f"k{number}{n}", os.urandom(700), n) for n in range(4)]
        write_shard(tmp_path / f"s-{number}.tar", [*samples, ("bad", b"x", "no number")])
    build_index(sorted(tmp_path.glob("*.tar")))
    return tmp_path


def content(index: SampleIndex) -> tuple[object, ...]:
    arrays = [index.shard, index.offset, index.size, index.crc32, index.label, np.asarray(index.shard_bytes)]
    return *(a.tolist() for a in arrays), list(index.keys), list(index.suffix), index.errors, index.sha256


def test_an_index_of_version_1_is_refused_by_name_and_made_anew_by_sfa_index(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where index.npz holds its samples, as the releases that read it left it."""
    shards = sorted(folder.glob("*.tar"))
    expected = content(load_index(shards))
    (folder / INDEX_NAME).write_text(json.dumps({"version": 1, "shards": {"s-0.tar": {"samples": []}}}))
    refused = (
        rf"{INDEX_NAME} is an index of version 1, .*remove it and run `sfa index {re.escape(str(folder))}/\*\.tar`"
    )
    for read in (load_index, verify_index):
        with pytest.raises(DataError, match=refused):
            read(shards)
    monkeypatch.setattr(index_file, "read_sidecar", lambda *_: pytest.fail("the copy does not count here"))
    build_index(shards)
    monkeypatch.undo()
    assert json.loads((folder / INDEX_NAME).read_text())["version"] == 2
    assert content(load_index(shards)) == expected


def test_the_copy_gives_the_same_and_is_made_anew_when_it_is_not_of_this_index(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = sorted(folder.glob("*.tar"))
    expected = content(load_index(shards))
    assert not (folder / SIDECAR_NAME).exists()  # few samples
    monkeypatch.setattr(index_file, "SIDECAR_FROM", 1)
    assert content(load_index(shards)) == expected
    copy = (folder / SIDECAR_NAME).read_bytes()
    with monkeypatch.context() as blind:
        blind.setattr(index_file, "read_raw", lambda _: pytest.fail("the copy was not used"))
        assert content(load_index(shards)) == expected
        assert content(load_index(shards[::-1][:2])) != expected
    write_shard(shards[1], [("new", b"y" * 2000, 1)])
    build_index(shards[1:2])
    index = load_index(shards)
    assert list(index.keys)[5:6] == ["new"]
    assert (folder / SIDECAR_NAME).read_bytes() != copy
    (folder / SIDECAR_NAME).write_bytes(copy)  # of the index before: it says so itself
    assert content(load_index(shards)) == content(index)


def test_a_damaged_copy_is_not_believed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped bit in a label would train on the wrong class, and nothing else would tell."""
    monkeypatch.setattr(index_file, "SIDECAR_FROM", 1)
    shards = sorted(folder.glob("*.tar"))
    expected = content(load_index(shards))
    copy = (folder / SIDECAR_NAME).read_bytes()
    for place in range(0, len(copy), 37):
        damaged = bytearray(copy)
        damaged[place] ^= 4
        (folder / SIDECAR_NAME).write_bytes(damaged)
        assert content(load_index(shards)) == expected, place
    for size in (0, 10, len(copy) // 2, len(copy) - 1):
        (folder / SIDECAR_NAME).write_bytes(copy[:size])
        assert content(load_index(shards)) == expected, size


def test_a_copy_with_pickles_in_it_is_not_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "SIDECAR_FROM", 1)
    shards = sorted(folder.glob("*.tar"))
    expected = content(load_index(shards))

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(folder / "exploded"),))

    with np.load(folder / SIDECAR_NAME) as arrays:
        kept = dict(arrays)
    np.savez(folder / SIDECAR_NAME, **(kept | {"label": np.array([Bomb()], dtype=object)}))
    assert content(load_index(shards)) == expected
    assert not (folder / "exploded").exists()


def test_a_folder_of_many_shards_in_any_order(folder: Path) -> None:
    shards = sorted(folder.glob("*.tar"))
    index = load_index(shards)
    turned = load_index(shards[::-1])
    assert turned.shards == tuple(shards[::-1])
    assert [turned.name(n) for n in range(5)] == [index.name(n) for n in range(10, 15)]
    assert turned.errors == dict.fromkeys((4, 9, 14), "label b'no number' is not a number from 0 up") == index.errors
    columns = read_columns(folder)
    assert columns is not None
    assert columns.ends.tolist() == [5, 10, 15]
