"""The classes over time: a window slides over a long video, and each tubelet step goes through the trunk once.

A window is a clip: `frames` frames, `stride` apart. Its tubelet steps start `pitch` = tubelet x stride frames apart, so
windows whose starts differ by whole pitches share steps, and only the temporal encoder runs again for each. Windows
that start `hop` frames apart need the steps at every gcd(hop, pitch)-th frame. `snapped_hop` makes that the pitch
itself (each frame goes through the trunk once) or, for a hop shorter than the pitch, the hop. Memory holds one
window's vectors and one tubelet's frames, and at the start one window's frames, however long the video is.

Shape legend: R tubelet steps, t tubelet, S pixels of a side, F steps of a window, D width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from sfa_dist.data.sampling.clip_sampling import frame_indices
from sfa_dist.errors import RecipeError


@dataclass(frozen=True)
class Windows:
    """Windows of `frames` frames, `stride` apart; one starts every `hop` frames of the video."""

    frames: int
    stride: int
    tubelet: int
    hop: int

    @property
    def pitch(self) -> int:
        """Frames of the video from one tubelet step of a window to the next."""
        return self.tubelet * self.stride

    @property
    def grid(self) -> int:
        """Frames of the video from one computed step to the next."""
        return math.gcd(self.hop, self.pitch)

    @property
    def span(self) -> int:
        """Frames of the video from a window's first frame to its last, both included."""
        return (self.frames - 1) * self.stride + 1

    @property
    def every(self) -> int:
        """n, where a window uses every n-th computed step."""
        return self.pitch // self.grid

    @property
    def reach(self) -> int:
        """Computed steps from a window's first step to its last, both included."""
        return (self.frames // self.tubelet - 1) * self.every + 1


class Scored(NamedTuple):
    """The logits (classes,) of the window that starts at frame `start` of the video."""

    start: int
    logits: Tensor


def snapped_hop(seconds: float, fps: float, tubelet: int, stride: int) -> int:
    """The hop in frames, nearest to `seconds`, at which windows share tubelet steps: whole pitches or a divisor of one.

    Raises RecipeError for stride 0: static clips have no time.
    """
    if stride < 1:
        raise RecipeError("data.stride is 0: a static clip has no timeline")
    pitch = tubelet * stride
    wanted = seconds * fps
    if wanted >= pitch:
        return round(wanted / pitch) * pitch
    return min((hop for hop in range(1, pitch + 1) if pitch % hop == 0), key=lambda hop: (abs(hop - wanted), hop))


def slide(
    frames: Iterable[Tensor],
    windows: Windows,
    steps: Callable[[Tensor], Tensor],
    scores: Callable[[Tensor], Tensor],
    chunk: int,
) -> Iterator[Scored]:
    """Scores all whole windows of a video in order, each as soon as its last frame has arrived.

    `frames` are uint8 (3, S, S). `steps` maps tubelets (R, 3, t, S, S) to vectors (R, D), R at most `chunk`; `scores`
    maps (B, F, D) to logits (B, classes). A video shorter than one window is looped, as a short clip is in training.
    """
    opening = _Opening(frames, windows.span)
    recent: deque[Tensor] = deque(maxlen=windows.reach)
    done, any_window = 0, False
    tubelets = _tubelets(opening, windows)
    while part := list(islice(tubelets, chunk)):
        starts, whole = [], []
        for step in steps(torch.stack(part)):
            recent.append(step)
            done += 1
            start = (done - windows.reach) * windows.grid
            if start >= 0 and start % windows.hop == 0:
                starts.append(start)
                whole.append(torch.stack(list(islice(recent, 0, None, windows.every))))
        if whole:
            any_window = True
            yield from map(Scored, starts, scores(torch.stack(whole)))
    if not any_window and opening.held:
        looped = frame_indices(len(opening.held), windows.frames, windows.stride, 0)
        clip = torch.stack([opening.held[number] for number in looped.tolist()])
        cut = clip.unflatten(0, (-1, windows.tubelet)).transpose(1, 2)
        vectors = torch.cat([steps(few) for few in cut.split(chunk)])
        yield Scored(0, scores(vectors.unsqueeze(0))[0])


class _Opening:
    """Passes frames on, and holds the first ones until there are enough for one window."""

    def __init__(self, frames: Iterable[Tensor], enough: int) -> None:
        self._frames, self._enough = frames, enough
        self.held: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        for passed, frame in enumerate(self._frames, 1):
            if passed < self._enough:
                self.held.append(frame)
            else:
                self.held.clear()
            yield frame


def _tubelets(frames: Iterable[Tensor], windows: Windows) -> Iterator[Tensor]:
    """The tubelet steps (3, t, S, S) that start at every `grid`-th frame."""
    held: deque[Tensor] = deque(maxlen=(windows.tubelet - 1) * windows.stride + 1)
    for number, frame in enumerate(frames):
        held.append(frame)
        start = number + 1 - (held.maxlen or 0)
        if start >= 0 and start % windows.grid == 0:
            yield torch.stack(list(islice(held, 0, None, windows.stride)), dim=1)
