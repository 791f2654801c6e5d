"""Frames by time: the same as FFmpeg's `fps` filter, the same through both decoders, and nothing new where the rate is
constant."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.filter import Graph
from data_samples import SIZE, encode, frame_level, video_bytes
from odd_samples import encode_as
from test_decode import DECODERS, each_decoder, numbers_of

from sfa_dist.data.batches.planned import ClipSettings
from sfa_dist.data.batches.stream import EvalViews as Views
from sfa_dist.data.batches.stream import cut_clips
from sfa_dist.data.video.bad_sample import BadSample, OverLimit
from sfa_dist.data.video.container import has_constant_rate
from sfa_dist.data.video.decode import choose_decoder
from sfa_dist.data.video.resample import frame_numbers, held, own_rate
from sfa_dist.data.video.salvage import valid_prefix
from sfa_dist.errors import RecipeError
from sfa_dist.recipe.blocks import DataBlock, LimitsBlock
from sfa_dist.recipe.schema import load_recipe

LIMITS = LimitsBlock()
GREY = [np.full((SIZE, SIZE, 3), frame_level(n), np.uint8) for n in range(12)]
# Milliseconds: ten frames a second, then one a second, then ten again.
VARIABLE = [0, 100, 200, 300, 400, 1400, 2400, 3400, 3500, 3600, 3700, 3800]


def variable(container: str = "mp4", times: Sequence[int] = VARIABLE) -> bytes:
    return encode_as("libx264", container=container, frames=GREY[: len(times)], times=times, gop=4)


def cut_off_mdat(whole: bytes) -> bytes:
    """An mp4 whose last third of frames is zeros."""
    start = whole.index(b"mdat") + 4
    kept = start + (len(whole) - start) * 2 // 3
    return whole[:kept] + bytes(len(whole) - kept)


def ffmpeg_numbers(times: Sequence[int], durations: Sequence[int], fps: Fraction) -> list[int]:
    """What FFmpeg's own filter makes of frames at these milliseconds."""
    graph = Graph()
    source = graph.add_buffer(width=16, height=16, format=av.VideoFormat("gray"), time_base=Fraction(1, 1000))
    rate, sink = graph.add("fps", f"fps={fps}"), graph.add("buffersink")
    source.link_to(rate)
    rate.link_to(sink)
    graph.configure()
    found = []

    def pull() -> None:
        while True:
            try:
                found.append(int(graph.pull().to_ndarray()[0, 0]))
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    for number, (time, duration) in enumerate(zip(times, durations, strict=True)):
        frame = av.VideoFrame.from_ndarray(np.full((16, 16), number, np.uint8), format="gray")
        frame.pts, frame.time_base, frame.duration = time, Fraction(1, 1000), duration
        graph.push(frame)
        pull()
    graph.push(None)
    pull()
    return found


@pytest.mark.fault(52)
@pytest.mark.parametrize("fps", [Fraction(25), Fraction(12), Fraction(15), Fraction(30000, 1001), Fraction(2)])
@pytest.mark.parametrize("seed", range(6))
def test_the_same_frames_as_ffmpegs_filter(fps, seed):
    """On random irregular times, and on 30 a second, which falls half-way between the frames of 25 and 12."""
    rng = np.random.default_rng(seed)
    gaps = rng.integers(1, 400, 60) if seed else np.full(60, 20)
    gaps[-1] = gaps[:-1].sum() // 59
    times = np.concatenate([[0], np.cumsum(gaps)[:-1]])
    times[-1] += gaps[-1] * 59 - times[-1]  # so that the mean gap is whole milliseconds, which FFmpeg is told
    wanted = ffmpeg_numbers(times.tolist(), gaps.tolist(), fps)
    assert frame_numbers(times / 1000, float(fps)).tolist() == wanted
    assert list(held(zip((times / 1000).tolist(), range(60), strict=True), float(fps))) == wanted


@pytest.mark.parametrize("fps", [30.0, 30000 / 1001, 25.0, 24000 / 1001, 15.0, 7.5])
def test_a_constant_rate_is_left_alone(fps):
    """At its own rate, also where a container rounds the times to milliseconds, as Matroska does."""
    for starts in (np.arange(3000) / fps, np.round(np.arange(3000) / fps, 3)):
        own = own_rate(starts)
        assert np.array_equal(frame_numbers(starts, own), np.arange(3000))
        assert list(held(zip(starts.tolist(), range(3000), strict=True), own)) == list(range(3000))


@each_decoder
@pytest.mark.parametrize("container", ["mp4", "matroska", "mov", "avi"])
def test_constant_videos_come_as_stored(decoder, container):
    data = video_bytes(12, container=container)
    video = choose_decoder(decoder.name, LIMITS, None).open(data)
    assert video.num_frames == 12
    assert numbers_of(video.frames_at(range(12))) == list(range(12))


@pytest.mark.fault(52)
@each_decoder
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_variable_rate_comes_by_time(decoder, container):
    """12 frames over 3.8 s: one each 0.345 s at the video's own rate, one each half second at 2 a second."""
    data = variable(container)
    own = choose_decoder(decoder.name, LIMITS, None).open(data)
    assert own.fps == pytest.approx(11 / 3.8)
    assert numbers_of(own.frames_at(range(own.num_frames))) == [1, 4, 4, 4, 5, 5, 5, 6, 6, 6, 9, 11]
    two = choose_decoder(decoder.name, LIMITS, 2.0).open(data)
    assert numbers_of(two.frames_at(range(two.num_frames))) == [2, 4, 4, 5, 5, 6, 6, 10]
    stored = choose_decoder(decoder.name, LIMITS, "stored").open(data)
    assert numbers_of(stored.frames_at([11, 0, 5])) == [11, 0, 5]


@pytest.mark.fault(52)
@pytest.mark.skipif(len(DECODERS) < 2, reason="torchcodec does not load here")
@pytest.mark.parametrize("rate", [None, "stored", 2.0, 15.0, 25.0])
@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_decoders_agree_at_every_rate(container, rate):
    data = encode(GREY, container) if container == "avi" else variable(container)
    first, second = (choose_decoder(name, LIMITS, rate).open(data) for name in ("pyav", "torchcodec"))
    assert first.num_frames == second.num_frames
    assert torch.equal(first.frames_at(range(first.num_frames)), second.frames_at(range(second.num_frames)))


def test_what_the_header_says_of_the_rate():
    assert has_constant_rate(video_bytes(12))
    assert has_constant_rate(video_bytes(12, container="mov"))
    assert not has_constant_rate(variable())
    assert not has_constant_rate(variable(times=[0, 100, 200, 300, 450, 500]))
    assert not has_constant_rate(video_bytes(12, container="matroska"))
    data = video_bytes(12)
    assert not has_constant_rate(data[: data.index(b"stts") + 6])


@each_decoder
def test_rates_beyond_the_limits_are_bad_samples(decoder):
    few = LimitsBlock(frames=100)
    with pytest.raises(OverLimit, match=r"data\.limits\.frames is 100"):
        choose_decoder(decoder.name, few, 1000.0).open(variable())


@each_decoder
def test_clips_at_a_rate_through_the_whole_stream(decoder):
    data = DataBlock(fps=2.0, stride=1, resize=SIZE)
    views = Views(ClipSettings(data, frames=4, crop=SIZE, seed=0), temporal=2, spatial=1)
    clips = cut_clips(variable(), choose_decoder(decoder.name, LIMITS, data.fps), views)
    assert [numbers_of(clip.permute(1, 2, 3, 0)) for clip in clips] == [[2, 4, 4, 5], [5, 6, 6, 10]]


@pytest.mark.fault(50)
@each_decoder
def test_the_frames_before_the_damage_are_counted_at_the_rate(decoder):
    """Of the stored frames before the damage, those that the rate shows."""
    whole = encode_as("libx264", times=VARIABLE, gop=4)
    data = cut_off_mdat(whole)
    found = [
        valid_prefix(choose_decoder(decoder.name, LIMITS, rate), data, LIMITS, 1, BadSample("damaged"))
        for rate in ("stored", 25.0)
    ]
    stored, prefix = found
    assert 4 < stored.num_frames < 12
    assert prefix.num_frames > 25
    last = prefix.frames_at([prefix.num_frames - 1])
    assert torch.equal(last, stored.frames_at([stored.num_frames - 1]))


@pytest.mark.parametrize("text", ["0", "-3", "fast", "true", "1e9"])
def test_rates_that_are_none(tmp_path, text):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{size: tiny, classes: 2}}\ndata: {{fps: {text}}}\noptimizer: {{lr: 0.1}}\n"
        "schedule: {epochs: 1}\nstage1: {}\n"
    )
    with pytest.raises(RecipeError, match="expected frames a second"):
        load_recipe(recipe)


def test_a_camera_that_was_away_is_not_filled_up():
    frames = [(0.0, "a"), (0.1, "b"), (3600.0, "c"), (3600.1, "d"), (3600.3, "e"), (5.0, "f")]
    assert list(held(frames, 10.0, longest_gap=10.0)) == ["a", "b", "c", "d", "d", "e", "f"]


def test_one_frame_and_frames_at_the_same_time():
    assert frame_numbers(np.zeros(3), 10.0).tolist() == [2] * 10
    assert list(held([(0.0, 7)], 10.0)) == [7]
    assert list(held([], 10.0)) == []
    for rate in (None, 25.0, "stored"):
        assert choose_decoder("pyav", LIMITS, rate).open(variable(times=[0])).num_frames == 1
