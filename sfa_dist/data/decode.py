"""Videos from bytes: what a decoded video offers, and which library decodes it.

Both backends give the same frame numbers and the same upright RGB pixels, so a run does not depend on which one a
machine has. Input is bytes only: a playlist that points to other files cannot be followed. A video never takes more
than the recipe's `data.limits` (decode_limits.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sfa_dist.data.decode_limits import check_frame_count, check_promise, within
from sfa_dist.errors import RecipeError
from sfa_dist.recipe_blocks import LimitsBlock

NO_OTHER_LIMITS = LimitsBlock()  # the schema's own
FrameNumbers = Sequence[int] | npt.NDArray[np.int64]


class Video(Protocol):
    """One opened video. Frames are numbered from 0 in the order of their time stamps."""

    @property
    def num_frames(self) -> int: ...  # at least 1

    @property
    def fps(self) -> float: ...  # mean frames a second, 0.0 if unknown

    @property
    def height(self) -> int: ...  # upright, in pixels

    @property
    def width(self) -> int: ...

    def frames_at(self, indices: FrameNumbers) -> torch.Tensor:
        """uint8 RGB (len(indices), height, width, 3); any order, repeats allowed. Raises BadSample."""
        ...


class Decoder(NamedTuple):
    """A usable backend. `open(data)` gives a Video or raises BadSample."""

    name: str
    version: str
    open: Callable[[bytes], Video]


class LimitedVideo:
    """A backend's video whose calls take no longer than `limits.seconds`."""

    def __init__(self, video: Video, limits: LimitsBlock) -> None:
        self._video, self._limits = video, limits
        self.num_frames, self.fps = video.num_frames, video.fps
        check_frame_count(self.num_frames, limits)

    @property
    def height(self) -> int:
        """Upright height in pixels."""
        return self._video.height

    @property
    def width(self) -> int:
        """Upright width in pixels."""
        return self._video.width

    def frames_at(self, indices: FrameNumbers) -> torch.Tensor:
        """See `Video.frames_at`."""
        return within(self._limits.seconds, lambda: self._video.frames_at(indices))


def open_limited(backend: Callable[[bytes, LimitsBlock], Video], limits: LimitsBlock, data: bytes) -> Video:
    """A video of a backend, within limits. Raises BadSample."""
    check_promise(data, limits)
    return within(limits.seconds, lambda: LimitedVideo(backend(data, limits), limits))


def choose_decoder(
    wanted: Literal["auto", "torchcodec", "pyav"] = "auto", limits: LimitsBlock = NO_OTHER_LIMITS
) -> Decoder:
    """The decoder asked for; `auto` takes torchcodec where it loads with its FFmpeg libraries, else PyAV.

    Raises RecipeError, saying how to install it, when the one asked for cannot be used.
    """
    if wanted == "pyav":
        return _pyav(limits)
    try:
        return _torchcodec(limits)
    except (ImportError, OSError, RuntimeError) as error:  # it raises RuntimeError where FFmpeg's libraries are absent
        if wanted == "auto":
            return _pyav(limits)
        reason = str(error).strip().split("\n")[0]
        raise RecipeError(
            f"data.decoder: torchcodec cannot be used ({reason}). Install it with `pip install torchcodec` and FFmpeg "
            "with `apt-get install ffmpeg` or `conda install ffmpeg`, or set data.decoder to auto or pyav"
        ) from error


def sound_frames(data: bytes, limits: LimitsBlock = NO_OTHER_LIMITS) -> int:
    """How many frames come before the first damaged one, or all. Decodes everything, strictly, by PyAV: FFmpeg
    otherwise covers up most damage inside a frame, and torchcodec cannot tell it not to."""
    return int(_pyav_module().sound_frames(data, limits))


def _torchcodec(limits: LimitsBlock) -> Decoder:
    module = importlib.import_module("sfa_dist.data.decode_torchcodec")
    return Decoder("torchcodec", module.version(), partial(open_limited, module.TorchcodecVideo, limits))


def _pyav(limits: LimitsBlock) -> Decoder:
    module = _pyav_module()
    return Decoder("pyav", module.version(), partial(open_limited, module.PyAVVideo, limits))


def _pyav_module() -> Any:
    try:
        return importlib.import_module("sfa_dist.data.decode_pyav")
    except ImportError as error:
        raise RecipeError(f"data.decoder: PyAV cannot be used ({error}). Install it with `pip install av`") from error
