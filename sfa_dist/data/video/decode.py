"""Videos from bytes: what a decoded video offers, and which library decodes it.

Both backends give the same frame numbers and the same upright RGB pixels, so a run does not depend on which one a
machine has; on a card (`data.decode_device`) the same frames have slightly other colours. Input is bytes only: a
playlist that points to other files cannot be followed. A video never takes more than the recipe's `data.limits`
(decode_limits.py).
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

NO_OTHER_LIMITS = LimitsBlock()  # the schema's own
_COMPARED = 16  # frames at a time
_ALIKE = 4.0  # levels of 255 on average that versions of FFmpeg may differ in


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
    """The decoder that a recipe asks for. Raises RecipeError where it cannot be used here."""
    if data.decode_device == "cpu":
        return choose_decoder(data.decoder, data.limits, data.fps)
    return choose_decoder("torchcodec", data.limits, data.fps, own_card())


def choose_decoder(
    wanted: Literal["auto", "torchcodec", "pyav"] = "auto",
    limits: LimitsBlock = NO_OTHER_LIMITS,
    rate: Rate = "stored",
    device: torch.device = CPU,
) -> Decoder:
    """The decoder asked for; `auto` takes torchcodec where it loads with its FFmpeg libraries, else PyAV. Its videos
    have the frames of `data.fps` (`rate`), and are decoded on `device`, which only torchcodec has a choice of.

    Raises RecipeError, saying what to do, when the one asked for cannot be used.
    """
    if wanted == "pyav":
        return _pyav(limits, rate)
    try:
        return _torchcodec(limits, rate, device)
    except (ImportError, OSError, RuntimeError) as error:  # it raises RuntimeError where FFmpeg's libraries are absent
        if wanted == "auto":
            return _pyav(limits, rate)
        reason = str(error).strip().split("\n")[0]
        raise RecipeError(
            f"data.decoder: torchcodec cannot be used ({reason}). Install it with `pip install torchcodec` and FFmpeg "
            "with `apt-get install ffmpeg` or `conda install ffmpeg`, or set data.decoder to auto or pyav"
        ) from error


def why_not_torchcodec(data: DataBlock) -> str | None:
    """What keeps a recipe with `decoder: auto` from torchcodec on this machine; None where nothing does."""
    if data.decoder != "auto" or data.decode_device != "cpu":
        return None
    try:
        _torchcodec(data.limits, data.fps, CPU)
    except (ImportError, OSError, RuntimeError) as error:
        return " ".join(str(error).split())[:80]
    return None


def sound_frames(data: bytes, limits: LimitsBlock = NO_OTHER_LIMITS) -> int:
    """How many frames come before the first damaged one, or all. Decodes everything, strictly, by PyAV: FFmpeg
    otherwise covers up most damage inside a frame, and torchcodec cannot tell it not to."""
    return int(_pyav_module().sound_frames(data, limits))


def check_shown(video: Video, data: bytes, limits: LimitsBlock = NO_OTHER_LIMITS) -> None:
    """Raises BadSample where the frames of a video, as stored, are others than come out where it is played."""
    count, shown = 0, _pyav_module().played(data, limits)
    while pictures := list(islice(shown, _COMPARED)):
        numbers = range(count, min(count + len(pictures), video.num_frames))
        count += len(pictures)
        found = video.frames_at(numbers).cpu() if numbers else ()
        for number, frame, pixels in zip(numbers, found, pictures, strict=False):
            if frame.shape != pixels.shape or (frame.float() - torch.from_numpy(pixels)).abs().mean() > _ALIKE:
                raise BadSample(f"the decoder gives another frame {number} than the video shows: encode it anew")
    if count != video.num_frames:
        raise BadSample(f"the decoder counts {video.num_frames} frames, the video shows {count}: encode it anew")


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
