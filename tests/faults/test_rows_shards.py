"""Rows 33 to 48 of the fault catalogue: shards that are cut, edited, hostile or odd, and what is in them."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import train_ranks
from data_samples import encode, write_shard, write_shards
from odd_samples import blocks
from test_rows_video import peak_mib, reset_peak
from tiny_runs import RECIPE, events, log_lines, make_workplace, sets

from sfa_dist.data.loader import Batch
from sfa_dist.data.shard_index import SampleIndex, build_index, load_index
from sfa_dist.data.shard_walk import walk_shard
from sfa_dist.data.shards import expand_shards
from sfa_dist.data.stream import eval_loader, train_loader
from sfa_dist.errors import DataError
from sfa_dist.recipe_blocks import AugmentBlock, BatchBlock, DataBlock, LimitsBlock
from sfa_dist.tools import cli

DATA = DataBlock(resize=32, stride=1, workers=0, decoder="pyav")
CLIPS = [encode([blocks(10 * n + k, 32, 32) for k in range(4)]) for n in range(5)]


def evaluate(index: SampleIndex, data: DataBlock = DATA) -> Batch:
    """All samples of the index in one batch."""
    (only,) = eval_loader(index, data, BatchBlock(micro=1, eval_micro=len(index)), frames=4, crop=32)
    return only


def sfa(*arguments: str) -> int:
    """The exit code of the `sfa` command."""
    return cli.main(list(arguments))


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


# ------------------------------------------------------------------------------------------------ 33, 34, 35: damage


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
    bad = dict(batch["bad"])
    for n, weight in enumerate(batch["weights"].tolist()):
        assert bool(weight) != (f"x.tar/c{n}" in bad)
        if weight:
            assert torch.equal(batch["clips"][n], whole["clips"][n])
            assert batch["labels"][n] == n
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
    assert batch["labels"].tolist() == [0, 1, 2, 10, 11, 12]
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
    assert (batch["weights"].tolist(), batch["labels"].tolist()) == ([0, 1], [0, 3])
    ((key, reason),) = batch["bad"]
    assert key == "x.tar/a"
    assert text in reason
    assert "is not a number from 0 up" in reason


@pytest.mark.fault(39)
@pytest.mark.parametrize("label", ["NaN", "[0.5, NaN]", "1.5", "-1", "1e400", "null", '"3"'])
def test_row_39_a_label_in_json_that_is_no_class_number_is_a_bad_sample(label: str, tmp_path: Path) -> None:
    members = [("a.mp4", CLIPS[0]), ("a.json", f'{{"label": {label}}}'.encode())]
    batch = evaluate(load_index([tar_of(tmp_path / "x.tar", members)]))
    assert batch["weights"].tolist() == [0]
    assert "is not a number from 0 up" in batch["bad"][0][1]


KEYS = ["v1.2_clip", "UPPER", "übung/日本", "x" * 300, "two\nlines", "a.mp4.b", "tab\there", "sign;rm -rf"]


@pytest.mark.fault(40)
def test_row_40_any_key_is_one_sample_and_one_line(tmp_path: Path) -> None:
    members = [(f"{key}.{kind}", data) for n, key in enumerate(KEYS) for kind, data in (("MP4", b"x"), ("cls", b"1"))]
    index = load_index([tar_of(tmp_path / "x.tar", members)])
    assert list(index.keys) == KEYS
    assert list(load_index([tmp_path / "x.tar"]).keys) == KEYS  # from index.json
    batch = evaluate(index)
    names = [key for key, _ in batch["bad"]]
    assert len(set(names)) == len(KEYS)
    assert all(name.isascii() and name.isprintable() for name in names)
    assert "x.tar/two\\nlines" in names


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
    assert batch["weights"].tolist() == [1, 0, 0]
    assert [key for key, _ in batch["bad"]] == ["x.tar/b", "x.tar/d"]
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
    assert batch["weights"].tolist() == [0, 1]
    assert "3221225472 bytes (data.limits.mib is 100)" in batch["bad"][0][1]


# ------------------------------------------------------------------------------------------------ 44 to 48: sets


@pytest.mark.fault(44)
@pytest.mark.parametrize(("sizes", "batch"), [([1], 8), ([1, 1], 2), ([3], 64), ([2, 5], 3)])
def test_row_44_few_shards_and_few_clips_are_seen_once_by_many_ranks(
    sizes: list[int], batch: int, tmp_path: Path
) -> None:
    index = load_index(write_shards(tmp_path, sizes))
    data = DATA.model_copy(update={"workers": 2})
    for world in (1, 4):
        seen: list[int] = []
        lengths = set()
        for rank in range(world):
            loader = train_loader(
                index, data, AugmentBlock(), BatchBlock(size=batch, micro=2), frames=2, crop=16, seed=0, epoch=0,
                rank=rank, world_size=world,
            )  # fmt: skip
            lengths.add(len(loader))
            seen += [int(n) for one in loader for n in one["ids"][one["weights"] > 0]]
        assert sorted(seen) == list(range(sum(sizes)))
        assert len(lengths) == 1  # all ranks take equally many steps


@pytest.mark.fault(45)
def test_row_45_a_shard_that_was_edited_is_named_before_the_start(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "x.tar", [("a", CLIPS[0], 0)])
    before = load_index([shard]).sha256
    write_shard(shard, [("a", CLIPS[0], 0), ("b", CLIPS[1], 1)])
    with pytest.raises(DataError, match=r"x\.tar has \d+ bytes, its index says \d+: it was cut or replaced"):
        load_index([shard])
    build_index([shard])
    assert load_index([shard]).sha256 != before  # and a run that had begun is refused by this


@pytest.mark.fault(46)
def test_row_46_the_order_in_which_shards_are_found_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfa_dist.data import shards

    names = [str(path) for path in write_shards(tmp_path, [1, 2, 3, 1])]
    expected = load_index(expand_shards([str(tmp_path / "*.tar")]))
    real = shards.glob
    shuffler = random.Random(0)
    for _ in range(5):
        monkeypatch.setattr(
            shards, "glob", lambda pattern, **options: shuffler.sample(found := real(pattern, **options), len(found))
        )
        shuffler.shuffle(names)
        for patterns in (names, [str(tmp_path / "*.tar")]):
            index = load_index(expand_shards(patterns))
            assert (index.sha256, index.shards) == (expected.sha256, expected.shards)


SHORT = RECIPE[: RECIPE.index("image:\n")].replace("epochs: 2", "epochs: 1") + (
    'stage1: {frames: 4}\nlog: {every: 1, wandb: "off"}\n'
)


@pytest.fixture
def all_damaged(tmp_path: Path) -> Path:
    """A workplace in which each training clip is damaged after it was indexed."""
    place = make_workplace(tmp_path, SHORT)
    shards = sorted((place / "train").glob("*.tar"))
    index = load_index(shards)
    for shard in shards:
        data = bytearray(shard.read_bytes())
        for n in range(len(index)):
            if index.shards[index.shard[n]] == shard:
                data[int(index.offset[n]) + int(index.size[n]) // 2] ^= 0xFF
        shard.write_bytes(data)
    return place


@pytest.mark.fault(48)
def test_row_48_nothing_but_bad_clips_ends_with_65_on_all_ranks(all_damaged: Path) -> None:
    arguments = ("--recipe", "t.yaml", "--run-dir", "run")
    ended = [rank.wait() for rank in train_ranks(2, all_damaged, *arguments)]
    assert [rank.code for rank in ended] == [65, 65]
    assert "8 of 8 clips are bad, over data.max_bad_fraction 0.01" in ended[0].err
    assert "most in part-00000" in ended[0].err
    assert len(events(all_damaged / "run", "bad_sample")) == 8


@pytest.mark.fault(48)
def test_row_48_a_step_without_a_clip_is_no_nan_and_no_hang(all_damaged: Path) -> None:
    """Where the budget allows even that: the loss of nothing is 0, and no weight moves."""
    arguments = ("--recipe", "t.yaml", "--run-dir", "run", *sets("data.max_bad_fraction=1.0"))
    ended = [rank.wait() for rank in train_ranks(2, all_damaged, *arguments)]
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    steps = [line for line in log_lines(all_damaged / "run") if line["kind"] == "train"]
    assert [line["loss"] for line in steps] == [0.0] * 3
    assert steps[-1]["bad_samples"] == 24
