"""Frame k of a video is the k-th that a player shows: every container, codec, order and trim, whichever decoder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numbered_clips import FFMPEG, FRAMES, NAMES, RATE, ffmpeg, make, number_of, shown
from shard_tools import run_tool
from test_decode import DECODERS, both, each_decoder

from sfa_dist.data.packing.pack import pack
from sfa_dist.data.packing.pack_settings import Encoding, PackSettings
from sfa_dist.data.packing.reencode import reencode
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode import Decoder, Video, check_shown, choose_decoder
from sfa_dist.data.video.decode_pyav import PyAVVideo
from sfa_dist.data.video.frame_source import open_source
from sfa_dist.data.video.resample import Resampled
from sfa_dist.data.video.video import Derived
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import LimitsBlock, Rate

LIMITS = LimitsBlock()
RANDOM_CLIPS = int(os.environ.get("SFA_RANDOM_CLIPS", "2"))  # more by hand
VARIABLE = {"variable.mp4", "joined.mkv"}  # of which `data.fps: null` shows frames by time
pytestmark = pytest.mark.skipif(FFMPEG is None, reason="no ffmpeg command here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numbered")


def numbers(video: Video, wanted: list[int]) -> list[int]:
    return [number_of(frame) for frame in video.frames_at(wanted)]


def clips_of(count: int, seed: int = 0) -> list[list[int]]:
    """Every frame, the ends, each start of a strided clip, and random ones in any order with repeats."""
    rng = np.random.default_rng(seed)
    strided = [list(range(start, min(count, start + 16), 2)) for start in range(3, count, 17)]
    random = [rng.integers(0, count, 6).tolist() for _ in range(RANDOM_CLIPS)]
    return [list(range(count)), [count - 1], [0], *strided, *random]


@each_decoder
@pytest.mark.parametrize("name", NAMES)
def test_frames_are_those_that_are_shown(decoder: Decoder, name: str, folder: Path):
    path = make(name, folder)
    true = shown(path)
    video = decoder.open(path.read_bytes())
    assert video.num_frames == len(true)
    for wanted in clips_of(len(true)):
        assert numbers(video, wanted) == [true[index] for index in wanted]
    if name not in VARIABLE:
        assert numbers(choose_decoder(decoder.name, LIMITS, None).open(path.read_bytes()), [*range(len(true))]) == true


@each_decoder
def test_the_clock_of_an_avi_runs_over_chunks_without_a_frame(decoder: Decoder, folder: Path):
    """An AVI whose rate is that of fields: between its 25 frames a second stand as many empty chunks."""
    path = folder / "fields.avi"
    ffmpeg("-i", make("mpeg2.mkv", folder), "-c", "copy", path)
    video = decoder.open(path.read_bytes())
    assert video.fps == pytest.approx(RATE, rel=0.05)
    assert numbers(video, [*range(video.num_frames)]) == shown(path)


@pytest.mark.parametrize("rate", [None, 10.0])
@pytest.mark.parametrize("name", ["mpeg4_b.avi", "h264.avi", "packed.avi", "hevc_trimmed.mkv", "variable.mp4"])
def test_one_after_another_they_are_the_same(name: str, rate: Rate, folder: Path):
    path = make(name, folder)
    video = choose_decoder("pyav", LIMITS, rate).open(path.read_bytes())
    with open_source(str(path), rate, LIMITS) as source:
        assert [number_of(frame) for frame in source.frames] == numbers(video, list(range(video.num_frames)))


@pytest.mark.parametrize("name", ["mpeg4_b.avi", "h264.avi", "hevc_trimmed.mp4", "without_start.mkv", "variable.mp4"])
def test_what_is_encoded_anew_is_what_was_shown(name: str, folder: Path):
    """At the same times, too."""
    path = make(name, folder)
    old = PyAVVideo(path.read_bytes(), LIMITS)
    new = PyAVVideo(reencode(path.read_bytes(), Encoding(crf=10)), LIMITS)
    assert numbers(new, list(range(new.num_frames))) == shown(path)
    assert new.times() == pytest.approx(old.times(), abs=2e-3)


@pytest.mark.parametrize(
    "name", ["h264.mp4", "open.mkv", "hevc.mkv", "mpeg2.mkv", "h264.avi", "mpeg4_b.avi", "later.mkv"]
)
def test_a_cut_begins_at_any_frame(name: str, folder: Path):
    """Also at those that are shown before the key frame that is decoded before them."""
    path = make(name, folder)
    for first in (0, 11, 12, 23, 37):
        data = reencode(path, Encoding(crf=10), cut=(first / 25, (first + 5) / 25))
        assert numbers(PyAVVideo(data, LIMITS), [0, 1, 2, 3, 4]) == list(range(first, first + 5))


@both
def test_ordinary_files_stay_with_torchcodec(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """PyAV is slower; it reads only the packets of these."""

    def refused(*arguments: object) -> None:
        raise BadSample("read by PyAV")

    monkeypatch.setattr(PyAVVideo, "frames_at", refused)
    fast = DECODERS[1]
    for name in ("h264.mp4", "h264.mkv", "h264.mov", "mpeg4.avi", "vp9.webm", "av1.webm", "negative_offsets.mp4"):
        video = fast.open(make(name, folder).read_bytes())
        video.frames_at(range(0, video.num_frames, 3))
    with pytest.raises(BadSample, match="read by PyAV"):
        fast.open(make("hevc.mp4", folder).read_bytes()).frames_at([0])


@pytest.fixture
def listed(tmp_path: Path) -> Callable[[Path], Path]:
    def write(video: Path) -> Path:
        (tmp_path / "list.csv").write_text(f"path,label\n{video},0\n")
        return tmp_path / "list.csv"

    return write


def test_pack_looks_as_the_recipe_reads(folder: Path, listed: Callable[[Path], Path], tmp_path: Path):
    """A clip that a run would refuse is refused with its reason; the manifest says what was looked at, and how."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: {size: tiny, classes: 2}\ndata: {fps: 500.0, decoder: pyav, limits: {frames: 100}}\n"
        "optimizer: {lr: 0.1}\nschedule: {epochs: 1}\nstage1: {}\n"
    )
    source = listed(make("h264.mp4", folder))
    with pytest.raises(DataError, match=r"1200 frames \(data\.limits\.frames is 100\)"):
        run_tool("pack", str(source), str(tmp_path / "out"), "--recipe", str(recipe))
    run_tool("pack", str(source), str(tmp_path / "out"), "--decoder", "pyav")
    packed = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["packs"]["shard"]
    assert (packed["decoder"], packed["fps"]) == (choose_decoder("pyav").version, [None])
    index = load_index(expand_shards([str(tmp_path / "out" / "*.tar")]))
    assert index.decoders == (choose_decoder("pyav").version,)


@pytest.mark.parametrize("name", ["h264.avi", "hevc_trimmed.mkv", "mpeg2_trimmed.mkv"])
def test_pack_decodes_all_of_what_is_shown(folder: Path, listed: Callable[[Path], Path], tmp_path: Path, name: str):
    report = pack(listed(make(name, folder)), tmp_path / "out", PackSettings(decode_all=True))
    assert report["packed"] == 1


def test_a_decoder_that_gives_other_frames_is_found(folder: Path):
    data = make("h264.mp4", folder).read_bytes()
    video = PyAVVideo(data, LIMITS)
    check_shown(video, data)
    with pytest.raises(BadSample, match="another frame 0 than the video shows"):
        check_shown(Resampled(video, np.arange(FRAMES)[::-1], 25.0), data)
    with pytest.raises(BadSample, match="counts 59 frames, the video shows 60"):
        check_shown(Derived(video, FRAMES - 1, 25.0), data)
