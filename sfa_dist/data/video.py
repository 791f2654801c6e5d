"""What an opened video offers, whichever library decodes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

FrameNumbers = Sequence[int] | npt.NDArray[np.int64]
FrameTimes = npt.NDArray[np.float64]


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


class StoredVideo(Video, Protocol):
    """A video as it is stored, by a backend."""

    def times(self) -> FrameTimes:
        """When each of its frames is shown, rising, in seconds from the first. Raises BadSample."""
        ...
