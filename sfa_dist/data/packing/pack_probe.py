"""Checks one clip before it is packed: whether it exists, decodes and is long enough; re-encodes it if asked to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from sfa_dist.data.packing.annotations.rows import ClipRow
from sfa_dist.data.packing.pack_settings import Encoding, PackSettings
from sfa_dist.data.packing.reencode import SUFFIX, encode_frames, inspect_cut, inspect_frames, reencode
from sfa_dist.data.shards.shard_walk import VIDEO_SUFFIXES
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode import check_shown, choose_decoder, sound_frames
from sfa_dist.data.video.decode_limits import check_bytes, check_whole
from sfa_dist.data.video.file_kinds import HEAD_BYTES, stored_suffix, unreadable
from sfa_dist.data.video.pixel_statistics import pixel_moments
from sfa_dist.data.video.resample import Resampled
from sfa_dist.data.video.video import Video
from sfa_dist.errors import CheckpointError

Problem = Literal["missing", "corrupt", "short", "contradictory"]


@dataclass(frozen=True)
class VideoProbe:
    """What was found out about a clip.

    `fps` is in frames a second, 0.0 where unknown; `sha256` is the file's, in hex, or that of the encoded file for a
    part of a video. `problem` is None for a good clip, and `reason` describes it. `encoded` is the path of the encoded
    file to pack instead, if there is one. `passing`: the problem is the disk's and not the file's, and may be gone at
    the next try. `suffix` is that of the file's content, which its name may not have. `moments` are those of the
    pixels of a few frames (pixel_statistics.py).
    """

    frames: int = 0
    fps: float = 0.0
    sha256: str = ""
    problem: Problem | None = None
    reason: str = ""
    encoded: str = ""
    passing: bool = False
    suffix: str = ""
    moments: tuple[float, ...] = ()

    @property
    def duration(self) -> float:
        """Seconds, 0.0 where the frame rate is unknown."""
        return self.frames / self.fps if self.fps else 0.0


@dataclass(frozen=True)
class VideoProber:
    """Probes rows; can be sent to another process.

    A clip that a run would refuse, reading it in one of `settings.readings`, is bad. Encoded clips go to `folder`: all
    of them with `settings.encoding`, else only those that are parts of a video. With `settings.check` none is encoded,
    and of a part one frame is decoded.
    """

    settings: PackSettings
    folder: Path

    def __call__(self, row: ClipRow) -> VideoProbe:
        """The probe of a row; for a bad file it says what is wrong.

        Raises CheckpointError where an encoded clip cannot be written.
        """
        if not is_there(row):
            return VideoProbe(problem="missing", reason="no such file")
        try:
            return self._part(row) if row.cut or row.frames else self._whole(row)
        except BadSample as error:
            return VideoProbe(problem="corrupt", reason=str(error))
        except OSError as error:
            return VideoProbe(problem="corrupt", reason=str(error), passing=True)

    def identity(self, row: ClipRow) -> str:
        """A hash, in hex, of what the probe depends on: the file's state, the part of it, and the settings."""
        state = row.path.stat()
        own = (row.path, state.st_size, state.st_mtime_ns, row.cut, row.frames, row.fps)
        parts = (*own, self.settings.min_frames, self.settings.decode_all, *self.settings.readings)
        return hashlib.sha256(
            repr((*map(str, parts), self.settings.encoding, self.settings.check)).encode()
        ).hexdigest()

    def _whole(self, row: ClipRow) -> VideoProbe:
        if not row.path.is_file():
            return VideoProbe(problem="corrupt", reason="not a file", passing=True)
        for reading in self.settings.readings:
            check_bytes(row.path.stat().st_size, reading.limits)  # before it is read
        data = row.path.read_bytes()
        suffix = stored_suffix(data[:HEAD_BYTES], row.suffix)
        if not suffix:
            return VideoProbe(problem="corrupt", reason=unreadable(data[:HEAD_BYTES], str(row.path)))
        check_whole(data)
        video, moments = self._open(data)
        if video.num_frames < self.settings.min_frames:
            return VideoProbe(video.num_frames, problem="short", reason=f"{video.num_frames} frames")
        if self.settings.decode_all:
            self._check_all(data, video)
        sha256 = hashlib.sha256(data).hexdigest()
        if self.settings.encoding is None or self.settings.check or suffix not in VIDEO_SUFFIXES:
            return VideoProbe(video.num_frames, video.fps, sha256, suffix=suffix, moments=moments)
        file = self._encoded(row, lambda encoding: reencode(data, encoding))
        frames = self._open(file.read_bytes())[0].num_frames
        if frames != video.num_frames:
            file.unlink()
            raise BadSample(f"{frames} of {video.num_frames} frames are left after re-encoding")
        return VideoProbe(frames, video.fps, sha256, encoded=str(file), moments=moments)

    def _part(self, row: ClipRow) -> VideoProbe:
        """Cuts out a part of a long video or of a folder of frames."""
        if self.settings.check:
            frames, fps = _inspect_part(row)
            if frames < self.settings.min_frames:
                return VideoProbe(frames, problem="short", reason=f"{frames} frames")
            return VideoProbe(frames, fps, self.identity(row))
        file = self._encoded(row, lambda encoding: _cut_out(row, encoding))
        data = file.read_bytes()
        video, moments = self._open(data)
        if video.num_frames < self.settings.min_frames:
            return VideoProbe(video.num_frames, problem="short", reason=f"{video.num_frames} frames")
        sha256 = hashlib.sha256(data).hexdigest()
        return VideoProbe(video.num_frames, video.fps, sha256, encoded=str(file), moments=moments)

    def _open(self, data: bytes) -> tuple[Video, tuple[float, ...]]:
        """(the video as stored, the moments of its pixels), both by the first of the readings.

        Raises BadSample where one of the readings cannot open it, or decode its first, middle or last frame.
        """
        stored: list[Video] = []
        moments: tuple[float, ...] = ()
        for reading in self.settings.readings:
            video = choose_decoder(reading.decoder, reading.limits, reading.rate).open(data)
            frames = video.frames_at(np.unique([0, video.num_frames // 2, video.num_frames - 1]))
            moments = moments or pixel_moments(frames)
            stored.append(video.stored if isinstance(video, Resampled) else video)
        return stored[0], moments

    def _check_all(self, data: bytes, video: Video) -> None:
        """Raises BadSample for a damaged frame, and where a decoder gives other frames than a player shows."""
        if (sound := sound_frames(data)) < video.num_frames:
            raise BadSample(f"frame {sound} of {video.num_frames} is damaged")
        for reading in self.settings.readings:
            decoder = choose_decoder(reading.decoder, reading.limits)
            check_shown(decoder.open(data), data, reading.limits)

    def _encoded(self, row: ClipRow, encode: Callable[[Encoding], bytes]) -> Path:
        """The clip's encoded file in `folder`; one that an interrupted pack left there is used as it is."""
        final = self.folder / f"{self.identity(row)}.{SUFFIX}"
        if not final.exists():
            data = encode(self.settings.encoding or Encoding())
            temporary = final.with_name(f".{final.name}.{os.getpid()}")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(data)
                temporary.replace(final)
            except OSError as error:
                advice = "make room there and run the same command again"
                raise CheckpointError(f"{self.folder} cannot be written ({error.strerror}): {advice}") from error
            finally:
                with suppress(OSError):
                    temporary.unlink()
        return final


def is_there(row: ClipRow) -> bool:
    """Whether the row's file or folder exists; False for a name that no file can have."""
    return os.path.exists(row.path)


def _inspect_part(row: ClipRow) -> tuple[int, float]:
    """(frames, frames a second) that a part will have. Raises BadSample where its beginning cannot be decoded."""
    if row.frames is not None:
        return inspect_frames(row.path, *row.frames), row.fps
    assert row.cut is not None
    return inspect_cut(row.path, row.cut)


def _cut_out(row: ClipRow, encoding: Encoding) -> bytes:
    if row.frames is not None:
        return encode_frames(row.path, *row.frames, row.fps, encoding)
    return reencode(row.path, encoding, row.cut)


def start_probe_process() -> None:
    """Limits torch to one thread: the processes are the parallelism."""
    torch.set_num_threads(1)
