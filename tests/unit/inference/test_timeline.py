"""A timeline is the windows run alone, with each tubelet step computed once, in memory that does not grow."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfa_dist.errors import RecipeError
from sfa_dist.inference.class_scores import ClassScores
from sfa_dist.inference.timeline import Windows, slide, snapped_hop
from sfa_dist.inference.timeline_output import (
    MOST_BINS,
    SHOWN_CLASSES,
    Curve,
    TimelineFile,
    clock,
    draw_timeline,
    shown_classes,
)

SIDE = 2


class Toy:
    """Steps and scores in whole numbers, so that they are exact: a step is all its pixels in order."""

    def __init__(self) -> None:
        self.rows = 0

    def steps(self, rows: Tensor) -> Tensor:
        self.rows += len(rows)
        return rows.flatten(1).double()

    def scores(self, windows: Tensor) -> Tensor:
        return windows.flatten(1)


def video(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (length, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))


def alone(frames: Tensor, windows: Windows, start: int) -> Tensor:
    """The window's clip by itself, cut as a clip is."""
    numbers = (start + windows.stride * torch.arange(windows.frames)) % len(frames)
    tubelets = frames[numbers].unflatten(0, (-1, windows.tubelet)).transpose(1, 2)
    toy = Toy()
    return toy.scores(toy.steps(tubelets).unsqueeze(0))[0]


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize(
    ("frames", "stride", "tubelet", "hop"),
    [(8, 1, 2, 2), (8, 2, 2, 4), (8, 2, 2, 12), (8, 2, 2, 1), (8, 3, 2, 2), (6, 2, 3, 3), (4, 1, 1, 1), (2, 1, 2, 50)],
)
def test_windows_are_those_run_alone(frames, stride, tubelet, hop, chunk):
    """Every whole window, in order, to the last bit; any hop, also one that no option gives."""
    clip, windows, toy = video(70), Windows(frames, stride, tubelet, hop), Toy()
    found = list(slide(iter(clip), windows, toy.steps, toy.scores, chunk))
    assert [scored.start for scored in found] == list(range(0, 70 - windows.span + 1, hop))
    for scored in found:
        assert torch.equal(scored.logits, alone(clip, windows, scored.start))
    assert toy.rows == len(range(0, 70 - (tubelet - 1) * stride, windows.grid))


@pytest.mark.parametrize("hop", [4, 8, 16, 40])
def test_the_trunk_runs_once_whatever_the_overlap(hop):
    toy = Toy()
    list(slide(iter(video(400)), Windows(32, 2, 2, hop), toy.steps, toy.scores, 8))
    assert toy.rows == 100  # 400 frames, each of them once, in steps of 2 x 2


@pytest.mark.parametrize("length", [1, 2, 5, 14])
def test_a_video_shorter_than_a_window_is_looped(length):
    clip, windows, toy = video(length), Windows(8, 2, 2, 4), Toy()
    [only] = slide(iter(clip), windows, toy.steps, toy.scores, 3)
    assert only.start == 0
    assert torch.equal(only.logits, alone(clip, windows, 0))


def test_no_frame_gives_no_window():
    toy = Toy()
    assert list(slide(iter(()), Windows(8, 2, 2, 4), toy.steps, toy.scores, 3)) == []


def test_what_is_held_does_not_grow():
    """Frames that are alive at any time: those of a window until the first one is there, then those of a tubelet and a
    chunk."""
    alive = most = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def frames() -> Iterator[Tensor]:
        nonlocal alive, most
        for number in range(3000):
            frame = torch.full((3, SIDE, SIDE), number % 251)
            weakref.finalize(frame, gone)
            alive += 1
            most = max(most, alive)
            yield frame
            del frame

    toy, windows = Toy(), Windows(16, 2, 2, 4)
    seen = 0
    for scored in slide(frames(), windows, toy.steps, toy.scores, 4):
        seen += 1
        assert alive <= windows.span + 2, scored.start
    assert seen == len(range(0, 3000 - windows.span + 1, 4))
    assert most <= windows.span + 2


@pytest.mark.parametrize(
    ("seconds", "fps", "hop"),
    [(1.0, 25.0, 24), (0.16, 25.0, 4), (0.2, 25.0, 4), (0.08, 25.0, 2), (0.01, 25.0, 1), (1.0, 30000 / 1001, 28)],
)
def test_hops_are_snapped_to_whole_tubelet_steps(seconds, fps, hop):
    """With a pitch of 4 frames: multiples of 4, or 2, or 1."""
    assert snapped_hop(seconds, fps, tubelet=2, stride=2) == hop


def test_static_clips_have_no_timeline():
    with pytest.raises(RecipeError, match=r"data\.stride is 0"):
        snapped_hop(1.0, 25.0, 2, 0)


# ---------------------------------------------------------------------------------------------- what it leaves behind


def test_the_file_is_whole_after_an_error(tmp_path):
    path = tmp_path / "t.json"

    def broken_off() -> None:
        with TimelineFile(path, {"video": "a", "fps": 25.0}) as file:
            file.add({"start": 0.0})
            assert '"start": 0.0' in path.read_text()  # at once, for whoever follows it
            file.add({"start": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert json.loads(path.read_text()) == {"video": "a", "fps": 25.0, "windows": [{"start": 0.0}, {"start": 1.0}]}
    with TimelineFile(path, {"fps": 25.0}):
        pass
    assert json.loads(path.read_text()) == {"fps": 25.0, "windows": []}


@pytest.mark.parametrize("windows", [1, 100, MOST_BINS, MOST_BINS + 1, 5 * MOST_BINS + 7])
def test_a_curve_keeps_the_mean(windows):
    values = torch.rand(windows, 3, generator=torch.Generator().manual_seed(0))
    curve = Curve(3)
    for number, value in enumerate(values):
        curve.add(float(number), value)
    seconds, means = curve.points()
    assert len(seconds) <= MOST_BINS
    assert (seconds.diff() > 0).all()
    width = -(-windows // len(seconds))
    width = 1 << (width - 1).bit_length()
    whole = [part.mean(dim=0) for part in values.split(width)]
    torch.testing.assert_close(means, torch.stack(whole), rtol=1e-5, atol=1e-6)
    assert seconds[0] == pytest.approx((min(width, windows) - 1) / 2)


def test_the_picture_shows_what_is_likeliest_for_longest(tmp_path: Path):
    probabilities = torch.zeros(100, 20)
    probabilities[:60, 7], probabilities[60:90, 3], probabilities[90:, 11] = 0.9, 0.8, 0.6
    probabilities[:, 5] = 0.05
    assert shown_classes(probabilities) == [7, 3, 11, 5]
    assert len(shown_classes(torch.full((4, 20), 0.05))) == SHOWN_CLASSES
    curve = Curve(20)
    for number, value in enumerate(probabilities):
        curve.add(number / 2, value)
    draw_timeline(curve, ClassScores({"label": [f"class {n} " * 9 for n in range(20)]}), "a.mp4", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("seconds", "digits", "text"),
    [(7.46, 1, "0:07.5"), (59.96, 1, "1:00.0"), (750.0, 0, "12:30"), (3723.0, 0, "1:02:03"), (0.333, 2, "0:00.33")],
)
def test_times_as_on_a_clock(seconds, digits, text):
    assert clock(seconds, digits) == text
