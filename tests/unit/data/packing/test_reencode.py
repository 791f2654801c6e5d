"""Encoding anew while packing: the same frames, smaller, with key frames where they are asked for."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
from data_samples import frame_level, video_bytes

from sfa_dist.data.packing.pack import pack
from sfa_dist.data.packing.pack_settings import Encoding, PackSettings
from sfa_dist.data.packing.reencode import reencode, target_size
from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode_pyav import PyAVVideo
from sfa_dist.errors import UsageError
from sfa_dist.recipe.blocks import LimitsBlock
from sfa_dist.tools.cli import build_parser


def key_frames(data: bytes) -> list[bool]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.key_frame for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((480, 640), 256, (256, 342)),
        ((640, 480), 256, (342, 256)),
        ((240, 320), 256, (240, 320)),  # never larger
        ((241, 321), None, (240, 320)),
        ((2, 2), 1, (2, 2)),
    ],
)
def test_target_size(size, short_side, expected):
    assert target_size(*size, short_side) == expected


def test_frames_and_times_stay_and_key_frames_come_when_asked():
    source = video_bytes(13, 64, 96, gop=250)
    data = reencode(source, Encoding(short_side=32, gop=4, crf=10))
    assert key_frames(data) == [number % 4 == 0 for number in range(13)]
    old, new = PyAVVideo(source, LimitsBlock()), PyAVVideo(data, LimitsBlock())
    assert (new.num_frames, new.height, new.width) == (13, 32, 48)
    assert new.fps == pytest.approx(old.fps)
    levels = new.frames_at(range(13)).float().mean(dim=(1, 2, 3))
    assert levels.numpy() == pytest.approx([frame_level(number) for number in range(13)], abs=3)
    assert reencode(source, Encoding(short_side=32, gop=4, crf=10)) == data


def test_variable_frame_rate_keeps_its_times():
    file = io.BytesIO()
    times = [0, 1, 2, 7, 8, 20]
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), frame_level(number), np.uint8), format="rgb24")
            frame.pts = time
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with av.open(io.BytesIO(reencode(file.getvalue(), Encoding()))) as container:
        seconds = [float(frame.time) for frame in container.decode(video=0)]
    assert np.array(seconds) - seconds[0] == pytest.approx([time / 10 for time in times], abs=1e-3)


def test_what_cannot_be_decoded_is_a_bad_sample():
    for data in (video_bytes(8)[:700], b"nothing"):
        with pytest.raises(BadSample):
            reencode(data, Encoding())


def test_a_cut_has_the_frames_of_its_seconds(tmp_path):
    """Ten frames a second: from 0.45 s up to 1.15 s are the frames 5 to 11. From bytes and from a file alike."""
    source = video_bytes(19, gop=8)
    file = tmp_path / "long.mp4"
    file.write_bytes(source)
    data = reencode(source, Encoding(crf=10), cut=(0.45, 1.15))
    assert reencode(file, Encoding(crf=10), cut=(0.45, 1.15)) == data
    levels = PyAVVideo(data, LimitsBlock()).frames_at(range(7)).float().mean(dim=(1, 2, 3))
    assert levels.numpy() == pytest.approx([frame_level(number) for number in range(5, 12)], abs=3)
    with pytest.raises(BadSample, match=r"the video ends at 1\.90 s"):
        reencode(source, Encoding(), cut=(50.0, 60.0))


def write_sources(folder: Path) -> Path:
    folder.mkdir()
    for number in range(3):
        (folder / f"v{number}.avi").write_bytes(video_bytes(6 + number, 64, 96, container="avi"))
    cut = video_bytes(9)
    (folder / "cut.mp4").write_bytes(cut[: len(cut) // 2])
    rows = "".join(f"v{number}.avi,{number}\n" for number in range(3))
    (folder / "list.csv").write_text(f"path,label\n{rows}cut.mp4,0\n")
    return folder / "list.csv"


def test_packed_clips_are_the_encoded_ones(tmp_path):
    source, out = write_sources(tmp_path / "src"), tmp_path / "out"
    encoding = Encoding(short_side=32, gop=2)
    report = pack(source, out, PackSettings(encoding=encoding, max_bad_fraction=0.5))
    assert (report["packed"], len(report["corrupt"])) == (3, 1)
    index = load_index(expand_shards([str(out / "*.tar")]))
    for sample in range(3):
        video = PyAVVideo(read_clip_bytes(index, sample), LimitsBlock())
        assert (video.height, video.width) == (32, 48)
    assert set(index.suffix) == {"mp4"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["packs"]["shard"]["encoding"] == {"short_side": 32, "gop": 2, "crf": 23}
    assert not list(out.glob(".*"))


def test_an_interrupted_pack_goes_on_with_what_it_has_encoded(tmp_path, monkeypatch):
    source, out = write_sources(tmp_path / "src"), tmp_path / "out"
    seen = 0

    def stop_after_two(done: int, total: int) -> None:
        nonlocal seen
        seen = done
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, out, PackSettings(encoding=Encoding(gop=2), max_bad_fraction=0.5), progress=stop_after_two)
    work = out / ".shard-work"
    assert len(list(work.glob("*.mp4"))) == seen == 2
    with (work / "journal.jsonl").open("a") as file:
        file.write('{"key": "cut o')
    calls = []
    monkeypatch.setattr(
        "sfa_dist.data.packing.pack_probe.reencode", lambda *given: calls.append(given) or reencode(*given)
    )
    whole = pack(source, out, PackSettings(encoding=Encoding(gop=2), max_bad_fraction=0.5))
    assert len(calls) == 1  # the third clip; the cut one is found out before it is encoded
    assert not work.exists()
    again = pack(source, tmp_path / "again", PackSettings(encoding=Encoding(gop=2), max_bad_fraction=0.5))
    assert whole == again
    assert (out / "shard-000000.tar").read_bytes() == (tmp_path / "again" / "shard-000000.tar").read_bytes()


def test_the_command_line(tmp_path):
    source, out = write_sources(tmp_path / "src"), tmp_path / "out"
    parser = build_parser()
    common = ["pack", str(source), str(out), "--max-bad-fraction", "0.5"]
    parsed = parser.parse_args([*common, "--crf", "20"])
    with pytest.raises(UsageError, match="--crf is of no use"):
        parsed.run(parsed)
    parsed = parser.parse_args([*common, "--short-side", "32", "--crf", "20", "--workers", "2"])
    assert parsed.run(parsed) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["packs"]["shard"]["encoding"] == {"short_side": 32, "gop": 12, "crf": 20}
