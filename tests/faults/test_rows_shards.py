"""Rows 33 to 40 of the fault catalogue: shards that are cut or odd, and what is in them."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import write_shard
from row_shards import CLIPS, evaluate, tar_of

from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.data.shards.shard_walk import walk_shard
from sfa_dist.errors import DataError
from sfa_dist.tools import cli


def sfa(*arguments: str) -> int:
    """The exit code of the `sfa` command."""
    return cli.main(list(arguments))


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


# What is done to a shard's bytes, given the header of the third sample's video.
DAMAGE: dict[str, Callable[[bytes, tarfile.TarInfo], bytes]] = {
    "cut in a payload": lambda data, info: data[: info.offset_data + 100],
    "cut in a header": lambda data, info: data[: info.offset + 100],
    "cut between two members": lambda data, info: data[: info.offset],
    "garbled header": lambda data, info: data[: info.offset] + b"\xff" * 512 + data[info.offset + 512 :],
    "zeroed header": lambda data, info: data[: info.offset] + bytes(512) + data[info.offset + 512 :],
    "zeroed block of a payload": lambda data, info: (
        data[: info.offset_data + 512] + bytes(512) + data[info.offset_data + 1024 :]
    ),
    "flipped bit": lambda data, info: flipped(data, info.offset_data + 700),
    "nothing left": lambda data, info: b"",
    "random bytes": lambda data, info: np.random.default_rng(0).bytes(len(data)),
}


@pytest.mark.fault(33, 34, 35)
@pytest.mark.parametrize("how", DAMAGE)
def test_row_33_damage_after_indexing_is_found_and_never_trained_on(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shard = write_shard(tmp_path / "x.tar", [(f"c{n}", clip, n) for n, clip in enumerate(CLIPS)])
    index = load_index([shard])
    whole = evaluate(index)
    with tarfile.open(shard) as archive:
        info = next(member for member in archive if member.name == "c2.mp4")
    shard.write_bytes(DAMAGE[how](shard.read_bytes(), info))

    assert sfa("index", str(shard), "--verify") == 65
    told = capsys.readouterr().err
    assert "x.tar" in told
    assert "offset" in told

    batch = evaluate(index)  # the run had started: each clip is what it was, or counts as bad
    bad = dict(batch.bad)
    for n, weight in enumerate(batch.weights.tolist()):
        assert bool(weight) != (f"x.tar/c{n}" in bad)
        if weight:
            assert torch.equal(batch.clips[n], whole.clips[n])
            assert batch.labels[n] == n
    lost = {"nothing left": 5, "random bytes": 5, "garbled header": 0, "zeroed header": 0, "flipped bit": 1}
    lost |= {"zeroed block of a payload": 1}
    assert len(bad) == lost.get(how, 3)


@pytest.mark.fault(35)
def test_row_35_a_shard_without_members_is_named(tmp_path: Path) -> None:
    empty = tar_of(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match=r"empty\.tar, offset 0: holds no sample"):
        load_index([empty])
    with pytest.raises(DataError, match=r"gone\.tar"):
        expand_shards([str(tmp_path / "gone.tar")])


@pytest.mark.fault(37)
def test_row_37_a_cut_shard_lends_its_label_to_no_other(tmp_path: Path) -> None:
    """Keys start anew in each shard. Shard 0 ends inside the label of its last clip, so a reader that groups
    neighbours would take the label of the same key in shard 1."""
    shards = []
    for number in range(2):
        members = [(f"{n:06d}.{kind}", data) for n in range(3) for kind, data in parts(n, number)]
        shards.append(tar_of(tmp_path / f"s{number}.tar", members))
    index = load_index(shards)
    with tarfile.open(shards[0]) as archive:
        label = archive.getmembers()[-1]
    assert label.name == "000002.cls"
    shards[0].write_bytes(shards[0].read_bytes()[: label.offset_data])
    batch = evaluate(index)  # by the places that were indexed before
    assert batch.labels.tolist() == [0, 1, 2, 10, 11, 12]
    (tmp_path / "index.json").unlink()
    with pytest.raises(DataError, match=r"s0\.tar, offset"):
        load_index(shards)


def parts(n: int, shard: int) -> list[tuple[str, bytes]]:
    return [("mp4", CLIPS[n]), ("cls", str(10 * shard + n).encode())]


@pytest.mark.fault(36, 38)
def test_row_38_an_error_names_both_places(tmp_path: Path) -> None:
    video, label = ("mp4", CLIPS[0]), ("cls", b"0")
    twice = [(f"a.{kind}", data) for kind, data in (video, label, video)]
    apart = [("a.mp4", CLIPS[0]), ("b.mp4", CLIPS[1]), ("b.cls", b"1"), ("a.cls", b"0")]
    for members, word in ((twice, r"repeats 'a\.mp4', which is also at offset 512"), (apart, r"began at offset 512")):
        path = tar_of(tmp_path / "x.tar", members)
        with pytest.raises(DataError, match=rf"x\.tar, offset \d+: .*{word}"):
            walk_shard(path)


@pytest.mark.fault(39)
@pytest.mark.parametrize(
    ("label", "text"),
    [
        (b"abc", "'abc'"),
        (b"", "''"),
        (b"-1", "'-1'"),
        (b"1e9", "'1e9'"),
        (b"3.0", "'3.0'"),
        (b"nan", "'nan'"),
        (b"9" * 30, "999"),
        ("٣".encode(), "label"),
        (b"\xff\xfe", "label"),
    ],
)
def test_row_39_a_label_that_is_no_class_number_is_a_bad_sample(label: bytes, text: str, tmp_path: Path) -> None:
    members = [("a.mp4", CLIPS[0]), ("a.cls", label), ("b.mp4", CLIPS[1]), ("b.cls", b"3\n")]
    batch = evaluate(load_index([tar_of(tmp_path / "x.tar", members)]))
    assert (batch.weights.tolist(), batch.labels.tolist()) == ([0, 1], [0, 3])
    ((key, reason),) = batch.bad
    assert key == "x.tar/a"
    assert text in reason
    assert "is not a number from 0 up" in reason


@pytest.mark.fault(39)
@pytest.mark.parametrize("label", ["NaN", "[0.5, NaN]", "1.5", "-1", "1e400", "null", '"3"'])
def test_row_39_a_label_in_json_that_is_no_class_number_is_a_bad_sample(label: str, tmp_path: Path) -> None:
    members = [("a.mp4", CLIPS[0]), ("a.json", f'{{"label": {label}}}'.encode())]
    batch = evaluate(load_index([tar_of(tmp_path / "x.tar", members)]))
    assert batch.weights.tolist() == [0]
    assert "is not a number from 0 up" in batch.bad[0][1]


KEYS = ["v1.2_clip", "UPPER", "übung/日本", "x" * 300, "two\nlines", "a.mp4.b", "tab\there", "sign;rm -rf"]


@pytest.mark.fault(40)
def test_row_40_any_key_is_one_sample_and_one_line(tmp_path: Path) -> None:
    members = [(f"{key}.{kind}", data) for n, key in enumerate(KEYS) for kind, data in (("MP4", b"x"), ("cls", b"1"))]
    index = load_index([tar_of(tmp_path / "x.tar", members)])
    assert list(index.keys) == KEYS
    assert list(load_index([tmp_path / "x.tar"]).keys) == KEYS  # from index.json
    batch = evaluate(index)
    names = [key for key, _ in batch.bad]
    assert len(set(names)) == len(KEYS)
    assert all(name.isascii() and name.isprintable() for name in names)
    assert "x.tar/two\\nlines" in names
