"""How the clips of a data set are encoded, judged by a few of them: the cost of decoding depends on it."""

from __future__ import annotations

import io
from typing import NamedTuple

import av

from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.errors import DataError

LOOKED_AT, PACKETS = 3, 300  # Clips per data set, packets per clip.


class ClipEncoding(NamedTuple):
    """`gop` is the largest distance between key frames, in frames (1: only key frames); `short_side` is in pixels."""

    gop: int
    short_side: int

    def is_cheaper_after(self, gop: int, short_side: int) -> bool:
        """Whether clips re-encoded with these settings would decode faster."""
        return self.gop > gop or self.short_side > short_side


def encoding_of(index: SampleIndex) -> ClipEncoding | None:
    """The largest `gop` and `short_side` of a few clips across the data set; None if none of them can be read."""
    count = len(index)
    found = [look(index, sample) for sample in sorted({count * i // LOOKED_AT for i in range(LOOKED_AT)}) if count]
    known = [each for each in found if each is not None]
    return ClipEncoding(max(e.gop for e in known), max(e.short_side for e in known)) if known else None


def look(index: SampleIndex, sample: int) -> ClipEncoding | None:
    """The encoding of one clip; None if it is bad (training reports that) or not a video."""
    try:
        return encoding_of_bytes(read_clip_bytes(index, sample))
    except (BadSample, DataError):
        return None


def encoding_of_bytes(data: bytes) -> ClipEncoding | None:
    """The encoding of a video, from its first packets; None if `data` is not a video."""
    longest = since = 0
    try:
        with av.open(io.BytesIO(data), "r") as container:
            if not container.streams.video:
                return None
            stream = container.streams.video[0]
            for count, packet in enumerate(container.demux(stream)):
                if count >= PACKETS:
                    break
                if packet.size:
                    since = 1 if packet.is_keyframe else since + 1
                    longest = max(longest, since)
            return ClipEncoding(longest, min(stream.height, stream.width)) if longest else None
    except (av.error.FFmpegError, ValueError):
        return None
