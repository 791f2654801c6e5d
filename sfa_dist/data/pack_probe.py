"""Looks at one file before it is packed: is it there, does it decode, how long is it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from sfa_dist.data.bad_sample import BadSample
from sfa_dist.data.decode import choose_decoder, sound_frames
from sfa_dist.data.decode_limits import check_whole
from sfa_dist.data.pack_source import PACKABLE, ClipRow


@dataclass(frozen=True)
class Probe:
    """What was found. `problem` is None for a good clip; duration in seconds; sha256 of the file, hex."""

    frames: int = 0
    fps: float = 0.0
    sha256: str = ""
    problem: Literal["missing", "corrupt", "short"] | None = None
    reason: str = ""

    @property
    def duration(self) -> float:
        """Seconds, 0.0 where the frame rate is unknown."""
        return self.frames / self.fps if self.fps else 0.0


@dataclass(frozen=True)
class Prober:
    """Probes rows; can be sent to another process. `decode_all` also decodes each frame, strictly; without it, the
    first, middle and last."""

    decoder: Literal["auto", "torchcodec", "pyav"]
    min_frames: int
    decode_all: bool

    def __call__(self, row: ClipRow) -> Probe:
        """Never raises for a bad file: the answer says what is wrong with it."""
        if not row.path.is_file():
            return Probe(problem="missing", reason="no such file")
        if row.suffix not in PACKABLE:
            return Probe(problem="corrupt", reason=f"suffix {row.suffix!r} is not one of {', '.join(PACKABLE)}")
        try:
            data = Path(row.path).read_bytes()
            check_whole(data)
            video = choose_decoder(self.decoder).open(data)
            if video.num_frames < self.min_frames:
                return Probe(video.num_frames, problem="short", reason=f"{video.num_frames} frames")
            video.frames_at(np.unique([0, video.num_frames // 2, video.num_frames - 1]))
            if self.decode_all and (sound := sound_frames(data)) < video.num_frames:
                raise BadSample(f"frame {sound} of {video.num_frames} is damaged")
        except (BadSample, OSError) as error:
            return Probe(problem="corrupt", reason=str(error))
        return Probe(video.num_frames, video.fps, hashlib.sha256(data).hexdigest())


def start_probe_process() -> None:
    """One thread a process: the processes are the parallelism."""
    torch.set_num_threads(1)
