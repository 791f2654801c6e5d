"""Batches of generated clips without an end."""

from __future__ import annotations

from itertools import islice

import torch

from sfa_dist.data.motion.clips import motion_clips
from sfa_dist.data.motion.stream import MotionStream, made_clips

SMALL = {"batch": 6, "frames": 2, "size": 8, "block": 8, "blocks": 2, "renewed_after": 2}


def test_the_same_batches_each_time_and_others_for_another_seed() -> None:
    stream = MotionStream(seed=1, **SMALL)
    first, again = (list(islice(stream, 5)) for _ in range(2))
    for (clips, labels), (others, other_labels) in zip(first, again, strict=True):
        assert clips.shape == (6, 3, 2, 8, 8)
        assert torch.equal(clips, others)
        assert all(torch.equal(*pair) for pair in zip(labels, other_labels, strict=True))
    other, _ = next(iter(MotionStream(seed=2, **SMALL)))
    assert not torch.equal(first[0][0], other)


def test_a_batch_is_drawn_from_the_latest_blocks() -> None:
    known, centres = made_clips(1, range(32), 2, 8)
    numbers = []
    for clips, labels in islice(MotionStream(seed=1, **SMALL), 8):
        found = [int((known == clip).flatten(1).all(dim=1).nonzero()) for clip in clips]
        assert torch.equal(labels.centres, centres.centres[found])
        numbers.append(found)
    for step, found in enumerate(numbers):
        newest = step // 2
        assert {number // 8 for number in found} <= {newest - 1, newest}
    assert any(number >= 24 for number in numbers[6] + numbers[7])


def test_blocks_are_what_single_clips_are() -> None:
    clips, _ = made_clips(5, range(70), 2, 8)
    assert torch.equal(clips[69:], motion_clips(5, [69], 2, 8)[0])
