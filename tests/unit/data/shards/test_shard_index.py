"""Shards: pattern expansion, strict indexing of damaged archives, labels, and the index file."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from data_samples import write_shard

from sfa_dist.data.batches.stream import check_labels
from sfa_dist.data.shards.shard_index import INDEX_NAME, build_index, load_index, verify_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.data.shards.shard_walk import split_name, walk_shard
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import ModelBlock


def tar_bytes(members: list[tuple[str, bytes]], **kwargs: object) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in kwargs.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "a-000000.tar", [(f"k{n}", bytes([n + 1]) * 700, n) for n in range(4)])


def members_of(shard: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(shard) as archive:
        return archive.getmembers()


@pytest.mark.fault(35, 42)
def test_patterns(tmp_path, monkeypatch):
    for name in ("b-0.tar", "b-1.tar", "c[1].tar"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    names = [path.name for path in expand_shards(["b-{0..1}.tar", "b-*.tar", "./b-0.tar", str(tmp_path / "c[1].tar")])]
    assert names == ["b-0.tar", "b-1.tar", "c[1].tar"]
    for pattern in ("b-{0..2}.tar", "x-*.tar", "pipe:cat b-0.tar", "https://host/b.tar"):
        with pytest.raises(DataError) as caught:
            expand_shards([pattern])
        assert pattern in str(caught.value)


@pytest.mark.fault(40)
def test_name_is_split_at_the_last_known_suffix():
    assert split_name("v1.2_clip.mp4") == ("v1.2_clip", "mp4")
    assert split_name("d/x.features.npy") == ("d/x", "features.npy")
    assert split_name("X.MP4") == ("X", "mp4")
    for name in ("x.npy", "x.pkl", "x", "d/.mp4"):
        assert split_name(name) is None


@pytest.mark.fault(39)
def test_table(shard):
    index = load_index([shard])
    assert (len(index), list(index.keys), index.label.tolist()) == (4, ["k0", "k1", "k2", "k3"], [0, 1, 2, 3])
    assert index.shard_sizes.tolist() == [4]
    data = shard.read_bytes()
    assert data[index.offset[2] : index.offset[2] + index.size[2]] == b"\x03" * 700
    again = load_index([shard])  # from index.json
    assert again.sha256 == index.sha256
    assert (again.offset == index.offset).all()
    assert (again.crc32 == index.crc32).all()
    check_labels(index, ModelBlock(size="tiny", classes=4))
    with pytest.raises(DataError, match=r"label 3 of a-000000\.tar/k3 .*model\.classes = 3"):
        check_labels(index, ModelBlock(size="tiny", classes=3))


DAMAGE = {
    "cut in a payload": lambda data, info: data[: info.offset_data + 100],
    "cut in a header": lambda data, info: data[: info.offset + 100],
    "cut at a member": lambda data, info: data[: info.offset],
    "cut in the end marker": lambda data, info: data[: info.offset_data + 1024 + 512],
    "zeroed header": lambda data, info: data[: info.offset] + bytes(512) + data[info.offset + 512 :],
    "garbled header": lambda data, info: data[: info.offset] + b"\xff" * 512 + data[info.offset + 512 :],
    "junk after the end": lambda data, info: data + b"x",
    "empty file": lambda data, info: b"",
    "only zeros": lambda data, info: bytes(10240),
    "not a tar": lambda data, info: b"<html>" * 1000,
}


@pytest.mark.fault(33, 35)
@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_archives_are_refused_with_shard_and_offset(shard, how):
    last = members_of(shard)[-1]
    shard.write_bytes(DAMAGE[how](shard.read_bytes(), last))
    with pytest.raises(DataError, match=r"a-000000\.tar, offset \d+") as caught:
        walk_shard(shard)
    assert "sfa index" in str(caught.value)


@pytest.mark.fault(35, 43)
def test_gzip_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.mp4"))
    with pytest.raises(DataError, match="not a plain"):
        walk_shard(path)


@pytest.mark.fault(38, 41)
@pytest.mark.parametrize(
    ("members", "kwargs", "message"),
    [
        ([("../a.mp4", b"x")], {}, "leads out"),
        ([("/a.mp4", b"x")], {}, "absolute"),
        ([("a.mp4", b"x"), ("a.mp4", b"y")], {}, "repeats"),
        ([("a.mp4", b"x"), ("A.mp4", b"y"), ("a.cls", b"1")], {}, "began at offset"),
        ([("a.mp4", b"")], {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "not a regular file"),
        ([("a.mp4", b"")], {"type": tarfile.FIFOTYPE}, "not a regular file"),
        ([("a.pkl", b"x")], {}, "holds no sample"),
    ],
)
def test_unwanted_members_are_refused(tmp_path, members, kwargs, message):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(members, **kwargs))
    with pytest.raises(DataError, match=message):
        walk_shard(path)


@pytest.mark.fault(36, 39)
def test_labels_are_read_or_given_a_reason(tmp_path):
    cases: dict[str, tuple[list[tuple[str, bytes]], int | tuple[int, int] | None, str | None]] = {
        "newline": ([("cls", b"3\n")], 3, None),
        "word": ([("cls", b"abc")], None, "not a number"),
        "empty": ([("cls", b"")], None, "not a number"),
        "negative": ([("cls", b"-1")], None, "not a number"),
        "float": ([("cls", b"3.0")], None, "not a number"),
        "from_json": ([("json", b'{"label": 5}')], 5, None),
        "json_text": ([("json", b'{"label": "5"}')], None, "not a number"),
        "json_true": ([("json", b'{"label": true}')], None, "not a number"),
        "json_cut": ([("json", b'{"lab')], None, "garbled"),
        "json_list": ([("json", b"[1]")], None, "garbled"),
        "noun_verb": ([("json", b'{"verb": 1, "noun": 2}')], (2, 1), None),
        "noun_text": ([("json", b'{"verb": 1, "noun": "2"}')], None, "noun '2' is not a number"),
        "verb_alone": ([("json", b'{"verb": 1}')], None, "missing label"),
        "none": ([], None, "missing label"),
    }
    members = [(f"{key}.{s}", d) for key, (parts, _, _) in cases.items() for s, d in [("mp4", b"v"), *parts]]
    members += [("no_clip.cls", b"1")]
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(members))
    found = {sample.key: sample for sample in walk_shard(path).samples}
    for key, (_, label, reason) in cases.items():
        assert found[key].label == label, key
        assert reason in found[key].error if reason else found[key].error is None, key
    assert found["no_clip"].error == "label without a clip"
    index = load_index([path])
    assert index.errors[len(index) - 1] == "label without a clip"


@pytest.mark.fault(36, 42)
def test_unknown_suffixes_give_one_warning_and_pickles_are_left_alone(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes([("a.mp4", b"x"), ("a.cls", b"0"), ("a.pyd", b"cos\nsystem\n"), ("README", b"hi")]))
    with pytest.warns(UserWarning, match=r"2 members have unknown suffixes.*'README', 'a\.pyd'"):
        index = load_index([path])
    assert len(index) == 1


@pytest.mark.fault(38)
def test_same_key_in_two_shards_is_two_samples(tmp_path):
    paths = [write_shard(tmp_path / f"s{n}.tar", [("k", bytes([n]) * 9, n)]) for n in range(2)]
    index = load_index(paths)
    assert [index.name(n) for n in range(2)] == ["s0.tar/k", "s1.tar/k"]
    assert index.label.tolist() == [0, 1]


@pytest.mark.fault(33, 34, 45)
def test_a_changed_size_is_an_error_and_a_flipped_bit_is_found_by_verify(shard):
    index = load_index([shard])
    assert verify_index([shard]) == []
    data = bytearray(shard.read_bytes())
    data[index.offset[1] + 5] ^= 1
    shard.write_bytes(data)
    assert verify_index([shard]) == [f"shard {shard}, key 'k1', offset {index.offset[1]}: .mp4 is not what was indexed"]
    shard.write_bytes(data + bytes(512))
    with pytest.raises(DataError, match=r"a-000000\.tar has .*`sfa index"):
        load_index([shard])
    build_index([shard])
    assert len(load_index([shard])) == 4


def test_index_file_is_merged_and_garbled_ones_are_refused(tmp_path, shard):
    other = write_shard(tmp_path / "b.tar", [("k", b"x", 1)])
    load_index([shard])
    load_index([other])
    content = json.loads((tmp_path / INDEX_NAME).read_text())
    assert sorted(content["shards"]) == ["a-000000.tar", "b.tar"]
    assert list(content["shards"]["b.tar"]["members"]) == ["cls", "json", "mp4"]
    assert sorted(os.listdir(tmp_path)) == ["a-000000.tar", "b.tar", INDEX_NAME]  # no temporary file is left
    content["shards"]["b.tar"]["members"]["mp4"][0][0] = 10**9
    for text in (json.dumps(content), "{", '{"version": 99, "shards": {}}', "[]"):
        (tmp_path / INDEX_NAME).write_text(text)
        with pytest.raises(DataError, match=r"not a readable index.*`sfa index"):
            load_index([other])
    build_index([shard, other])
    assert len(load_index([shard, other])) == 5


def test_read_only_folder_is_indexed_in_memory(shard, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)  # root may write anywhere, so the refusal is made here
    with pytest.warns(UserWarning, match="cannot be written"):
        assert len(load_index([shard])) == 4
    assert os.listdir(shard.parent) == [shard.name]


def test_class_names_come_from_the_manifest(tmp_path, shard):
    (tmp_path / "manifest.json").write_text('{"classes": ["a", "b"]}')
    assert load_index([shard]).classes == ["a", "b"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/manifest.json").write_text('{"classes": ["b", "a"]}')
    second = write_shard(tmp_path / "other/b.tar", [("k", b"x", 1)])
    with pytest.raises(DataError, match=r"class lists of .* differ"):
        load_index([shard, second])


@pytest.mark.parametrize("name", [INDEX_NAME, "manifest.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(shard, name):
    load_index([shard])
    (shard.parent / name).unlink(missing_ok=True)
    os.mkfifo(shard.parent / name)
    with pytest.raises(DataError, match=r"no plain file|not a regular file"):
        load_index([shard])
