"""Frames one after another are those of the decoders, at every rate, from files, pipes and streams."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_samples import audio_bytes, encode, video_bytes
from odd_samples import QUIET_X265, encode_as, rotated
from test_resample import VARIABLE, variable

from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode import choose_decoder
from sfa_dist.data.video.frame_source import is_live, open_source
from sfa_dist.recipe.blocks import LimitsBlock, Rate

LIMITS = LimitsBlock()


def frames_of(source: str, rate: Rate = None) -> tuple[float, torch.Tensor]:
    with open_source(source, rate, LIMITS) as opened:
        return opened.fps, torch.from_numpy(np.stack(list(opened.frames)))


def by_decoder(data: bytes, rate: Rate = None) -> torch.Tensor:
    video = choose_decoder("pyav", LIMITS, rate).open(data)
    return video.frames_at(range(video.num_frames))


FILES = {
    "mp4": lambda: video_bytes(12),
    "mkv": lambda: video_bytes(12, container="matroska"),
    "avi": lambda: video_bytes(12, container="avi"),
    "variable mp4": variable,
    "variable mkv": lambda: variable("matroska"),
    "rotated": lambda: rotated(encode_as("libx264")),
    "ten bits": lambda: encode_as("libx265", "yuv420p10le", options=QUIET_X265),
}


@pytest.mark.fault(52, 53, 54)
@pytest.mark.parametrize("rate", [None, "stored", 25.0, 7.0])
@pytest.mark.parametrize("kind", FILES)
def test_the_same_frames_as_by_number(tmp_path, kind, rate):
    """To the last bit, and as many."""
    data = FILES[kind]()
    (tmp_path / "clip").write_bytes(data)
    fps, frames = frames_of(str(tmp_path / "clip"), rate)
    assert torch.equal(frames, by_decoder(data, rate))
    assert fps == pytest.approx(rate if isinstance(rate, float) else fps)


def test_the_own_rate_of_a_file(tmp_path):
    (tmp_path / "clip").write_bytes(variable())
    assert frames_of(str(tmp_path / "clip"))[0] == pytest.approx(1000 * (len(VARIABLE) - 1) / VARIABLE[-1])


@contextmanager
def piped(data: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pipe with these bytes as stdin."""
    read, write = os.pipe()

    def feed() -> None:
        with os.fdopen(write, "wb") as out:
            out.write(data)

    feeder = threading.Thread(target=feed)
    feeder.start()
    with os.fdopen(read, "rb") as end:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=end))
        yield
    feeder.join()


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
def test_from_a_pipe(monkeypatch, kind):
    data = FILES[kind]()
    with piped(data, monkeypatch):
        _, frames = frames_of("-")
    assert torch.equal(frames, by_decoder(data))


def test_a_pipe_that_cannot_be_sought_says_what_it_needs(monkeypatch):
    """The header is behind more than FFmpeg keeps: it opens, and no frame comes."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 160, 240, 3), dtype=np.uint8)
    for data in (encode(list(noise)), b"nothing"):
        with piped(data, monkeypatch), pytest.raises(BadSample, match="-movflags faststart"):
            frames_of("-")


def test_from_a_server(tmp_path):
    (tmp_path / "clip.mkv").write_bytes(FILES["mkv"]())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        _, frames = frames_of(f"{url}/clip.mkv")
        assert torch.equal(frames, by_decoder(FILES["mkv"]()))
        with pytest.raises(BadSample, match="404"):
            frames_of(f"{url}/other.mkv")
    finally:
        server.shutdown()
        server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Says nothing."""


@pytest.mark.fault(49, 56)
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"#EXTM3U\n#EXTINF:9,\n/etc/passwd\n", "not a mp4"),
        (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "not a mp4"),
        (audio_bytes(), "no video stream"),
        (video_bytes()[:700], "cannot be decoded"),
    ],
)
def test_files_that_are_no_videos(tmp_path, data, reason):
    (tmp_path / "clip.mp4").write_bytes(data)
    with pytest.raises(BadSample, match=reason):
        frames_of(str(tmp_path / "clip.mp4"))


def test_what_is_live(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    assert all(map(is_live, ("-", "rtsp://camera/1", "/dev/null", str(tmp_path / "fifo"))))
    assert not is_live(str(tmp_path / "x.mp4"))
