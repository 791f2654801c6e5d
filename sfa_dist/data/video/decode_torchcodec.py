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

# It imports without FFmpeg since it decodes pictures too, and then says so here; older versions fail on import.
_FFMPEG = getattr(torchcodec, "ffmpeg_major_version", "")
if _FFMPEG is None:
    raise ImportError("FFmpeg's shared libraries were not found")

# What torchcodec raises for a bad file: RuntimeError from FFmpeg, ValueError without a video stream, IndexError and
# TypeError where the header promises what the content does not have.
_DECODE_ERRORS = (RuntimeError, ValueError, IndexError, TypeError)
_CARD_FAULTS = ("CUDA error", "out of memory")  # RuntimeErrors too
_NO_DRIVER_LIBRARY = "NVcuvid unavailable"  # in the words of VideoDecoder.cpu_fallback


def version(device: torch.device = CPU) -> str:
    """The backend's version, for env.json and the feature cache's key: the card's colours differ from the CPU's."""
    place = "" if device.type == "cpu" else ", on the card"
    return f"torchcodec {package_version('torchcodec')} with FFmpeg {_FFMPEG}{place}"


class TorchcodecVideo:
    """A `Video` on torchcodec, for the files of which it gives the frames that are shown; PyAV reads the others.

    Those are told by their packets (frame_order.py): groups of pictures that are not closed, and what has to be
    counted; and by how they are turned: torchcodec does it by the container's angle alone, and sees neither mirrors nor
    what the stream itself says. Beyond that each frame's own time is compared. One thread: the loader's workers are the
    parallelism. Frames are on `device`; what a card's decoder has no units for, FFmpeg decodes on the CPU, and the card
    makes RGB of it.
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
        """A decoder that counts as many frames as there are, and turns them as they are shown."""
        try:
            with beside_training(self._device):
                decoder = _opened(data, self._device)
        except _DECODE_ERRORS as error:
            _raise_card_fault(error, self._device)
            return None  # PyAV says what is wrong
        turns = round((getattr(decoder.metadata, "rotation", None) or 0) / 90) % 4
        as_shown = Orientation(turns) == self._stored.orientation
        return decoder if as_shown and decoder.metadata.num_frames == self.num_frames else None

    def _read(self, decoder: VideoDecoder, indices: FrameNumbers, shrink: Shrink | None) -> torch.Tensor | None:
        """The frames; None where they do not decode, or are others than asked for."""
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
            _raise_card_fault(error, self._device)
            return None
        return gathered.clip(self.num_frames)


@cache
def require_card_decodes(device: torch.device) -> None:
    """Raises RecipeError where a card cannot decode: torchcodec was built without CUDA, or the driver's library for it
    is missing, in whose place torchcodec decodes everything on the CPU and tells nobody. Opens a small video."""
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
            f"{key}: the driver's library libnvcuvid.so.1 is not here. In a container ask for it with "
            f"NVIDIA_DRIVER_CAPABILITIES=compute,utility,video, {advice}"
        )


def _opened(data: bytes, device: torch.device) -> VideoDecoder:
    return VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact", device=str(device))


def _grey_video() -> bytes:
    """One frame of 256 x 256 pixels, by an encoder that every FFmpeg has."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=1)
        stream.height, stream.width, stream.pix_fmt = 256, 256, "yuv420p"
        out.mux(stream.encode(av.VideoFrame(256, 256, "yuv420p")))
        out.mux(stream.encode(None))
    return file.getvalue()


def _raise_card_fault(error: Exception, device: torch.device) -> None:
    """Raises what is wrong with the card and not with the video: counted as bad samples, it would train on nothing."""
    if device.type != "cpu" and any(sign in str(error) for sign in _CARD_FAULTS):
        raise error


def _one_line(error: Exception) -> str:
    text = re.sub(r"^.*\.cpp:\d+, ", "", " ".join(str(error).split()))  # its own source position helps nobody
    return "no video stream" if "best video stream is unknown" in text else text[:200]
