"""Decoding with torchcodec, the fast backend. Needs FFmpeg's shared libraries on the machine."""

from __future__ import annotations

import io
import re
from functools import cache
from importlib.metadata import version as package_version

import av
import numpy as np
import torch
import torchcodec
from torchcodec.decoders import VideoDecoder

from sfa_dist.data.video.decode_card import CPU, beside_training
from sfa_dist.data.video.decode_limits import check_time
from sfa_dist.data.video.decode_pyav import PyAVVideo
from sfa_dist.data.video.gather import GatheredClip, slice_frames
from sfa_dist.data.video.orientation import Orientation
from sfa_dist.data.video.video import FrameNumbers, FrameTimes, Shrink
from sfa_dist.errors import RecipeError
from sfa_dist.recipe.blocks import LimitsBlock

# torchcodec also decodes pictures, so it imports without FFmpeg and reports that here; older versions fail on import.
_FFMPEG = getattr(torchcodec, "ffmpeg_major_version", "")
if _FFMPEG is None:
    raise ImportError("FFmpeg's shared libraries were not found")

# What torchcodec raises for a bad file: RuntimeError from FFmpeg, ValueError without a video stream, IndexError and
# TypeError if the header does not match the content.
_DECODE_ERRORS = (RuntimeError, ValueError, IndexError, TypeError)
_GPU_FAULTS = ("CUDA error", "out of memory")  # in the text of a RuntimeError
_NO_DRIVER_LIBRARY = "NVcuvid unavailable"  # in the text of VideoDecoder.cpu_fallback


def version(device: torch.device = CPU) -> str:
    """The backend's version, for env.json and the feature cache's key: the GPU's colours differ from the CPU's."""
    where = "" if device.type == "cpu" else ", on the card"
    return f"torchcodec {package_version('torchcodec')} with FFmpeg {_FFMPEG}{where}"


class TorchcodecVideo:
    """A `Video` on torchcodec, for files where it returns the frames that a player shows; PyAV reads the others.

    PyAV reads a file whose groups of pictures are not closed or whose frames must be counted (frame_order.py). It also
    reads a file that torchcodec would orient wrongly: torchcodec applies the container's angle only, and ignores
    mirroring and the orientation in the stream itself. In all other files the time of each frame is compared. Decoding
    uses one thread, because the loader's workers run in parallel. Frames are on `device`. A format that the GPU's
    decoder does not support is decoded by FFmpeg on the CPU and converted to RGB on the GPU.
    """

    def __init__(self, data: bytes, limits: LimitsBlock, device: torch.device = CPU) -> None:
        self._limits, self._device = limits, device
        self._stored = PyAVVideo(data, limits)
        self.num_frames, self.fps, self._times = self._stored.num_frames, self._stored.fps, self._stored.times()
        self._decoder = self._usable(data) if self._stored.closed else None
        self.height, self.width = self._stored.height, self._stored.width

    def frames_at(self, indices: FrameNumbers, shrink: Shrink | None = None) -> torch.Tensor:
        """See `Video.frames_at`."""
        if self._decoder is not None:
            clip = self._read(self._decoder, indices, shrink)
            if clip is not None:
                return clip
            self._decoder = None
        return self._stored.frames_at(indices, shrink).to(self._device)

    def times(self) -> FrameTimes:
        """See `StoredVideo.times`."""
        return self._times

    def _usable(self, data: bytes) -> VideoDecoder | None:
        """A decoder; None unless it finds the right number of frames and orients them as a player does."""
        try:
            with beside_training(self._device):
                decoder = _opened(data, self._device)
        except _DECODE_ERRORS as error:
            _raise_gpu_fault(error, self._device)
            return None  # PyAV reports what is wrong
        turns = round((getattr(decoder.metadata, "rotation", None) or 0) / 90) % 4
        as_shown = Orientation(turns) == self._stored.orientation
        return decoder if as_shown and decoder.metadata.num_frames == self.num_frames else None

    def _read(self, decoder: VideoDecoder, indices: FrameNumbers, shrink: Shrink | None) -> torch.Tensor | None:
        """The frames; None if they do not decode, or are not those at `indices`."""
        gathered = GatheredClip(indices, self._limits, shrink, self._device)
        step = slice_frames(self.height, self.width)
        start_time = decoder.metadata.begin_stream_seconds or 0.0
        tolerance = np.diff(self._times).min(initial=1.0) / 2
        try:
            with beside_training(self._device):
                for start in range(0, len(gathered.wanted), step):
                    check_time()
                    numbers = gathered.wanted[start : start + step]
                    found = decoder.get_frames_at(numbers)
                    times = found.pts_seconds.cpu().numpy() - start_time
                    if (np.abs(times - self._times[numbers]) > tolerance).any():
                        return None
                    gathered.add(numbers, found.data)
        except _DECODE_ERRORS as error:
            _raise_gpu_fault(error, self._device)
            return None
        return gathered.clip(self.num_frames)


@cache
def require_card_decodes(device: torch.device) -> None:
    """Raises RecipeError if a GPU cannot decode. Opens a small video to find out.

    Either torchcodec was built without CUDA, or the driver's library for decoding is missing. In the second case
    torchcodec would silently decode on the CPU.
    """
    key, advice = "data.decode_device: cuda", "or set data.decode_device to cpu"
    try:
        fallback = str(getattr(_opened(_grey_video(), device), "cpu_fallback", ""))
    except _DECODE_ERRORS as error:
        raise RecipeError(
            f"{key}: torchcodec cannot decode on {device} ({_one_line(error)}). Install a torchcodec that was built "
            f"with CUDA, {advice}"
        ) from error
    if _NO_DRIVER_LIBRARY in fallback:
        raise RecipeError(
            f"{key}: the driver's library libnvcuvid.so.1 is missing. In a container ask for it with "
            f"NVIDIA_DRIVER_CAPABILITIES=compute,utility,video, {advice}"
        )


def _opened(data: bytes, device: torch.device) -> VideoDecoder:
    return VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact", device=str(device))


def _grey_video() -> bytes:
    """An mp4 of one frame, 256 x 256 pixels, from an encoder that every FFmpeg has."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=1)
        stream.height, stream.width, stream.pix_fmt = 256, 256, "yuv420p"
        out.mux(stream.encode(av.VideoFrame(256, 256, "yuv420p")))
        out.mux(stream.encode(None))
    return file.getvalue()


def _raise_gpu_fault(error: Exception, device: torch.device) -> None:
    """Raises a fault of the GPU again: counted as bad samples, it would leave nothing to train on."""
    if device.type != "cpu" and any(sign in str(error) for sign in _GPU_FAULTS):
        raise error


def _one_line(error: Exception) -> str:
    text = re.sub(r"^.*\.cpp:\d+, ", "", " ".join(str(error).split()))  # drops the position in torchcodec's source
    return "no video stream" if "best video stream is unknown" in text else text[:200]
