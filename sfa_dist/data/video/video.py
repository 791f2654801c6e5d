"""What an opened video offers, whichever library decodes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

FrameNumbers = Sequence[int] | npt.NDArray[np.int64]
FrameTimes = npt.NDArray[np.float64]
# Shrinks a few frames of one video, uint8 (n, H, W, 3), to what is kept of them, uint8 (n, h, w, 3).
Shrink = Callable[[torch.Tensor], torch.Tensor]


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

    def frames_at(self, indices: FrameNumbers, shrink: Shrink | None = None) -> torch.Tensor:
        """Frames, uint8 RGB (len(indices), height, width, 3), in any order and with repeats. Raises BadSample.

        With `shrink`, its output, (len(indices), h, w, 3): it receives each frame once, a few at a time, in any order.
        """
        ...


class StoredVideo(Video, Protocol):
    """A video as it is stored, by a backend."""

    def times(self) -> FrameTimes:
        """When each of its frames is shown, rising, in seconds from the first. Raises BadSample."""
        ...


class Derived:
    """A video derived from another one, with the same frames and frame size."""

    def __init__(self, video: Video, num_frames: int, fps: float) -> None:
        self._video, self.num_frames, self.fps = video, num_frames, fps

    @property
    def height(self) -> int:
        """Upright height in pixels."""
        return self._video.height

    @property
    def width(self) -> int:
        """Upright width in pixels."""
        return self._video.width

    def frames_at(self, indices: FrameNumbers, shrink: Shrink | None = None) -> torch.Tensor:
        """See `Video.frames_at`."""
        return self._video.frames_at(indices, shrink)
