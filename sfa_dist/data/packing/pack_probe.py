"""Looks at one clip before it is packed: is it there, does it decode, how long is it; and encodes it where asked."""

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
from sfa_dist.data.packing.reencode import SUFFIX, encode_frames, look_at_cut, look_at_frames, reencode
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
    """What was found. `problem` is None for a good clip; duration in seconds; sha256 of the file (of the encoded one
    for a part of a video), hex. `encoded` is what to pack in the file's place, where it was encoded anew. `passing` is
    a problem of the disk and not of the file, which another try may not have. `suffix` is that of the file's kind,
    which its name need not have. `moments` are those of some frames' pixels (pixel_statistics.py)."""

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
        """Never raises for a bad file: the answer says what is wrong with it. Raises CheckpointError where what was
        encoded cannot be written."""
        if not is_there(row):
            return VideoProbe(problem="missing", reason="no such file")
        try:
            return self._part(row) if row.cut or row.frames else self._whole(row)
        except BadSample as error:
            return VideoProbe(problem="corrupt", reason=str(error))
        except OSError as error:
            return VideoProbe(problem="corrupt", reason=str(error), passing=True)

    def identity(self, row: ClipRow) -> str:
        """What the answer depends on: the file as it is now, the part of it, and how it is looked at."""
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
            raise BadSample(f"{frames} of {video.num_frames} frames are left after encoding it anew")
        return VideoProbe(frames, video.fps, sha256, encoded=str(file), moments=moments)

    def _part(self, row: ClipRow) -> VideoProbe:
        """A part of a long video or of a folder of frames, which is cut out."""
        if self.settings.check:
            frames, fps = _look_at_part(row)
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
        """The video as it is stored, opened by each of the readings, which decoded some frames; and the moments of
        their pixels, by the first reading."""
        stored: list[Video] = []
        moments: tuple[float, ...] = ()
        for reading in self.settings.readings:
            video = choose_decoder(reading.decoder, reading.limits, reading.rate).open(data)
            frames = video.frames_at(np.unique([0, video.num_frames // 2, video.num_frames - 1]))
            moments = moments or pixel_moments(frames)
            stored.append(video.stored if isinstance(video, Resampled) else video)
        return stored[0], moments

    def _check_all(self, data: bytes, video: Video) -> None:
        """Raises BadSample for a damaged frame, and where a decoder gives others than those that are shown."""
        if (sound := sound_frames(data)) < video.num_frames:
            raise BadSample(f"frame {sound} of {video.num_frames} is damaged")
        for reading in self.settings.readings:
            decoder = choose_decoder(reading.decoder, reading.limits)
            check_shown(decoder.open(data), data, reading.limits)

    def _encoded(self, row: ClipRow, encode: Callable[[Encoding], bytes]) -> Path:
        """The clip encoded into `folder`; what an interrupted pack has encoded is taken as it is."""
        final = self.folder / f"{self.identity(row)}.{SUFFIX}"
        if not final.exists():
            data = encode(self.settings.encoding or Encoding())
            temporary = final.with_name(f".{final.name}.{os.getpid()}")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(data)
                temporary.replace(final)
            except OSError as error:
                raise CheckpointError(
                    f"{self.folder} cannot be written ({error.strerror}): make room there, and the same command goes on"
                ) from error
            finally:
                with suppress(OSError):
                    temporary.unlink()
        return final


def is_there(row: ClipRow) -> bool:
    """Whether the row's file or folder is, also where its name is none that a file could have."""
    return os.path.exists(row.path)


def _look_at_part(row: ClipRow) -> tuple[int, float]:
    """(frames, frames a second) that a part will have. Raises BadSample where its beginning is not there."""
    if row.frames is not None:
        return look_at_frames(row.path, *row.frames), row.fps
    assert row.cut is not None
    return look_at_cut(row.path, row.cut)


def _cut_out(row: ClipRow, encoding: Encoding) -> bytes:
    if row.frames is not None:
        return encode_frames(row.path, *row.frames, row.fps, encoding)
    return reencode(row.path, encoding, row.cut)


def start_probe_process() -> None:
    """One thread a process: the processes are the parallelism."""
    torch.set_num_threads(1)
