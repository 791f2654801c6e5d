"""Rows 49 to 57 of the fault catalogue: videos that are none, damaged, odd, huge, hostile or slow. Each holds for
both decoders, where both load."""

from __future__ import annotations

import io
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import audio_bytes, encode, video_bytes, write_shard
from odd_samples import (
    FAST_VPX,
    QUIET_X265,
    blocks,
    claims_frames,
    encode_as,
    flip_bytes,
    header_only,
    png_bomb,
    rotated,
)
from PIL import Image

from sfa_dist.data.annotations.rows import ClipRow
from sfa_dist.data.bad_sample import BadSample
from sfa_dist.data.decode import Decoder, choose_decoder, open_limited, sound_frames
from sfa_dist.data.loader import Batch
from sfa_dist.data.pack_probe import Prober
from sfa_dist.data.shard_index import load_index
from sfa_dist.data.stream import eval_loader
from sfa_dist.errors import RecipeError
from sfa_dist.recipe_blocks import BatchBlock, DataBlock, LimitsBlock

DATA = DataBlock(resize=32, stride=1, workers=0, decoder="pyav")


def usable() -> list[str]:
    try:
        return ["pyav", choose_decoder("torchcodec").name]
    except RecipeError:  # without FFmpeg's libraries
        return ["pyav"]


NAMES = usable()
each_decoder = pytest.mark.parametrize("name", NAMES)


def decoder(name: str, **limits: float) -> Decoder:
    return choose_decoder(name, LimitsBlock(**limits))  # type: ignore[arg-type]


def batch_of(folder: Path, clips: list[bytes], chosen: Decoder, frames: int = 4, **data: object) -> Batch:
    """One evaluation batch of all the clips, packed into a shard."""
    (folder / "index.json").unlink(missing_ok=True)
    shard = write_shard(folder / "x.tar", [(f"clip{n}", clip, 0) for n, clip in enumerate(clips)])
    block = DATA.model_copy(update=data)
    batch = BatchBlock(micro=1, eval_micro=len(clips))
    (only,) = eval_loader(load_index([shard]), block, batch, frames=frames, crop=32, decoder=chosen)
    return only


# ------------------------------------------------------------------------------------------------ 49: none at all

NO_VIDEOS = {
    "zero bytes": b"",
    "html": b"<html>Not Found</html>" * 50,
    "zeros": bytes(4096),
    "sound alone": audio_bytes(),
    "header alone": header_only(encode_as("libx264")),
    "no header": video_bytes()[:700],
}


@pytest.mark.fault(49)
@each_decoder
def test_row_49_what_is_no_video_is_a_bad_sample_with_its_reason(name: str, tmp_path: Path) -> None:
    clips = [*NO_VIDEOS.values(), video_bytes()]
    batch = batch_of(tmp_path, clips, decoder(name))
    assert batch["weights"].tolist() == [0.0] * len(NO_VIDEOS) + [1.0]
    reasons = [reason for _, reason in batch["bad"]]
    assert [key for key, _ in batch["bad"]] == [f"x.tar/clip{n}" for n in range(len(NO_VIDEOS))]
    words = ["empty file", "not a mp4", "not a mp4", "no video stream", "", "the file was cut"]
    assert all(reason and word in reason for reason, word in zip(reasons, words, strict=True)), reasons


# ------------------------------------------------------------------------------------------------ 50: damaged

CODECS: dict[str, dict[str, Any]] = {
    "h264": {"codec": "libx264"},
    "hevc": {"codec": "libx265", "options": QUIET_X265},
    "vp9": {"codec": "libvpx-vp9", "container": "webm", "options": FAST_VPX},
    "mpeg4": {"codec": "mpeg4", "container": "avi"},
    "mkv": {"codec": "libx264", "container": "matroska"},
}


@pytest.fixture(scope="module", params=CODECS)
def long_clip(request: pytest.FixtureRequest) -> bytes:
    """40 frames."""
    return encode_as(**CODECS[request.param], frames=[blocks(n) for n in range(40)])


@pytest.mark.fault(50)
def test_row_50_a_cut_video_is_bad_or_salvaged_from_what_is_whole(long_clip: bytes, tmp_path: Path) -> None:
    cuts = [long_clip[: int(len(long_clip) * share)] for share in (0.3, 0.75, 0.9)]
    strict = [batch_of(tmp_path, [*cuts, long_clip], decoder(name), frames=8) for name in NAMES]
    for batch in strict:
        assert batch["weights"].tolist() == [0, 0, 0, 1]
        assert all("the file was cut" in reason for _, reason in batch["bad"])
    salvaged = [batch_of(tmp_path, cuts, decoder(name), frames=16, damaged="salvage") for name in NAMES]
    for batch in salvaged:
        assert batch["weights"].tolist() == [0, 1, 1]
        assert "are before the damage, a clip needs 16" in batch["bad"][0][1]
        assert torch.equal(batch["clips"], salvaged[0]["clips"])
        again = batch_of(tmp_path, cuts, decoder(NAMES[0]), frames=16, damaged="salvage")
        assert torch.equal(batch["clips"], again["clips"])


@pytest.mark.fault(50)
def test_row_50_salvaged_frames_are_those_of_the_whole_video(long_clip: bytes) -> None:
    cut = long_clip[: int(len(long_clip) * 0.75)]
    sound = sound_frames(cut)
    assert 20 <= sound < 40 == sound_frames(long_clip)
    for name in NAMES:
        whole = decoder(name).open(long_clip).frames_at(range(sound))
        assert torch.equal(decoder(name).open(cut).frames_at(range(sound)), whole)


@pytest.mark.fault(50)
def test_row_50_hidden_damage_is_found_when_every_frame_is_decoded_strictly(tmp_path: Path) -> None:
    """FFmpeg covers up most of what is damaged inside a frame, so this is asked when a file is packed; from then on
    its crc32 guards it."""
    clip = encode_as("libx264", frames=[blocks(n) for n in range(24)])
    files = [clip, *(flip_bytes(clip, 200, seed) for seed in range(8))]
    for number, data in enumerate(files):
        (tmp_path / f"{number}.mp4").write_bytes(data)
    prober = Prober("pyav", min_frames=1, decode_all=True, folder=tmp_path)
    found = [prober(ClipRow(tmp_path / f"{number}.mp4", "a", {}, "")) for number in range(9)]
    assert [probe.problem for probe in found] == [None] + ["corrupt"] * 8
    assert all("damaged" in probe.reason or "decoded" in probe.reason for probe in found[1:])
    (tmp_path / "cut.mp4").write_bytes(clip[:-100])
    assert "cut" in Prober("pyav", 1, False, tmp_path)(ClipRow(tmp_path / "cut.mp4", "a", {}, "")).reason


# ------------------------------------------------------------------------------------------------ 51: short


@pytest.mark.fault(51)
@each_decoder
def test_row_51_a_short_video_is_looped(name: str, tmp_path: Path) -> None:
    """As ViViT's official loader does; the clip counts in full."""
    one, three = (encode([blocks(n, 32, 32) for n in range(count)]) for count in (1, 3))
    batch = batch_of(tmp_path, [one, three], decoder(name), frames=8)
    assert batch["weights"].tolist() == [1, 1]
    still, looped = batch["clips"]  # (3, 8, 32, 32) each
    assert torch.equal(still, still[:, :1].expand_as(still))
    assert torch.equal(looped[:, :3], looped[:, 3:6])
    assert torch.equal(looped[:, :2], looped[:, 6:8])
    assert not torch.equal(looped[:, 0], looped[:, 1])


# ------------------------------------------------------------------------------------------------ 52: irregular time

TIMES = [0, 40, 80, 1000, 1040, 2500, 2510, 2520, 2530, 6000, 6040, 9000]


@pytest.mark.fault(52)
@each_decoder
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_row_52_frames_of_variable_rate_are_exact(name: str, container: str) -> None:
    pictures = [np.full((32, 48, 3), 16 + 18 * n, np.uint8) for n in range(12)]
    clip = encode_as("libx264", container=container, frames=pictures, times=TIMES, gop=4)
    video = decoder(name).open(clip)
    assert video.num_frames == 12
    for wanted in ([*range(12)], [11], [9, 2, 5], [4, 4, 10]):
        levels = video.frames_at(wanted).float().mean(dim=(1, 2, 3))
        assert [round((float(level) - 16) / 18) for level in levels] == wanted


# ------------------------------------------------------------------------------------------------ 53: rotated


@pytest.mark.fault(53)
def test_row_53_a_rotated_video_is_upright_for_both_decoders() -> None:
    clip = encode_as("libx264", options={"preset": "ultrafast", "crf": "4"})
    plain = decoder("pyav").open(clip).frames_at([0, 7])
    for name in NAMES:
        video = decoder(name).open(rotated(clip))
        assert (video.height, video.width) == (96, 64)
        assert torch.equal(video.frames_at([0, 7]), plain.rot90(-1, dims=(1, 2)))


# ------------------------------------------------------------------------------------------------ 54: codecs


def not_square(stream: Any) -> None:
    stream.sample_aspect_ratio = Fraction(4, 3)


ODD_SIZE = [blocks(n, 47, 65) for n in range(12)]
WIDE = [blocks(n, 64, 64) for n in range(12)]
FORMATS: dict[str, dict[str, Any]] = {
    "10-bit hevc": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": QUIET_X265},
    "4:4:4 of odd size": {"codec": "libx264", "pix_fmt": "yuv444p", "frames": ODD_SIZE},
    "hevc 4:4:4 of odd size": {"codec": "libx265", "pix_fmt": "yuv444p", "frames": ODD_SIZE, "options": QUIET_X265},
    "gray": {"codec": "libx264", "pix_fmt": "gray"},
    "4:2:2 of 10 bits": {"codec": "libx264", "pix_fmt": "yuv422p10le"},
    "alpha in mov": {"codec": "qtrle", "pix_fmt": "argb", "container": "mov"},
    "alpha in webm": {"codec": "libvpx-vp9", "pix_fmt": "yuva420p", "container": "webm", "options": FAST_VPX},
    "interlaced": {"codec": "mpeg2video", "container": "mov", "options": {"flags": "+ildct+ilme"}},
    "pixels that are not square": {"codec": "libx264", "prepare": not_square},
    "vp9": {"codec": "libvpx-vp9", "container": "webm", "options": FAST_VPX},
    "av1": {"codec": "libsvtav1", "frames": WIDE, "options": {"preset": "12", "svtav1-params": "lp=1"}},
    "prores": {"codec": "prores_ks", "pix_fmt": "yuv422p10le", "container": "mov"},
    "motion jpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "container": "avi"},
    "ffv1": {"codec": "ffv1", "pix_fmt": "yuv444p", "container": "matroska"},
}


@pytest.mark.fault(54)
@pytest.mark.parametrize("what", FORMATS)
def test_row_54_odd_formats_decode_alike_or_are_refused_by_name(what: str) -> None:
    """All frames, at the stored size: pixels that are not square are taken as they are, fields are not taken apart."""
    clip = encode_as(**FORMATS[what])
    pictures = torch.from_numpy(np.stack(FORMATS[what].get("frames") or [blocks(n) for n in range(12)]))
    found = [decoder(name).open(clip).frames_at(range(12)) for name in NAMES]
    for frames in found:
        assert frames.shape == pictures.shape
        assert torch.equal(frames, found[0])
        expected = pictures.float().mean(-1) if what == "gray" else pictures.float()
        got = frames.float().mean(-1) if what == "gray" else frames.float()
        assert (got - expected).abs().mean() < 30  # chroma is halved in most of them


@pytest.mark.fault(54)
@each_decoder
def test_row_54_a_codec_that_is_not_known_is_a_bad_sample(name: str) -> None:
    clip = encode_as("libx264").replace(b"avc1", b"zzz9").replace(b"avcC", b"zzzC")
    with pytest.raises(BadSample) as caught:
        decoder(name).open(clip).frames_at([0])
    assert "\n" not in caught.value.reason


# ------------------------------------------------------------------------------------------------ 55: huge


def peak_mib() -> float:
    """The most that was resident since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


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
    from sfa_dist.data import stream

    real = stream.read_clip_bytes
    monkeypatch.setattr(stream, "read_clip_bytes", lambda index, sample: read.append(sample) or real(index, sample))
    batch = batch_of(tmp_path, [big, video_bytes()], decoder(name, mib=1), limits=LimitsBlock(mib=1))
    assert batch["weights"].tolist() == [0, 1]
    assert "data.limits.mib is 1" in batch["bad"][0][1]
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

    def frames_at(self, indices: Any) -> torch.Tensor:
        if self._real is not None:
            return self._real.frames_at(indices)
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
    assert batch["weights"].tolist() == [0, 1]
    assert "decoding took longer than 0.2 s (data.limits.seconds)" in batch["bad"][0][1]


def decoding_threads() -> set[int | None]:
    return {thread.ident for thread in threading.enumerate() if thread.name == "decode"}


@pytest.mark.fault(57)
@each_decoder
def test_row_57_a_slow_clip_is_a_bad_sample_and_its_decoder_stops(name: str) -> None:
    clip = encode_as("libx264", frames=[blocks(n, 540, 960) for n in range(24)], gop=24)
    slow = decoder(name, seconds=0.03).open(clip)
    before = decoding_threads()
    with pytest.raises(BadSample, match=r"longer than 0\.03 s"):
        slow.frames_at(list(range(24)))
    assert len(decoder(name).open(clip).frames_at(range(24))) == 24
    assert decoding_threads() == before  # the same thread went on to the next clip
