"""Encodes clips anew before they are packed: smaller frames, and a key frame every few frames.

A training clip starts at a random frame, and the decoder has to begin at the key frame before it. Videos from the web
have one every 250 frames; with one every 12 a loader process decodes about 1.7 times as many clips a second, for
bytes that the smaller frames save again (benchmarks/decode.py measures both).
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from sfa_dist.data.bad_sample import BadSample
from sfa_dist.data.decode_pyav import RgbConverter, opened

SUFFIX = "mp4"


@dataclass(frozen=True)
class Encoding:
    """H.264 in an mp4, without sound, upright. `short_side` in pixels is an upper bound (None: the size stays), `gop`
    the frames from one key frame to the next, `crf` x264's quality (lower is better, 18 is hard to tell from the
    source)."""

    short_side: int | None = None
    gop: int = 12
    crf: int = 23


@dataclass(frozen=True)
class Reencoder:
    """Encodes into `folder`, under the source's hash: what an interrupted run has done is not done twice."""

    encoding: Encoding
    folder: Path

    def __call__(self, data: bytes, sha256: str) -> Path:
        """The encoded file. Raises BadSample for a source that cannot be decoded to its end."""
        settings = self.encoding
        final = self.folder / f"{sha256}-{settings.short_side or 'same'}-{settings.gop}-{settings.crf}.{SUFFIX}"
        if not final.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = final.with_name(f".{final.name}.{os.getpid()}")
            try:
                temporary.write_bytes(reencode(data, settings))
                temporary.replace(final)
            finally:
                temporary.unlink(missing_ok=True)
        return final


def reencode(data: bytes, encoding: Encoding) -> bytes:
    """A video's bytes in, the bytes of an mp4 with the same frames at the same times out. One thread, so that the same
    input gives the same bytes. Raises BadSample for what cannot be decoded."""
    target = io.BytesIO()
    with (
        opened(data) as (container, source),
        av.open(target, "w", format="mp4") as out,
    ):
        time_base = source.time_base or Fraction(1, 90_000)
        stream: av.VideoStream | None = None
        to_rgb = RgbConverter(source)
        last = -1
        for frame in container.decode(source):
            pixels = to_rgb(frame)
            if stream is None:
                stream = _add_stream(out, encoding, source.average_rate, time_base, pixels.shape[0], pixels.shape[1])
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            picture = picture.reformat(stream.width, stream.height, "yuv420p", interpolation="BICUBIC")
            time = frame.pts if frame.pts is not None else frame.dts
            last = max(last + 1, time if time is not None else last + 1)  # x264 wants times that rise
            picture.pts, picture.time_base = last, time_base
            out.mux(stream.encode(picture))
        if stream is None:
            raise BadSample("no frame can be decoded")
        out.mux(stream.encode(None))
    return target.getvalue()


def _add_stream(
    out: av.container.OutputContainer,
    encoding: Encoding,
    rate: Fraction | None,
    time_base: Fraction,
    height: int,
    width: int,
) -> av.VideoStream:
    stream = out.add_stream("libx264", rate=rate or 25)
    stream.height, stream.width = target_size(height, width, encoding.short_side)
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = time_base
    stream.codec_context.gop_size, stream.codec_context.thread_count = encoding.gop, 1
    stream.options = {"crf": str(encoding.crf), "preset": "medium", "sc_threshold": "0"}
    return stream


def target_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """(height, width) with the short side at most `short_side` and the same shape; even, as H.264 wants it."""
    scale = min(1.0, short_side / min(height, width)) if short_side else 1.0
    return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)
