"""Rows 55 to 57 of the fault catalogue: videos that are huge, hostile or slow. Each holds for both decoders, where both
load."""

from __future__ import annotations

import io
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import video_bytes
from memory_peak import peak_mib, reset_peak
from odd_samples import blocks, claims_frames, encode_as, png_bomb
from PIL import Image
from row_clips import batch_of, decoder, each_decoder

from sfa_dist.data.batches.planned import ClipSettings
from sfa_dist.data.batches.stream import EvalViews, TrainViews, cut_clips
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode import Decoder, LimitedVideo, choose_decoder, open_limited
from sfa_dist.recipe.blocks import AugmentBlock, DataBlock, LimitsBlock

# ------------------------------------------------------------------------------------------------ 55: huge


@pytest.fixture(scope="module")
def wall() -> bytes:
    """8192 x 8192 pixels in 60 kB."""
    frames = [np.zeros((8192, 8192, 3), np.uint8)] * 2
    return encode_as("libx264", frames=frames, options={"preset": "ultrafast", "bf": "0"})


@pytest.mark.fault(55)
@each_decoder
def test_row_55_a_frame_that_fills_the_memory_is_refused_from_its_header(name: str, wall: bytes) -> None:
    assert len(wall) < 200_000
    before = reset_peak()
    with pytest.raises(BadSample, match=r"8192x8192 pixels \(data\.limits\.megapixels is 17\)"):
        decoder(name).open(wall)
    assert peak_mib() - before < 4
    decoder(name, megapixels=100.0).open(wall).frames_at([0, 1])
    assert peak_mib() - before > 300  # the limit is what keeps it away


@pytest.mark.fault(55)
@each_decoder
def test_row_55_a_clip_of_a_day_is_refused_from_its_header(name: str) -> None:
    day = claims_frames(video_bytes(), 25 * 86_400)
    before = reset_peak()
    with pytest.raises(BadSample, match=r"2160000 frames \(data\.limits\.frames is 200000\)"):
        decoder(name).open(day)
    assert peak_mib() - before < 4


@pytest.mark.fault(55)
@each_decoder
@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_row_55_each_limit_holds_for_each_container(name: str, container: str) -> None:
    clip = encode_as("mpeg4" if container == "avi" else "libx264", container=container)
    for limits, word in (
        ({"megapixels": 0.006}, "data.limits.megapixels is 0.006"),
        ({"frames": 11}, "data.limits.frames is 11"),
        ({"decoded_mib": 1}, "data.limits.decoded_mib is 1"),
    ):
        with pytest.raises(BadSample) as caught:
            decoder(name, **limits).open(clip).frames_at(list(range(12)) * 6)  # 6 views: 1.3 MiB
        assert word in caught.value.reason
    assert len(decoder(name, megapixels=0.0062, frames=12, decoded_mib=2).open(clip).frames_at(range(12))) == 12


@pytest.mark.fault(55)
@each_decoder
@pytest.mark.parametrize("kind", ["training", "test"])
def test_row_55_a_clip_takes_what_is_counted_and_a_few_large_frames(name: str, kind: str) -> None:
    """48 frames of 1280x720 pixels are 127 MiB; resized to 64, a clip of them is 2 MiB, and twelve views are 21."""
    clip = encode_as("libx264", frames=[np.full((720, 1280, 3), 80, np.uint8)] * 48, options={"preset": "ultrafast"})
    data = DataBlock(stride=1, resize=64, fps="stored", limits=LimitsBlock(decoded_mib=64))

    def cut(frames: int) -> torch.Tensor:
        settings = ClipSettings(data, frames, 56, 0)
        views = TrainViews(settings, AugmentBlock()) if kind == "training" else EvalViews(settings, 4, 3)
        return cut_clips(clip, decoder(name, decoded_mib=64), views)

    cut(8)  # What is taken once and for all.
    before = reset_peak()
    assert cut(48).shape[2] == 48
    assert peak_mib() - before < 90


@pytest.mark.fault(55)
@each_decoder
def test_row_55_picture_bombs_are_refused_from_their_header(name: str) -> None:
    file = io.BytesIO()
    Image.fromarray(blocks(0)).save(file, "jpeg")
    jpeg = bytearray(file.getvalue())
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, 30_000, 30_000)
    before = reset_peak()
    for bomb in (png_bomb(30_000), bytes(jpeg)):
        with pytest.raises(BadSample, match=r"30000x30000 pixels"):
            decoder(name).open(bomb)
    assert peak_mib() - before < 4


@pytest.mark.fault(55)
@each_decoder
def test_row_55_a_file_over_the_limit_is_not_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = video_bytes() + bytes(2 << 20)
    read: list[int] = []
    from sfa_dist.data.batches import stream

    real = stream.read_clip_bytes
    monkeypatch.setattr(stream, "read_clip_bytes", lambda index, sample: read.append(sample) or real(index, sample))
    batch = batch_of(tmp_path, [big, video_bytes()], decoder(name, mib=1), limits=LimitsBlock(mib=1))
    assert batch.weights.tolist() == [0, 1]
    assert "data.limits.mib is 1" in batch.bad[0][1]
    assert read == [1]


# ------------------------------------------------------------------------------------------------ 56: playlists

PLAYLISTS = {
    "hls": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n/etc/passwd\n",
    "concat": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "url": b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n",
    "dash": b'<?xml version="1.0"?><MPD><BaseURL>file:///etc/passwd</BaseURL></MPD>',
    "session description": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
}


@pytest.mark.fault(56)
@each_decoder
@pytest.mark.parametrize("what", PLAYLISTS)
def test_row_56_a_playlist_never_reaches_a_decoder(name: str, what: str) -> None:
    with pytest.raises(BadSample, match="not a mp4"):
        decoder(name).open(PLAYLISTS[what])


# ------------------------------------------------------------------------------------------------ 57: leaks and hangs


def resident_mib(name: str, clips: int, every: int, height: int, width: int) -> list[float]:
    """What is resident after each `every` clips, a tenth of them damaged."""
    chosen, clip = decoder(name), encode_as("libx264", frames=[blocks(n, height, width) for n in range(12)])
    damaged, found = clip[: len(clip) * 3 // 4], []
    for number in range(1, clips + 1):
        with suppress(BadSample):
            chosen.open(damaged if number % 10 == 9 else clip).frames_at([0, 5, 8])
        if number % every == 0:
            found.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)
    return found


@pytest.mark.fault(57)
@each_decoder
def test_row_57_memory_does_not_grow_with_the_clips(name: str) -> None:
    """A frame lost with each clip would be 45 MiB; allocators take a few of their own in the beginning."""
    first, *_, last = resident_mib(name, 400, every=80, height=192, width=256)
    assert last - first < 25


@pytest.mark.chaos
@pytest.mark.fault(57)
@each_decoder
def test_row_57_memory_does_not_grow_over_5000_clips(name: str) -> None:
    settled = resident_mib(name, 5_000, every=100, height=64, width=96)[10:]
    mib_per_thousand = np.polyfit(np.arange(len(settled)) / 10, settled, 1)[0]
    assert mib_per_thousand < 1


class HangingVideo:
    """A backend that does not come back, as a decoder in an endless loop; `let_go` ends it with the test."""

    let_go = threading.Event()
    num_frames, fps, height, width = 8, 10.0, 32, 32

    def __init__(self, data: bytes, limits: LimitsBlock) -> None:
        self._real = choose_decoder("pyav").open(data) if len(data) % 2 else None

    def frames_at(self, indices: Any, shrink: Any = None) -> torch.Tensor:
        if self._real is not None:
            return self._real.frames_at(indices, shrink)
        self.let_go.wait()
        raise AssertionError("let go")


@pytest.fixture
def hanging() -> Iterator[Decoder]:
    HangingVideo.let_go.clear()
    yield Decoder("hanging", "0", partial(open_limited, HangingVideo, LimitsBlock(seconds=0.2)))
    HangingVideo.let_go.set()


@pytest.mark.fault(57)
def test_row_57_a_decoder_that_hangs_is_left_behind(hanging: Decoder, tmp_path: Path) -> None:
    clip = video_bytes()
    odd, even = (clip, clip + b"\0") if len(clip) % 2 else (clip + b"\0", clip)
    started = time.monotonic()
    before = decoding_threads()
    batch = batch_of(tmp_path, [even, odd], hanging)
    assert len(decoding_threads() - before) >= 1
    assert time.monotonic() - started < 10
    assert batch.weights.tolist() == [0, 1]
    assert "decoding took longer than 0.2 s (data.limits.seconds)" in batch.bad[0][1]


def decoding_threads() -> set[int | None]:
    return {thread.ident for thread in threading.enumerate() if thread.name == "decode"}


@pytest.mark.fault(57)
@each_decoder
def test_row_57_a_slow_clip_is_a_bad_sample_and_its_decoder_stops(name: str) -> None:
    clip = encode_as("libx264", frames=[blocks(n, 540, 960) for n in range(24)], gop=24)
    opened = decoder(name).open(clip)
    assert isinstance(opened, LimitedVideo)
    slow = LimitedVideo(opened._stored, LimitsBlock(seconds=0.03))  # Opening has all the time that it needs.
    before = decoding_threads()
    with pytest.raises(BadSample, match=r"longer than 0\.03 s"):
        slow.frames_at(list(range(24)))
    assert len(decoder(name).open(clip).frames_at(range(24))) == 24
    assert decoding_threads() <= before  # the same thread went on to the next clip; one of an earlier test may end
