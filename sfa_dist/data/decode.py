"""Videos from bytes: what a decoded video offers, and which library decodes it.

Both backends give the same frame numbers and the same upright RGB pixels, so a run does not depend on which one a
machine has. Input is bytes only: a playlist that points to other files cannot be followed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sfa_dist.data.bad_sample import BadSample
from sfa_dist.errors import RecipeError

MAX_PIXELS = 4096 * 4096  # of one frame: a small file can claim a frame that fills the memory
MAX_ASPECT = 32  # resizing the short side makes the long one as many times longer
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


def choose_decoder(wanted: Literal["auto", "torchcodec", "pyav"] = "auto") -> Decoder:
    """The decoder asked for; `auto` takes torchcodec where it loads with its FFmpeg libraries, else PyAV.

    Raises RecipeError, saying how to install it, when the one asked for cannot be used.
    """
    if wanted == "pyav":
        return _pyav()
    try:
        return _torchcodec()
    except (ImportError, OSError, RuntimeError) as error:  # it raises RuntimeError where FFmpeg's libraries are absent
        if wanted == "auto":
            return _pyav()
        reason = str(error).strip().split("\n")[0]
        raise RecipeError(
            f"data.decoder: torchcodec cannot be used ({reason}). Install it with `pip install torchcodec` and FFmpeg "
            "with `apt-get install ffmpeg` or `conda install ffmpeg`, or set data.decoder to auto or pyav"
        ) from error


def check_frame_size(height: int, width: int) -> None:
    """Raises BadSample for frames that are empty, have more than MAX_PIXELS pixels or an absurd shape."""
    if not 0 < height * width <= MAX_PIXELS:
        raise BadSample(f"frames of {width}x{height} pixels (the limit is {MAX_PIXELS} pixels)")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise BadSample(f"frames of {width}x{height} pixels (the limit is an aspect of {MAX_ASPECT} to 1)")


def _torchcodec() -> Decoder:
    module = importlib.import_module("sfa_dist.data.decode_torchcodec")
    return Decoder("torchcodec", module.version(), module.TorchcodecVideo)


def _pyav() -> Decoder:
    try:
        module = importlib.import_module("sfa_dist.data.decode_pyav")
    except ImportError as error:
        raise RecipeError(f"data.decoder: PyAV cannot be used ({error}). Install it with `pip install av`") from error
    return Decoder("pyav", module.version(), module.PyAVVideo)
