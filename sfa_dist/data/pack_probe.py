"""Looks at one file before it is packed: is it there, does it decode, how long is it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from sfa_dist.data.bad_sample import BadSample
from sfa_dist.data.decode import Video, choose_decoder
from sfa_dist.data.pack_source import PACKABLE, ClipRow
from sfa_dist.data.reencode import Reencoder
from sfa_dist.data.shard_walk import VIDEO_SUFFIXES

_FRAMES_AT_ONCE = 16


@dataclass(frozen=True)
class Probe:
    """What was found. `problem` is None for a good clip; duration in seconds; sha256 of the file, hex. `encoded` is
    what to pack in the file's place, where it was encoded anew."""

    frames: int = 0
    fps: float = 0.0
    sha256: str = ""
    problem: Literal["missing", "corrupt", "short"] | None = None
    reason: str = ""
    encoded: Path | None = None

    @property
    def duration(self) -> float:
        """Seconds, 0.0 where the frame rate is unknown."""
        return self.frames / self.fps if self.fps else 0.0


@dataclass(frozen=True)
class Prober:
    """Probes rows; can be sent to another process. `decode_all` decodes each frame, else the first, middle and last."""

    decoder: Literal["auto", "torchcodec", "pyav"]
    min_frames: int
    decode_all: bool
    reencode: Reencoder | None = None

    def __call__(self, row: ClipRow) -> Probe:
        """Never raises for a bad file: the answer says what is wrong with it."""
        if not row.path.is_file():
            return Probe(problem="missing", reason="no such file")
        if row.suffix not in PACKABLE:
            return Probe(problem="corrupt", reason=f"suffix {row.suffix!r} is not one of {', '.join(PACKABLE)}")
        try:
            data = Path(row.path).read_bytes()
        except OSError as error:
            return Probe(problem="corrupt", reason=str(error))
        try:
            video = choose_decoder(self.decoder).open(data)
            if video.num_frames < self.min_frames:
                return Probe(video.num_frames, problem="short", reason=f"{video.num_frames} frames")
            self._decode(video)
            sha256 = hashlib.sha256(data).hexdigest()
            encoded = self._encode(data, sha256, video) if self.reencode and row.suffix in VIDEO_SUFFIXES else None
        except BadSample as error:
            return Probe(problem="corrupt", reason=str(error))
        return Probe(video.num_frames, video.fps, sha256, encoded=encoded)

    def _encode(self, data: bytes, sha256: str, video: Video) -> Path:
        """The clip encoded anew; raises BadSample unless it has as many frames as the source."""
        assert self.reencode is not None
        encoded = self.reencode(data, sha256)
        frames = choose_decoder(self.decoder).open(encoded.read_bytes()).num_frames
        if frames != video.num_frames:
            encoded.unlink()
            raise BadSample(f"{frames} of {video.num_frames} frames are left after encoding it anew")
        return encoded

    def _decode(self, video: Video) -> None:
        last = video.num_frames - 1
        numbers = np.arange(last + 1) if self.decode_all else np.unique([0, last // 2, last])
        for part in np.array_split(numbers, -(-len(numbers) // _FRAMES_AT_ONCE)):
            video.frames_at(part)


def start_probe_process() -> None:
    """One thread a process: the processes are the parallelism."""
    torch.set_num_threads(1)
