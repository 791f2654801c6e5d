"""Opens videos from bytes, with the decoder that a recipe asks for.

Both backends give the same frame numbers and the same upright RGB pixels, so a run does not depend on which one is
installed. Decoded on a GPU (`data.decode_device`), the same frames have slightly different colours. Input is bytes
only, so a playlist cannot lead to other files. No video exceeds the recipe's `data.limits` (decode_limits.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch

from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode_card import CPU, own_card
from sfa_dist.data.video.decode_limits import check_frame_count, check_promise, within
from sfa_dist.data.video.resample import at_rate
from sfa_dist.data.video.video import Derived, FrameNumbers, FrameTimes, Shrink, StoredVideo, Video
from sfa_dist.errors import RecipeError
from sfa_dist.recipe.blocks import DataBlock, LimitsBlock, Rate

NO_OTHER_LIMITS = LimitsBlock()  # the schema's defaults
_COMPARED = 16  # frames compared at a time
_ALIKE = 4.0  # mean difference, of 255 levels, that versions of FFmpeg may show


class Decoder(NamedTuple):
    """A usable backend. `open(data)` gives a Video or raises BadSample; its frames are on `device`."""

    name: str
    version: str
    open: Callable[[bytes], Video]
    device: torch.device = CPU


class LimitedVideo(Derived):
    """A backend's video whose calls take no longer than `limits.seconds`."""

    def __init__(self, video: StoredVideo, limits: LimitsBlock) -> None:
        super().__init__(video, video.num_frames, video.fps)
        self._stored, self._limits = video, limits
        check_frame_count(self.num_frames, limits)

    def frames_at(self, indices: FrameNumbers, shrink: Shrink | None = None) -> torch.Tensor:
        """See `Video.frames_at`."""
        return within(self._limits.seconds, lambda: self._stored.frames_at(indices, shrink))

    def times(self) -> FrameTimes:
        """See `StoredVideo.times`."""
        return within(self._limits.seconds, self._stored.times)


def open_limited(
    backend: Callable[[bytes, LimitsBlock], StoredVideo], limits: LimitsBlock, data: bytes, rate: Rate = "stored"
) -> Video:
    """A video of a backend, within limits and at a rate (resample.py). Raises BadSample."""
    check_promise(data, limits)
    video = within(limits.seconds, lambda: LimitedVideo(backend(data, limits), limits))
    return at_rate(video, data, rate, limits)


def decoder_of(data: DataBlock) -> Decoder:
    """The decoder that a recipe asks for. Raises RecipeError if it cannot be used here."""
    if data.decode_device == "cpu":
        return choose_decoder(data.decoder, data.limits, data.fps)
    return choose_decoder("torchcodec", data.limits, data.fps, own_card())


def choose_decoder(
    wanted: Literal["auto", "torchcodec", "pyav"] = "auto",
    limits: LimitsBlock = NO_OTHER_LIMITS,
    rate: Rate = "stored",
    device: torch.device = CPU,
) -> Decoder:
    """The wanted decoder; `auto` is torchcodec if it and its FFmpeg libraries load, else PyAV.

    Its videos have frames at `rate` (`data.fps`). Only torchcodec can decode on a `device` other than the CPU.

    Raises RecipeError, which says what to do, if the wanted decoder cannot be used.
    """
    if wanted == "pyav":
        return _pyav(limits, rate)
    try:
        return _torchcodec(limits, rate, device)
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError if FFmpeg's libraries are missing
        if wanted == "auto":
            return _pyav(limits, rate)
        reason = str(error).strip().split("\n")[0]
        raise RecipeError(
            f"data.decoder: torchcodec cannot be used ({reason}). Install it with `pip install torchcodec` and FFmpeg "
            "with `apt-get install ffmpeg` or `conda install ffmpeg`, or set data.decoder to auto or pyav"
        ) from error


def why_not_torchcodec(data: DataBlock) -> str | None:
    """Why a recipe with `decoder: auto` does not get torchcodec on this machine; None if it does."""
    if data.decoder != "auto" or data.decode_device != "cpu":
        return None
    try:
        _torchcodec(data.limits, data.fps, CPU)
    except (ImportError, OSError, RuntimeError) as error:
        return " ".join(str(error).split())[:80]
    return None


def sound_frames(data: bytes, limits: LimitsBlock = NO_OTHER_LIMITS) -> int:
    """The number of frames before the first damaged one.

    PyAV decodes the whole video in FFmpeg's strict mode, which torchcodec does not offer: otherwise FFmpeg conceals
    most damage inside a frame.
    """
    return int(_pyav_module().sound_frames(data, limits))


def check_shown(video: Video, data: bytes, limits: LimitsBlock = NO_OTHER_LIMITS) -> None:
    """Raises BadSample if the frames of a video, as stored, differ from those shown when it is played."""
    count, shown = 0, _pyav_module().played(data, limits)
    while pictures := list(islice(shown, _COMPARED)):
        numbers = range(count, min(count + len(pictures), video.num_frames))
        count += len(pictures)
        found = video.frames_at(numbers).cpu() if numbers else ()
        for number, frame, pixels in zip(numbers, found, pictures, strict=False):
            if frame.shape != pixels.shape or (frame.float() - torch.from_numpy(pixels)).abs().mean() > _ALIKE:
                raise BadSample(f"the decoder gives another frame {number} than the video shows: encode it again")
    if count != video.num_frames:
        raise BadSample(f"the decoder counts {video.num_frames} frames, the video shows {count}: encode it again")


def _torchcodec(limits: LimitsBlock, rate: Rate, device: torch.device) -> Decoder:
    module = importlib.import_module("sfa_dist.data.video.decode_torchcodec")
    if device.type != "cpu":
        module.require_card_decodes(device)
    backend = partial(module.TorchcodecVideo, device=device)
    return Decoder("torchcodec", module.version(device), partial(open_limited, backend, limits, rate=rate), device)


def _pyav(limits: LimitsBlock, rate: Rate) -> Decoder:
    module = _pyav_module()
    return Decoder("pyav", module.version(), partial(open_limited, module.PyAVVideo, limits, rate=rate))


def _pyav_module() -> Any:
    try:
        return importlib.import_module("sfa_dist.data.video.decode_pyav")
    except ImportError as error:
        raise RecipeError(f"data.decoder: PyAV cannot be used ({error}). Install it with `pip install av`") from error
