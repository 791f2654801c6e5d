"""Rows 44 to 48 of the fault catalogue: sets of few shards, edited ones, and ones with nothing good in them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from commands import train_ranks
from data_samples import write_shard, write_shards
from row_shards import CLIPS, DATA
from tiny_runs import SHORT, START, events, log_lines, make_workplace, sets

from sfa_dist.data.batches.planned import LoaderSettings
from sfa_dist.data.batches.stream import train_loader
from sfa_dist.data.shards.shard_index import build_index, load_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock


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
            blocks = BatchBlock(size=batch, micro=2)
            settings = LoaderSettings(data, blocks, AugmentBlock(), 2, 16, rank=rank, world_size=world)
            loader = train_loader(index, settings, epoch=0)
            lengths.add(len(loader))
            seen += [int(n) for one in loader for n in one.ids[one.weights > 0]]
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
    from sfa_dist.data.shards import shard_names as shards

    names = [str(path) for path in write_shards(tmp_path, [1, 2, 3, 1])]
    expected = load_index(expand_shards([str(tmp_path / "*.tar")]))
    real = shards.iglob
    shuffler = random.Random(0)
    for _ in range(5):
        monkeypatch.setattr(
            shards,
            "iglob",
            lambda pattern, **options: shuffler.sample(found := list(real(pattern, **options)), len(found)),
        )
        shuffler.shuffle(names)
        for patterns in (names, [str(tmp_path / "*.tar")]):
            index = load_index(expand_shards(patterns))
            assert (index.sha256, index.shards) == (expected.sha256, expected.shards)


SHORT_STAGE1 = SHORT.replace("stage2: {frames: 8, chunk_frames: 4}\n", "")


@pytest.fixture
def all_damaged(tmp_path: Path) -> Path:
    """A workplace in which each training clip is damaged after it was indexed."""
    place = make_workplace(tmp_path, SHORT_STAGE1)
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
    arguments = (*START, "run")
    ended = [rank.wait() for rank in train_ranks(2, all_damaged, *arguments)]
    assert [rank.code for rank in ended] == [65, 65]
    assert "8 of 8 clips are bad, over data.max_bad_fraction 0.01" in ended[0].err
    assert "most in part-00000" in ended[0].err
    assert len(events(all_damaged / "run", "bad_sample")) == 8


@pytest.mark.fault(48)
def test_row_48_a_step_without_a_clip_is_no_nan_and_no_hang(all_damaged: Path) -> None:
    """Where the budget allows even that: the loss of nothing is 0, and no weight moves."""
    arguments = (*START, "run", *sets("data.max_bad_fraction=1.0"))
    ended = [rank.wait() for rank in train_ranks(2, all_damaged, *arguments)]
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    steps = [line for line in log_lines(all_damaged / "run") if line["kind"] == "train"]
    assert [line["loss"] for line in steps] == [0.0] * 3
    assert steps[-1]["bad_samples"] == 24
