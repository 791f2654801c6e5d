"""Cached = live: the same batches, crops, verdicts and, within rounding, the same features."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from cached_samples import (
    CROP,
    DATA,
    FRAMES,
    STRIDE,
    STRONG,
    WIDTH,
    extract,
    make_split,
    make_trunk,
    slices_of,
    steps_of,
)
from data_samples import video_bytes, write_shard, write_shards

from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.planned import LoaderSettings
from sfa_dist.data.batches.stream import eval_loader, train_loader
from sfa_dist.data.features import feature_slices
from sfa_dist.data.features.feature_grid import StepGrid
from sfa_dist.data.features.feature_shards import missing_parts, open_view, plan_parts
from sfa_dist.data.features.feature_stream import (
    CachedSplit,
    feature_eval_loader,
    feature_train_loader,
    view_of,
)
from sfa_dist.data.shards.shard_index import SampleIndex, load_index, verify_index
from sfa_dist.errors import CheckpointError
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock, CacheBlock

EXACT = 2 * STRIDE  # all phases
GRID = StepGrid(2, STRIDE, EXACT)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """Videos of 8, 9 and 10 frames; a clip spans 7."""
    return load_index(write_shards(tmp_path_factory.mktemp("shards"), [5, 1, 4, 3]))


@pytest.fixture(scope="module")
def split(index: SampleIndex, tmp_path_factory: pytest.TempPathFactory) -> CachedSplit:
    return make_split(tmp_path_factory.mktemp("cache"), index, EXACT, views=2)


def cached(index: SampleIndex, split: CachedSplit, size: int = 6, micro: int = 2, **options: Any) -> list[Batch]:
    cache = options.pop("cache", CacheBlock(views=len(split.folders), phases=EXACT))
    grid = options.pop("grid", GRID)
    data = DATA.model_copy(update={"workers": options.pop("workers", 0)})
    epoch, start_step = options.pop("epoch", 0), options.pop("start_step", 0)
    own = {"frames": FRAMES, "crop": CROP, **options}
    settings = LoaderSettings(data, BatchBlock(size=size, micro=micro), STRONG, **own)
    return list(feature_train_loader(index, split, grid, cache, settings, epoch=epoch, start_step=start_step))


def live(index: SampleIndex, epoch: int, **options: Any) -> list[Batch]:
    own = {"frames": FRAMES, "crop": CROP, **options}
    return list(train_loader(index, LoaderSettings(DATA, BatchBlock(size=6, micro=2), STRONG, **own), epoch=epoch))


def rows_by_id(batches: list[Batch]) -> dict[int, torch.Tensor]:
    rows: dict[int, torch.Tensor] = {}
    for batch in batches:
        for row, sample in enumerate(batch.ids.tolist()):
            if sample >= 0:
                assert sample not in rows
                rows[sample] = batch.features[row]
    return rows


@pytest.mark.parametrize("epoch", [0, 1])
def test_cached_is_live(index, split, epoch):
    """Invariant 3. Tolerance: 1e-5 of fp32 features, which are about 1; a chunk holds rows of other clips live."""
    trunk = make_trunk()
    fast, slow = cached(index, split, epoch=epoch), live(index, epoch)
    assert len(fast) == len(slow)
    for one, two in zip(fast, slow, strict=True):
        assert all(torch.equal(getattr(one, key), getattr(two, key)) for key in ("ids", "labels", "weights"))
        assert (one.views, one.bad) == (two.views, two.bad)
        expected = trunk(two.clips)
        expected[two.weights == 0] = 0
        assert one.features.dtype == expected.dtype
        torch.testing.assert_close(one.features, expected, rtol=1e-5, atol=1e-5)


def test_a_clip_longer_than_the_video_loops_as_it_does_live(index, split):
    trunk = make_trunk()
    fast, slow = cached(index, split, frames=16), live(index, 0, frames=16)
    for one, two in zip(fast, slow, strict=True):
        good = two.weights > 0
        torch.testing.assert_close(one.features[good], trunk(two.clips)[good], rtol=1e-5, atol=1e-5)


def test_evaluation_is_live_and_exact(index, tmp_path):
    trunk = make_trunk()
    extract(tmp_path / "view-00", index, steps_of(1, centre_frames=FRAMES), 0, trunk)
    split = CachedSplit((tmp_path / "view-00",), WIDTH, torch.float32)
    batch = BatchBlock(micro=3)
    for rank in range(2):
        settings = LoaderSettings(DATA, batch, AugmentBlock(), frames=FRAMES, crop=CROP, rank=rank, world_size=2)
        fast = list(feature_eval_loader(index, split, settings, tubelet=2))
        slow = list(eval_loader(index, settings))
        for one, two in zip(fast, slow, strict=True):
            assert all(torch.equal(getattr(one, key), getattr(two, key)) for key in ("ids", "labels", "weights"))
            good = two.weights > 0
            torch.testing.assert_close(one.features[good], trunk(two.clips)[good], rtol=1e-5, atol=1e-5)


def test_bf16_is_stored_bit_for_bit(index, tmp_path):
    split = make_split(tmp_path, index, EXACT, dtype=torch.bfloat16)
    trunk = make_trunk(torch.bfloat16)
    fast, slow = cached(index, split), live(index, 0)
    for one, two in zip(fast, slow, strict=True):
        assert one.features.dtype == torch.bfloat16
        good = two.weights > 0
        torch.testing.assert_close(one.features[good], trunk(two.clips)[good], rtol=2e-2, atol=2e-2)


def test_ranks_workers_and_resume_change_nothing(index, split):
    expected = cached(index, split)
    for one, two in zip(cached(index, split, workers=2), expected, strict=True):
        assert torch.equal(one.features, two.features)
    for one, two in zip(cached(index, split, start_step=2), expected[6:], strict=True):
        assert torch.equal(one.features, two.features)
    rows = rows_by_id(expected)
    parts = [cached(index, split, micro=1, rank=rank, world_size=3) for rank in range(3)]
    found = rows_by_id([batch for part in parts for batch in part])
    assert found.keys() == rows.keys()
    assert all(torch.equal(found[n], rows[n]) for n in rows)


def test_epochs_take_turns_in_the_views(index, split):
    assert [view_of(epoch, 3) for epoch in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    first, third = (rows_by_id(cached(index, split, epoch=epoch, frames=4)) for epoch in (0, 2))
    again = rows_by_id(cached(index, CachedSplit(split.folders[:1], WIDTH, torch.float32), epoch=2, frames=4))
    assert all(torch.equal(third[n], again[n]) for n in third)
    assert any(not torch.equal(first[n], third[n]) for n in third)  # Another temporal crop of the same view.


# ------------------------------------------------------------------------------------------------ extraction


def test_slices_do_not_grow_with_the_video(tmp_path, monkeypatch):
    """However little may be decoded at a time, the pixels are the same, and no slice has more than 64 frames."""
    index = load_index([write_shard(tmp_path / "x.tar", [("long", video_bytes(20) * 1, 0)])])
    [whole] = slices_of(index, steps_of(EXACT))
    monkeypatch.setattr(feature_slices, "BLOCK_BYTES", 1)
    monkeypatch.setattr(feature_slices, "SLICE_FRAMES", 8)
    small = slices_of(index, steps_of(EXACT))
    assert [piece.clips.shape[2] for piece in small] == [8, 8, 8, 8, 8]
    assert [piece.last for piece in small] == [False] * 4 + [True]
    assert torch.equal(torch.cat([piece.clips for piece in small], dim=2), whole.clips)


def test_stock_webdataset_reads_the_shards(split, index):
    view = split.folders[0]
    samples = []
    for shard in sorted(view.glob("*.tar")):
        samples += list(wds.WebDataset(str(shard), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == index.keys
    for sample, label in zip(samples, index.label, strict=True):
        array = np.load(io.BytesIO(sample["features.npy"]), allow_pickle=False)
        facts = json.loads(sample["json"])
        assert array.shape == (facts["frames"], WIDTH)  # All phases: a step for each frame.
        assert (facts["dtype"], facts["label"], int(sample["cls"])) == ("float32", label, label)
        assert facts["source"].startswith("train-00000")
    assert verify_index(sorted(view.glob("*.tar"))) == []


def test_equal_inputs_give_equal_bytes(split, index, tmp_path):
    again = make_split(tmp_path, index, EXACT)
    for name in ("index.json", "frames.npy", "part-000002-000.tar"):
        assert (again.folders[0] / name).read_bytes() == (split.folders[0] / name).read_bytes()


def test_a_part_that_is_not_whole_is_made_again(index, tmp_path):
    trunk, folder = make_trunk(), tmp_path / "view-00"
    extract(folder, index, steps_of(1), 0, trunk)
    parts = plan_parts(index, 0)
    whole = (folder / "part-000000-000.tar").read_bytes()
    done = {"size": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    (folder / "part-000000-000.json").write_text(json.dumps(done))
    assert [part.name for part in missing_parts(folder, parts, 1)] == [part.name for part in parts[1:]]
    (folder / "part-000000-000.tar").write_bytes(whole[:700] + b"x" + whole[701:])
    assert missing_parts(folder, parts, 1) == parts


# ------------------------------------------------------------------------------------------------ bad samples


def damaged(folder: Path) -> SampleIndex:
    good = video_bytes()
    samples = [
        ("good", good, 0),
        ("flipped", good, 1),
        ("html", b"<html>", 1),
        ("word", good, "cat"),
        ("last", good, 2),
    ]
    path = write_shard(folder / "x.tar", samples)
    index = load_index([path])
    data = bytearray(path.read_bytes())
    data[index.offset[1] + 100] ^= 1
    path.write_bytes(data)
    return load_index([path])


def test_bad_samples_are_those_of_the_live_stream(tmp_path):
    index = damaged(tmp_path)
    split = make_split(tmp_path / "cache", index, EXACT)
    [fast] = cached(index, split, size=5, micro=5)
    settings = LoaderSettings(DATA, BatchBlock(size=5, micro=5), STRONG, frames=FRAMES, crop=CROP)
    [slow] = train_loader(index, settings, epoch=0)
    assert fast.bad == slow.bad != []
    assert torch.equal(fast.weights, slow.weights)
    assert not fast.features[fast.weights == 0].any()


def test_a_damaged_cache_is_bad_samples_and_never_other_features(index, tmp_path):
    split = make_split(tmp_path, index, EXACT)
    view = open_view(split.folders[0])
    shard = view.index.shards[0]
    data = bytearray(shard.read_bytes())
    data[view.index.offset[0] + 200] ^= 1  # In the first sample's features.
    data[view.index.offset[1] + 20] ^= 1  # In the second one's header.
    shard.write_bytes(data)
    open_view.cache_clear()
    bad = dict(entry for batch in cached(index, split) for entry in batch.bad)
    assert sorted(bad) == ["train-000000.tar/clip0000", "train-000000.tar/clip0001"]
    assert all("crc32 mismatch" in reason for reason in bad.values())


# ------------------------------------------------------------------------------------------------ live clips, mixup


def test_some_clips_run_live(index, split):
    trunk, cache = make_trunk(), CacheBlock(views=2, phases=EXACT, live_fraction=0.5)
    stored, mixed = cached(index, split), cached(index, split, cache=cache)
    count = 0
    for one, two in zip(stored, mixed, strict=True):
        features = two.features
        if two.clips is not None:
            assert not features[two.live].any()
            features[two.live] = trunk(two.clips)
            count += len(two.live)
        torch.testing.assert_close(features, one.features, rtol=1e-5, atol=1e-5)
    assert 2 <= count <= 11  # of 13


def test_refresh_begins_when_views_are_seen_again(index, split):
    cache = CacheBlock(views=2, phases=EXACT, refresh=1.0)
    early = [batch for epoch in (0, 1) for batch in cached(index, split, cache=cache, epoch=epoch)]
    assert all(batch.clips is None for batch in early)
    batches = cached(index, split, cache=cache, epoch=2)
    assert sum(len(batch.live) for batch in batches if batch.live is not None) == len(index)
    expected = {n: clip for batch in live(index, 2) for n, clip in zip(batch.ids.tolist(), batch.clips, strict=True)}
    for batch in batches:
        for row, clip in [] if batch.clips is None else zip(batch.live, batch.clips, strict=True):
            assert torch.equal(clip, expected[int(batch.ids[row])])  # The augmentation of this epoch.


def test_mixup_pairs_the_global_batch_whatever_the_ranks(index, split):
    cache = CacheBlock(views=2, phases=EXACT, mixup=0.5)
    plain = rows_by_id(cached(index, split))
    mixed = cached(index, split, cache=cache, micro=6)
    for batch in mixed:
        ids = batch.ids.tolist()
        for row, sample in enumerate(ids):
            other = ids[len(ids) - 1 - row]
            if sample < 0:
                continue
            share = float(batch.mix.shares[row])
            if other < 0:
                assert share == 1.0
                assert torch.equal(batch.features[row], plain[sample])
                continue
            expected = share * plain[sample] + (1 - share) * plain[other]
            torch.testing.assert_close(batch.features[row], expected)
            assert int(batch.mix.partners[row]) == index.label[other]
    assert len({float(batch.mix.shares.min()) for batch in mixed}) == len(mixed)  # Each step draws anew.
    expected = rows_by_id(mixed)
    for world, micro in ((1, 1), (2, 2), (3, 1)):
        parts = [cached(index, split, cache=cache, micro=micro, rank=rank, world_size=world) for rank in range(world)]
        found = rows_by_id([batch for part in parts for batch in part])
        assert all(torch.equal(found[n], expected[n]) for n in expected)


# ------------------------------------------------------------------------------------------------ damage of records


@pytest.mark.parametrize("damage", ["frames.npy", "a value of the manifest", "a shard of another view", "unsealed"])
def test_a_view_that_is_not_what_was_written_is_refused(index, tmp_path, damage):
    folder, other = tmp_path / "view-00", tmp_path / "view-01"
    for place, view in ((folder, 0), (other, 1)):
        extract(place, index, steps_of(1), view, make_trunk())
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    if damage == "frames.npy":
        data = bytearray((folder / "frames.npy").read_bytes())
        data[-8] ^= 1
        (folder / "frames.npy").write_bytes(data)
    elif damage == "a value of the manifest":
        path.write_text(json.dumps({**manifest, "trunk_sha256": "0"}))
    elif damage == "a shard of another view":
        for name in (*manifest["shards"], "index.json"):
            (folder / name).write_bytes((other / name).read_bytes())
    else:  # A cache of before.
        path.write_text(json.dumps({k: v for k, v in manifest.items() if k not in ("sha256", "manifest sha256")}))
        assert len(open_view(folder).index) == len(index)
        return
    with pytest.raises(CheckpointError, match=r"manifest\.json|frames\.npy|part-000000-000\.tar"):
        open_view(folder)
