"""The whole way from shards to batches: exactly once, the same for any workers and ranks, bad samples counted."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import frame_level, video_bytes, write_shard, write_shards
from faulty_decoder import faulty_decoder

from sfa_dist.data.batches import augment
from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.planned import ClipSettings, LoaderSettings
from sfa_dist.data.batches.stream import EvalViews, eval_loader, train_loader
from sfa_dist.data.sampling.clip_sampling import frame_indices, view_offsets
from sfa_dist.data.shards import retry
from sfa_dist.data.shards.shard_index import SampleIndex, load_index
from sfa_dist.data.video.decode import decoder_of
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock, DataBlock

DATA = DataBlock(resize=28, stride=1, workers=0, decoder="pyav", shuffle_shards=2)
PLAIN = AugmentBlock(scale_jitter=None, flip=0.0, color=0.0, gray=0.0)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return load_index(write_shards(tmp_path_factory.mktemp("shards"), [5, 1, 4, 3]))


def train(index: SampleIndex, workers: int = 0, size: int = 6, micro: int = 2, **options: Any) -> list[Batch]:
    epoch, start_step = options.pop("epoch", 0), options.pop("start_step", 0)
    data = options.pop("data", DATA).model_copy(update={"workers": workers})
    augment = options.pop("augment", AugmentBlock())
    own = {"frames": 4, "crop": 24, "seed": 3, **options}
    settings = LoaderSettings(data, BatchBlock(size=size, micro=micro), augment, **own)
    return list(train_loader(index, settings, epoch=epoch, start_step=start_step))


def evaluate(index: SampleIndex, micro: int = 2, data: DataBlock = DATA, **options: Any) -> list[Batch]:
    views = {name: options.pop(name) for name in ("temporal_views", "spatial_views") if name in options}
    own = {"frames": 4, "crop": 24, **options}
    settings = LoaderSettings(data, BatchBlock(micro=1, eval_micro=micro), AugmentBlock(), **own)
    return list(eval_loader(index, settings, **views))


def by_id(batches: list[Batch]) -> dict[int, torch.Tensor]:
    rows: dict[int, torch.Tensor] = {}
    for batch in batches:
        views = batch.clips.unflatten(0, (-1, batch.views))
        for row, sample in enumerate(batch.ids.tolist()):
            if sample >= 0:
                assert sample not in rows
                rows[sample] = views[row]
    return rows


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(getattr(a, key), getattr(b, key))
        for a, b in zip(first, second, strict=True)
        for key in ("clips", "labels", "weights", "ids")
    )


def test_a_batch(index):
    batches = train(index)
    assert len(batches) == 3 * 3  # 13 samples in 3 steps of 6, in 3 parts of 2
    first, last = batches[0], batches[-1]
    assert (first.clips.shape, first.clips.dtype) == ((2, 3, 4, 24, 24), torch.uint8)
    assert (first.labels.dtype, first.weights.dtype, first.ids.dtype) == (
        torch.int64,
        torch.float32,
        torch.int64,
    )
    assert first.labels.tolist() == [index.label[n] for n in first.ids]
    assert first.weights.tolist() == [1, 1]
    assert (first.views, first.bad) == (1, [])
    assert last.ids.tolist() == [-1, -1]
    assert last.weights.tolist() == [0, 0]
    assert not last.clips.any()
    assert sorted(by_id(batches)) == list(range(13))


def test_loader_workers_change_nothing(index):
    state = torch.get_rng_state()
    expected = train(index)
    assert torch.equal(torch.get_rng_state(), state)  # the loader leaves the model's random numbers alone
    assert same(train(index, workers=2), expected)


@pytest.mark.fault(67)
def test_ranks_and_resume_change_nothing(index):
    expected = by_id(train(index))
    for world, micro in ((2, 1), (3, 2), (8, 1)):
        parts = [train(index, micro=micro, rank=rank, world_size=world) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        found = by_id([batch for part in parts for batch in part])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert same(train(index, start_step=2), train(index)[6:])
    assert not same(train(index, epoch=1), train(index))


def test_the_clip_is_the_right_frames_in_time(index):
    batches = train(index, augment=PLAIN)
    for clip in by_id(batches).values():
        levels = clip[0].float().mean(dim=(0, 2, 3))  # (T,)
        assert np.allclose(np.diff(levels), frame_level(1) - frame_level(0), atol=3)


def test_shuffled_frames_are_the_same_frames_in_another_order(index):
    shuffled = DATA.model_copy(update={"frame_order": "shuffled"})
    for run in (lambda data: train(index, data=data, augment=PLAIN), lambda data: evaluate(index, data=data)):
        plain, mixed = by_id(run(DATA)), by_id(run(shuffled))
        levels = [{n: clip.float().mean(dim=(1, 3, 4))[0] for n, clip in rows.items()} for rows in (plain, mixed)]
        assert all(torch.equal(levels[0][n].sort().values, levels[1][n].sort().values) for n in plain)
        assert sum(not torch.equal(levels[0][n], levels[1][n]) for n in plain) > 6
        assert all(torch.equal(mixed[n], clip) for n, clip in by_id(run(shuffled)).items())


def test_evaluation_sees_each_clip_once_with_all_views(index):
    whole = evaluate(index, temporal_views=2, spatial_views=3)
    assert whole[0].clips.shape == (2 * 6, 3, 4, 24, 24)
    assert whole[0].views == 6
    assert whole[0].ids.tolist() == [0, 1]
    rows = by_id(whole)
    assert sorted(rows) == list(range(13))
    first, second = rows[0][0].float().mean(), rows[0][3].float().mean()
    assert float(second - first) == pytest.approx(4 * 12, abs=3)  # 8 frames: windows at 0 and 4
    parts = [evaluate(index, temporal_views=2, spatial_views=3, rank=rank, world_size=3) for rank in range(3)]
    assert {len(part) for part in parts} == {3}
    again = by_id([batch for part in parts for batch in part])
    assert all(torch.equal(again[n], rows[n]) for n in rows)


@pytest.mark.fault(51)
def test_short_videos_loop_and_static_clips_stand_still(index):
    looped = by_id(evaluate(index, frames=16))[0][0]
    assert torch.equal(looped[:, :8], looped[:, 8:])
    still = by_id(evaluate(index, data=DATA.model_copy(update={"stride": 0})))[0][0]
    assert torch.equal(still, still[:, :1].expand_as(still))


def damaged(folder: Path) -> SampleIndex:
    """Five samples; one has a flipped bit, one is no video, one has no label."""
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


@pytest.mark.fault(34, 36, 39, 49)
def test_bad_samples_have_no_weight_and_a_reason_and_are_not_replaced(tmp_path):
    index = damaged(tmp_path)
    for batch in (train(index, size=5, micro=5)[0], evaluate(index, micro=5)[0]):
        assert sorted(batch.ids.tolist()) == list(range(5))
        weights = dict(zip(batch.ids.tolist(), batch.weights.tolist(), strict=True))
        assert weights == {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 1.0}
        reasons = dict(batch.bad)
        assert "crc32 mismatch" in reasons["x.tar/flipped"]
        assert "not a mp4" in reasons["x.tar/html"]
        assert "not a number" in reasons["x.tar/word"]
        assert len(reasons) == 3
        rows = {n: batch.clips[row] for row, n in enumerate(batch.ids.tolist())}
        assert not rows[1].any()
        assert rows[0].any()


@pytest.mark.fault(33, 35)
def test_a_cut_or_lost_shard_at_run_time_is_bad_samples(tmp_path):
    paths = write_shards(tmp_path, [2, 2])
    index = load_index(paths)
    paths[0].write_bytes(paths[0].read_bytes()[:1000])
    paths[1].unlink()
    batch = evaluate(index, micro=4)[0]
    assert batch.weights.tolist() == [0, 0, 0, 0]
    assert "was cut" in batch.bad[0][1]
    assert "No such file" in batch.bad[3][1]


@pytest.mark.fault(47)
def test_a_read_that_fails_once_is_tried_again(tmp_path, monkeypatch):
    index = load_index(write_shards(tmp_path, [1]))
    calls = []
    real = os.pread

    def flaky(file: int, size: int, offset: int) -> bytes:
        calls.append(offset)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        return real(file, min(size, 100), offset)  # and short reads are put together

    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(os, "pread", flaky)
    assert evaluate(index, micro=1)[0].weights.tolist() == [1]
    assert len(calls) > 2


def test_pictures_are_videos_of_one_frame(tmp_path):
    import io

    import webdataset as wds
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    path = tmp_path / "x.tar"
    with wds.TarWriter(str(path), encoder=False) as writer:
        writer.write({"__key__": "a", "png": file.getvalue(), "cls": b"0"})
    clip = by_id(evaluate(load_index([path]), data=DATA.model_copy(update={"resize": 24})))[0][0]
    assert torch.equal(clip, torch.from_numpy(pixels).permute(2, 0, 1)[:, None].expand(3, 4, 24, 24))


@pytest.mark.fault(8)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_workers_ignore_the_signals_that_stop_a_run(index, name):
    data, batch = DATA.model_copy(update={"workers": 1}), BatchBlock(size=6, micro=6)
    settings = LoaderSettings(data, batch, PLAIN, frames=4, crop=24, decoder=faulty_decoder(name))
    loader = train_loader(index, settings, epoch=0)
    assert len(list(loader)) == len(loader)


def test_the_loader_can_be_sent_to_a_fresh_process(index):
    loader = train_loader(index, LoaderSettings(DATA, BatchBlock(), AugmentBlock(), frames=4, crop=24), epoch=0)
    assert len(pickle.loads(pickle.dumps(loader.dataset))) == len(loader)


def test_each_decoded_frame_is_resized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all spatial views, and where temporal views overlap or loop."""
    resized, seen = augment.resized, []

    def counted(frames: torch.Tensor, *arguments: Any) -> torch.Tensor:
        seen.append(len(frames))
        return resized(frames, *arguments)

    monkeypatch.setattr(augment, "resized", counted)
    for length, stride in ((20, 1), (20, 3), (3, 1)):
        data = DATA.model_copy(update={"stride": stride})
        settings, video = ClipSettings(data, 8, 24), decoder_of(data).open(video_bytes(length))
        wanted: set[int] = set()
        for offset in view_offsets(video.num_frames, 8, stride, 4):
            wanted |= set(frame_indices(video.num_frames, 8, stride, offset).tolist())
        seen.clear()
        assert EvalViews(settings, 4, 3)(video, 0, 0).shape == (12, 3, 8, 24, 24)
        assert sum(seen) == len(wanted)
