"""Which stored steps make a clip: with all phases exactly the frames of the live stream, with fewer the ones before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_dist.data.features.feature_grid import StepGrid, step_frames
from sfa_dist.data.sampling.clip_sampling import frame_indices, random_offset
from sfa_dist.data.sampling.randomness import first_random, sample_rng

VIDEOS = st.tuples(st.integers(1, 90), st.integers(1, 8), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1000))


def test_the_first_number_is_that_of_the_generator():
    for sample in range(500):
        for place in ((0, 0, sample, "clip"), (7, 29, 10**9 + sample, "live")):
            assert first_random(*place) == sample_rng(*place).random()


def frames_of_clip(grid: StepGrid, video: int, frames: int, offset: int) -> np.ndarray:
    starts = grid.starts(video)[grid.clip_rows(video, frames, offset)]
    return step_frames(starts, grid.tubelet, grid.stride, video).ravel()


@given(VIDEOS)
@settings(max_examples=300, deadline=None)
def test_all_phases_give_every_crop_exactly(numbers):
    video, steps, tubelet, stride, seed = numbers
    grid, frames = StepGrid(tubelet, stride, tubelet * stride), steps * tubelet
    offset = random_offset(sample_rng(seed, 0, 0, "clip"), video, frames, stride)
    assert (frames_of_clip(grid, video, frames, offset) == frame_indices(video, frames, stride, offset)).all()
    assert grid.starts(video).tolist() == list(range(video))


@given(VIDEOS, st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_fewer_phases_take_the_step_next_before(numbers, phases):
    video, steps, tubelet, stride, seed = numbers
    pitch = tubelet * stride
    grid, frames = StepGrid(tubelet, stride, min(phases, pitch)), steps * tubelet
    starts = grid.starts(video)
    assert len(starts) == grid.num_steps(video)
    assert (np.diff(starts) > 0).all()
    offset = random_offset(sample_rng(seed, 0, 0, "clip"), video, frames, stride)
    live = frame_indices(video, frames, stride, offset)[::tubelet]
    cached = starts[grid.clip_rows(video, frames, offset)]
    assert ((live - cached >= 0) & (live - cached < pitch)).all()
    if grid.phases == pitch:
        assert (live == cached).all()
    if (frames - 1) * stride < video:  # Not looped: the whole crop moves, and its steps keep their distance.
        assert len(set((live - cached).tolist())) == 1


def test_a_video_that_one_clip_covers_needs_one_phase():
    """250 frames of Kinetics, 128 frames at stride 2: 63 steps stored, and a clip is all of them, or all but one."""
    grid = StepGrid(2, 2, 1)
    assert grid.num_steps(250) == 63
    for offset in range(250):
        assert len(set(grid.clip_rows(250, 128, offset).tolist())) >= 62


@pytest.mark.parametrize(("phases", "steps"), [(1, 75), (2, 150), (4, 300)])
def test_what_is_stored_of_ten_seconds(phases, steps):
    assert StepGrid(2, 2, phases).num_steps(300) == steps
