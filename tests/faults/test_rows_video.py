"""Rows 49 to 54 of the fault catalogue: videos that are none, damaged or odd. Each holds for both decoders, where both
load."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import audio_bytes, encode, video_bytes
from odd_samples import FAST_VPX, QUIET_X265, blocks, encode_as, flip_bytes, header_only, rotated
from own_process import apart
from row_clips import NAMES, batch_of, decoder, each_decoder

from sfa_dist.data.packing.annotations.rows import ClipRow
from sfa_dist.data.packing.pack_probe import VideoProber
from sfa_dist.data.packing.pack_settings import PackSettings, Reading
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode import sound_frames

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
    assert batch.weights.tolist() == [0.0] * len(NO_VIDEOS) + [1.0]
    reasons = [reason for _, reason in batch.bad]
    assert [key for key, _ in batch.bad] == [f"x.tar/clip{n}" for n in range(len(NO_VIDEOS))]
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
        assert batch.weights.tolist() == [0, 0, 0, 1]
        assert all("the file was cut" in reason for _, reason in batch.bad)
    salvaged = [batch_of(tmp_path, cuts, decoder(name), frames=16, damaged="salvage") for name in NAMES]
    for batch in salvaged:
        assert batch.weights.tolist() == [0, 1, 1]
        assert "are before the damage, a clip needs 16" in batch.bad[0][1]
        assert torch.equal(batch.clips, salvaged[0].clips)
        again = batch_of(tmp_path, cuts, decoder(NAMES[0]), frames=16, damaged="salvage")
        assert torch.equal(batch.clips, again.clips)


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
    prober = VideoProber(PackSettings(readings=(Reading("pyav"),), decode_all=True), tmp_path)
    found = [prober(ClipRow(tmp_path / f"{number}.mp4", "a", {}, "")) for number in range(9)]
    assert [probe.problem for probe in found] == [None] + ["corrupt"] * 8
    assert all("damaged" in probe.reason or "decoded" in probe.reason for probe in found[1:])
    (tmp_path / "cut.mp4").write_bytes(clip[:-100])
    assert (
        "cut"
        in VideoProber(PackSettings(readings=(Reading("pyav"),)), tmp_path)(
            ClipRow(tmp_path / "cut.mp4", "a", {}, "")
        ).reason
    )


# ------------------------------------------------------------------------------------------------ 51: short


@pytest.mark.fault(51)
@each_decoder
def test_row_51_a_short_video_is_looped(name: str, tmp_path: Path) -> None:
    """As ViViT's official loader does; the clip counts in full."""
    one, three = (encode([blocks(n, 32, 32) for n in range(count)]) for count in (1, 3))
    batch = batch_of(tmp_path, [one, three], decoder(name), frames=8)
    assert batch.weights.tolist() == [1, 1]
    still, looped = batch.clips  # (3, 8, 32, 32) each
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
    # For root, SVT-AV1 makes the process that encodes a real-time one.
    clip = apart(encode_as, **FORMATS[what]) if what == "av1" else encode_as(**FORMATS[what])
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
