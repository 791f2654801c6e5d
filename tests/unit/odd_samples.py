"""Videos as users have them and as nobody should: in other codecs, rotated, irregular in time, cut, huge."""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

QUIET_X265 = {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1"}
FAST_VPX = {"deadline": "realtime", "cpu-used": "8"}


def blocks(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 (height, width, 3) of random colours in blocks of 8: something to see and to damage in each frame."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 255, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return np.kron(small, np.ones((8, 8, 1), np.uint8))[:height, :width]


def encode_as(
    codec: str,
    pix_fmt: str = "yuv420p",
    container: str = "mp4",
    frames: Sequence[np.ndarray] | None = None,
    options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    gop: int = 8,
    prepare: Callable[[Any], None] | None = None,
) -> bytes:
    """Encodes uint8 RGB frames (12 of `blocks` by default) at 10 a second, or at `times` in milliseconds.

    mp4 files have their header in front (faststart). `prepare` may change the stream before the first frame.
    """
    pictures = [blocks(n) for n in range(12)] if frames is None else frames
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip")
        flags = {"movflags": "faststart"} if container in ("mp4", "mov") else {}
        with av.open(str(path), "w", format=container, options=flags) as out:
            stream: Any = out.add_stream(codec, rate=10)
            stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pix_fmt
            stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
            stream.options = options or ({"preset": "ultrafast", "bf": "2", "crf": "16"} if codec == "libx264" else {})
            if times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            if prepare is not None:
                prepare(stream)
            for number, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
                if times is not None:
                    frame.pts, frame.time_base = times[number], Fraction(1, 1000)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        return path.read_bytes()


def box(data: bytes | bytearray, name: bytes) -> int:
    """Where the content of the first mp4 box of a name starts."""
    return data.index(name) + 4


def rotated(video: bytes) -> bytes:
    """An mp4 whose header says that its pictures are to be turned by a quarter clockwise, as telephones write them."""
    data = bytearray(video)
    matrix = box(data, b"tkhd") + 40  # version 0: 4 flags, 20 times and numbers, 8 reserved, 8 layer and volume
    turned = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", *turned)
    return bytes(data)


def claims_frames(video: bytes, frames: int) -> bytes:
    """An mp4 whose header says that it has as many frames."""
    data = bytearray(video)
    struct.pack_into(">I", data, box(data, b"stsz") + 8, frames)
    struct.pack_into(">I", data, box(data, b"stts") + 8, frames)
    return bytes(data)


def header_only(video: bytes) -> bytes:
    """A faststart mp4 up to where the frames begin."""
    return video[: video.index(b"mdat") - 4]


def flip_bytes(video: bytes, count: int, seed: int = 0) -> bytes:
    """An mp4 with `count` bytes of its frames inverted."""
    data, start = bytearray(video), video.index(b"mdat") + 4
    for place in np.random.default_rng(seed).integers(start, len(data), count):
        data[place] ^= 0xFF
    return bytes(data)


def png_bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that claims side x side pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1 << 20)))]
    body = b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in [*chunks, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + body


def several_streams(sizes: Sequence[tuple[int, int]], container: str = "mp4", default: int | None = None) -> bytes:
    """12 frames of `blocks` in a video stream of each size (height, width), and sound before them; `default` marks a
    stream as the one to be played."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip")
        with av.open(str(path), "w", format=container) as out:
            sound: Any = out.add_stream("aac", rate=8000, layout="mono")
            streams: list[Any] = []
            for number, (height, width) in enumerate(sizes):
                stream: Any = out.add_stream("libx264", rate=10)
                stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
                stream.codec_context.thread_count = 1
                stream.options = {"preset": "ultrafast"}
                if default is not None:
                    stream.disposition = Disposition.default if number == default else Disposition(0)
                streams.append(stream)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 8000
            out.mux(sound.encode(silence))
            for number in range(12):
                for stream, (height, width) in zip(streams, sizes, strict=True):
                    picture = blocks(number + 100 * height, height, width)
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            for stream in (sound, *streams):
                out.mux(stream.encode(None))
        return path.read_bytes()
