"""How the clips of a data set are encoded, by the packets of a few of them: what decoding costs hangs on it."""

from __future__ import annotations

import io
from typing import NamedTuple

import av

from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.errors import DataError

LOOKED_AT, PACKETS = 3, 300  # Clips of a data set, packets of a clip.


class ClipEncoding(NamedTuple):
    """`gop` is the most frames from one key frame to the next (1: each is one), `short_side` is in pixels."""

    gop: int
    short_side: int

    def is_cheaper_after(self, gop: int, short_side: int) -> bool:
        """Whether clips re-encoded so would be decoded faster."""
        return self.gop > gop or self.short_side > short_side


def encoding_of(index: SampleIndex) -> ClipEncoding | None:
    """The costliest of a few clips from all over the data set; None where none of them can be read."""
    count = len(index)
    found = [look(index, sample) for sample in sorted({count * i // LOOKED_AT for i in range(LOOKED_AT)}) if count]
    known = [each for each in found if each is not None]
    return ClipEncoding(max(e.gop for e in known), max(e.short_side for e in known)) if known else None


def look(index: SampleIndex, sample: int) -> ClipEncoding | None:
    """Of one clip; None where it is bad, of which training has its own word, or no video."""
    try:
        return encoding_of_bytes(read_clip_bytes(index, sample))
    except (BadSample, DataError):
        return None


def encoding_of_bytes(data: bytes) -> ClipEncoding | None:
    """Of a video's bytes, from its first packets; None where they are no video."""
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
