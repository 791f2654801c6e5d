"""Decoding with torchcodec, the fast backend. Needs FFmpeg's shared libraries on the machine."""

from __future__ import annotations

import re
from importlib.metadata import version as package_version

import numpy as np
import torch
import torchcodec
from torchcodec.decoders import VideoDecoder

from sfa_dist.data.bad_sample import BadSample
from sfa_dist.data.decode_limits import check_clip_bytes, check_frame_size, check_time
from sfa_dist.data.decode_pyav import PyAVVideo
from sfa_dist.data.video import FrameNumbers, FrameTimes
from sfa_dist.recipe_blocks import LimitsBlock

# It imports without FFmpeg since it decodes pictures too, and then says so here; older versions fail on import.
_FFMPEG = getattr(torchcodec, "ffmpeg_major_version", "")
if _FFMPEG is None:
    raise ImportError("FFmpeg's shared libraries were not found")

# What torchcodec raises for a bad file: RuntimeError from FFmpeg, ValueError without a video stream, IndexError and
# TypeError where the header promises what the content does not have.
_DECODE_ERRORS = (RuntimeError, ValueError, IndexError, TypeError)


_SLICE = 8  # frames decoded between two looks at the clock


def version() -> str:
    """The backend's version, for env.json."""
    return f"torchcodec {package_version('torchcodec')} with FFmpeg {_FFMPEG}"


class TorchcodecVideo:
    """A `Video` on torchcodec. `exact` scans all packets first: with variable frame rate, or where the header lies
    about the number of frames, the approximate mode returns the wrong frames. One thread: the loader's workers are
    the parallelism."""

    def __init__(self, data: bytes, limits: LimitsBlock) -> None:
        self._data, self._limits = data, limits
        try:
            self._decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
            metadata = self._decoder.metadata
            self.num_frames = int(metadata.num_frames or 0)
            self.fps = float(metadata.average_fps or 0.0)
            self.height = int(metadata.height or 0)
            self.width = int(metadata.width or 0)
        except _DECODE_ERRORS as error:
            raise BadSample(f"cannot be opened as a video: {_one_line(error)}") from error
        if self.num_frames < 1:
            raise BadSample("no frame can be decoded")
        check_frame_size(self.height, self.width, limits)

    def frames_at(self, indices: FrameNumbers) -> torch.Tensor:
        """See `Video.frames_at`."""
        check_clip_bytes(len(indices), self.height, self.width, self._limits)
        wanted, order = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        clip = torch.empty((len(indices), self.height, self.width, 3), dtype=torch.uint8)
        try:
            for start in range(0, len(wanted), _SLICE):
                check_time()
                frames = self._decoder.get_frames_at(wanted[start : start + _SLICE].tolist()).data
                rows = np.flatnonzero((order >= start) & (order < start + _SLICE))
                clip[rows] = frames[order[rows] - start]
        except _DECODE_ERRORS as error:
            raise BadSample(f"frames cannot be decoded: {_one_line(error)}") from error
        return clip

    def times(self) -> FrameTimes:
        """See `StoredVideo.times`. torchcodec tells only those of frames that it has decoded, PyAV those of packets."""
        return PyAVVideo(self._data, self._limits).times()


def _one_line(error: Exception) -> str:
    text = re.sub(r"^.*\.cpp:\d+, ", "", " ".join(str(error).split()))  # its own source position helps nobody
    return "no video stream" if "best video stream is unknown" in text else text[:200]
