"""Each injector of `sfa chaos` does what it says."""

from __future__ import annotations

import errno
import os
import pickle
import random
import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from sfa_dist.chaos import injectors
from sfa_dist.chaos.builtin import noisy_samples
from sfa_dist.chaos.workplace import write_shards
from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import load_index, verify_index
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.errors import DataError


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_shards(tmp_path / "shards", noisy_samples(7, seed=3))


@pytest.fixture
def chance() -> random.Random:
    return random.Random(5)


def test_cut_flipped_deleted_swapped_files(tmp_path: Path, chance: random.Random) -> None:
    before = {
        name: bytes(range(start, 200)) for name, start in (("cut", 0), ("flip", 1), ("gone", 2), ("one", 3), ("two", 4))
    }
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    injectors.truncate(tmp_path / "cut", chance)
    cut = (tmp_path / "cut").read_bytes()
    assert 0 < len(cut) < len(before["cut"])
    assert before["cut"].startswith(cut)
    injectors.flip_bit(tmp_path / "flip", chance)
    pairs = zip((tmp_path / "flip").read_bytes(), before["flip"], strict=True)
    assert [(a ^ b).bit_count() for a, b in pairs if a != b] == [1]
    injectors.delete(tmp_path / "gone", chance)
    assert not (tmp_path / "gone").exists()
    injectors.swap(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == before["two"]
    assert (tmp_path / "two").read_bytes() == before["one"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "flip", "one", "two"]


def test_the_hostile_pickle_is_one(tmp_path: Path) -> None:
    """Whoever loads it is harmed, or its refusal would prove nothing."""
    payload = injectors.pickle_that_touches(tmp_path / "canary")
    assert not (tmp_path / "canary").exists()
    pickle.loads(payload)
    assert (tmp_path / "canary").exists()


def test_hostile_members_harm_a_reader_that_decodes_by_suffix(shards: list[Path], tmp_path: Path) -> None:
    injectors.add_hostile_members(shards[0], tmp_path / "canary")
    with tarfile.open(shards[0]) as archive:
        assert sum(member.name.endswith((".pyd", ".pkl", ".pickle", ".pth")) for member in archive) == 4
    # `pkl` alone, as a stock reader would meet it first.
    stock = wds.WebDataset(str(shards[0]), shardshuffle=False, handler=wds.ignore_and_continue)
    for _ in stock.decode(handler=wds.ignore_and_continue):
        pass
    assert (tmp_path / "canary").exists()


def test_a_damaged_clip_is_that_clip_alone(shards: list[Path], chance: random.Random) -> None:
    name = injectors.damage_clip(shards[1], chance)
    index = load_index(shards)
    bad = []
    for sample in range(len(index)):
        try:
            read_clip_bytes(index, sample)
        except BadSample:
            bad.append(index.name(sample))
    assert bad == [name]
    assert len(verify_index(shards)) == 1


def test_all_clips_damaged(shards: list[Path], chance: random.Random) -> None:
    assert sum(injectors.damage_all_clips(shard, chance) for shard in shards) == 7
    index = load_index(shards)
    for sample in range(len(index)):
        with pytest.raises(BadSample, match="crc32"):
            read_clip_bytes(index, sample)


def test_a_replaced_shard_is_a_good_one(shards: list[Path]) -> None:
    before = load_index(shards)
    injectors.drop_last_sample(shards[0])
    with pytest.raises(DataError, match="cut or replaced"):
        load_index(shards)
    injectors.forget_index(shards[0].parent)
    after = load_index(shards)
    assert len(after) == len(before) - 1
    assert after.sha256 != before.sha256
    assert not after.errors


def fill(folder: str, said: str) -> None:
    try:
        (Path(folder) / "file").write_bytes(bytes(1_000_000))
    except OSError as error:
        Path(said).write_text(errno.errorcode[error.errno or 0])


@pytest.mark.skipif(not injectors.can_mount(), reason="no mounts of one's own here")
def test_a_small_disk_is_full_for_its_process_alone(tmp_path: Path) -> None:
    disk, kept, said = tmp_path / "disk", tmp_path / "kept", tmp_path / "said"
    disk.mkdir()
    if (child := os.fork()) == 0:
        try:
            at_end = injectors.small_disk(disk, 100_000, kept)()
            fill(str(disk), str(said))
            assert at_end is not None
            at_end()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert said.read_text() == "ENOSPC"
    assert 0 < (kept / "file").stat().st_size < 1_000_000
    assert not list(disk.iterdir())
