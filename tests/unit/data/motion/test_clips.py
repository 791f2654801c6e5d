"""Generated clips: the same for the same seed and index, and labels that the pixels bear out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfa_dist.data.motion import clips as module
from sfa_dist.data.motion import shapes
from sfa_dist.data.motion.clips import CELLS, MotionLabels, motion_clip, motion_clips
from sfa_dist.data.motion.draws import Draws
from sfa_dist.data.motion.paths import SPEED

SIZE = 32
MANY = range(96)


@pytest.fixture
def white_on_black(monkeypatch: pytest.MonkeyPatch) -> None:
    """One white thing before a black ground, of a shape whose middle is its centre of mass, without noise."""

    def colours(draws: Draws, things: int) -> tuple[Tensor, Tensor]:
        layers = torch.ones(len(MANY), things + 1, 2, 3)
        layers[:, 0] = 0
        return layers, torch.tensor([[1.0, 0.0]]).expand(len(MANY), 2)

    monkeypatch.setattr(module, "draw_colours", colours)
    monkeypatch.setattr(module, "PLAIN", 1.0)
    monkeypatch.setattr(module, "_NOISE", 0.0)
    monkeypatch.setattr(shapes, "KINDS", 3)  # Without strokes.


def mass(clips: Tensor) -> tuple[Tensor, Tensor]:
    """(share of white (B, T), centre of it (B, T, 2) in shares of the side)."""
    white = clips[:, 0].double() / 255
    places = (torch.arange(SIZE).double() + 0.5) / SIZE
    total = white.sum(dim=(2, 3))
    centre = torch.stack([(white * places).sum(dim=(2, 3)), (white * places[:, None]).sum(dim=(2, 3))], dim=-1)
    return total / SIZE**2, centre / total[..., None]


@pytest.mark.usefixtures("white_on_black")
def test_the_labelled_thing_is_where_its_pixels_are() -> None:
    clips, labels = motion_clips(3, MANY, 3, SIZE)
    share, centre = mass(clips)
    white = clips[:, 0] > 0
    border = white[..., (0, -1), :].any(-1).any(-1) | white[..., (0, -1)].any(-1).any(-1)
    whole = ~border  # (B, T): not cut by the border.
    assert whole.float().mean() > 0.3
    torch.testing.assert_close(centre[whole].float(), labels.centres[whole], atol=0.4 / SIZE, rtol=0)
    both = whole[:, 1:] & whole[:, :-1]
    moved = centre[:, 1:] - centre[:, :-1]
    torch.testing.assert_close(moved[both].float(), labels.steps[both], atol=0.5 / SIZE, rtol=0)
    torch.testing.assert_close(labels.cover.mean(dim=(2, 3)), share.float(), atol=0.01, rtol=0)


@pytest.mark.usefixtures("white_on_black")
def test_cover_and_flow_are_where_the_thing_is() -> None:
    clips, labels = motion_clips(4, MANY, 2, SIZE)
    cells = torch.nn.functional.adaptive_avg_pool2d(clips[:, 0].float() / 255, CELLS)
    torch.testing.assert_close(labels.cover, cells, atol=0.02, rtol=0)
    wanted = cells[:, 1:, :, :, None] * labels.steps[:, :, None, None]
    torch.testing.assert_close(labels.flow, wanted, atol=0.01, rtol=0)
    assert not labels.pan.any()


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(1, 5), st.sampled_from([8, 16, 20]))
@settings(max_examples=20, deadline=None)
def test_a_clip_is_a_function_of_seed_and_index(seed: int, index: int, frames: int, size: int) -> None:
    clip, labels = motion_clip(seed, index, frames, size)
    assert (clip.shape, clip.dtype) == ((frames, size, size, 3), np.uint8)
    together, many = motion_clips(seed, [index + 1, index], frames, size)
    assert np.array_equal(together[1].permute(1, 2, 3, 0).numpy(), clip)
    assert not np.array_equal(together[0], together[1])
    for own, among in zip(labels, many, strict=True):
        assert torch.equal(own, among[1])
        assert own.isfinite().all()
    assert ((labels.centres >= 0) & (labels.centres <= 1)).all()
    assert (labels.steps.norm(dim=-1) <= SPEED[1] * 1.3).all()
    assert ((labels.cover >= 0) & (labels.cover <= 1)).all()


def test_clips_are_varied() -> None:
    clips, labels = motion_clips(0, MANY, 2, SIZE)
    assert (clips.float().flatten(1).std(dim=1) > 2).all(), "something can be seen"
    grey = (clips.float().std(dim=1).amax(dim=(1, 2, 3)) < 1).float().mean()
    assert 0.1 < grey < 0.7
    assert 0.2 < (labels.pan != 0).any(dim=-1).float().mean() < 0.6
    assert (labels.steps.norm(dim=-1) > 0.005).float().mean() > 0.95
    assert labels.steps.mean(dim=(0, 1)).abs().max() < 0.03, "all ways alike"


def test_labels_are_a_tuple_of_tensors_by_clip() -> None:
    _, labels = motion_clips(0, range(3), 4, 8)
    shapes_of = {name: tuple(getattr(labels, name).shape) for name in MotionLabels._fields}
    assert shapes_of == {
        "centres": (3, 4, 2),
        "steps": (3, 3, 2),
        "pan": (3, 3, 2),
        "cover": (3, 4, CELLS, CELLS),
        "flow": (3, 3, CELLS, CELLS, 2),
    }
