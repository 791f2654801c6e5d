"""Resizing against what TensorFlow 2.15's tf.image.resize gives, which the official code uses, and torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfa_dist.data.batches import resizing
from sfa_dist.data.batches.resizing import PixelWindow, antialiased_in_float, official, resized

NUMBERS = np.arange(48)
SMALL = (
    torch.from_numpy(((NUMBERS * 37 + 11 * (NUMBERS % 5)) % 256).astype(np.uint8)).view(1, 6, 8, 1).repeat(2, 1, 1, 3)
)
BY_TENSORFLOW = [
    [[32, 97, 172, 144, 76], [100, 165, 220, 20, 87], [170, 160, 121, 98, 137], [209, 56, 93, 129, 206]],
    [
        [14, 91, 168, 189, 87],
        [87, 114, 186, 6, 45],
        [105, 182, 231, 24, 101],
        [161, 200, 149, 92, 119],
        [196, 42, 39, 115, 192],
        [214, 60, 112, 133, 210],
    ],
    [
        [0, 28, 63, 98, 133, 168, 190, 185, 217, 147, 25],
        [36, 64, 91, 107, 142, 177, 176, 98, 126, 97, 34],
        [76, 104, 124, 128, 163, 193, 165, 14, 37, 53, 55],
        [88, 116, 148, 177, 211, 223, 177, 26, 49, 80, 103],
        [127, 139, 163, 198, 233, 190, 118, 60, 70, 96, 125],
        [167, 168, 170, 176, 204, 130, 58, 93, 97, 117, 146],
        [179, 201, 165, 52, 54, 57, 70, 105, 134, 166, 194],
        [191, 219, 172, 31, 46, 75, 104, 119, 152, 187, 216],
        [200, 228, 181, 42, 77, 112, 134, 129, 161, 196, 225],
    ],
]


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("expected", BY_TENSORFLOW, ids=["smaller", "one side", "larger"])
def test_official_is_tensorflows(expected):
    out = resized(SMALL, len(expected), len(expected[0]), "official")
    assert out.shape == (2, len(expected), len(expected[0]), 3)
    assert all(out[frame, :, :, channel].tolist() == expected for frame in range(2) for channel in range(3))


def test_official_keeps_flat_frames():
    """A sum of weighted pixels may come out a hair too small, and be cut to the level below."""
    flat = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 12, 13, 3)
    for size in ((7, 9), (17, 19), (12, 30)):
        assert torch.equal(resized(flat, *size, "official"), flat[:, :1, :1].expand(256, *size, 3))


def plainly(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The official resize of whole frames in a few lines, without a cache."""
    pixels = frames.float()
    for axis, new in ((2, width), (1, height)):
        old = frames.shape[axis]
        centres = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * np.float32(old / new) - np.float32(0.5)
        lower = np.floor(centres)
        shape = [-1 if each == axis else 1 for each in range(4)]
        share = torch.from_numpy(centres - lower).view(shape)
        first = pixels.index_select(axis, torch.from_numpy(lower.clip(0).astype(np.int64)))
        second = pixels.index_select(axis, torch.from_numpy(np.ceil(centres).clip(max=old - 1).astype(np.int64)))
        pixels = first + (second - first) * share
    return pixels.to(torch.uint8)


@pytest.mark.parametrize("values", [1, 9000, 1 << 40])
def test_official_in_turn_has_the_bits_of_whole_resizes(values, monkeypatch):
    """Whatever part is computed, however many frames at a time, and wherever the pixels lie in memory."""
    monkeypatch.setattr(resizing, "VALUES_AT_ONCE", values)
    rng = np.random.default_rng(0)
    for number in range(40):
        count, *sides = rng.integers(1, 48, 7).tolist()
        frames = noise(count % 6 + 1, sides[0], sides[1], 3)
        stored = frames.transpose(1, 2).contiguous().transpose(1, 2) if number % 2 else frames
        first = (sides[0], sides[1]) if number % 5 == 0 else (sides[2], sides[3])
        second = first if number % 7 == 0 else (sides[4], sides[5])
        top, left = int(rng.integers(second[0])), int(rng.integers(second[1]))
        height, width = int(rng.integers(1, second[0] - top + 1)), int(rng.integers(1, second[1] - left + 1))
        window = PixelWindow(top, left, height, width)
        expected = plainly(plainly(frames, *first), *second)
        for _ in range(2):  # The second time by the cache.
            assert torch.equal(official(stored, (first, second), window), window.of(expected))
        assert torch.equal(resized(stored, *second, "official"), plainly(frames, *second))


@pytest.mark.parametrize("how", ["official", "antialias"])
@pytest.mark.parametrize("size", [(24, 31), (40, 60), (17, 90), (80, 120)])
def test_a_window_is_a_part_of_the_whole(size, how):
    frames, window = noise(3, 40, 60, 3), PixelWindow(3, 5, 11, 20)
    assert torch.equal(resized(frames, *size, how, window), window.of(resized(frames, *size, how)))


def test_antialias_is_torchs():
    frames = noise(3, 40, 60, 3)
    expected = F.interpolate(frames.permute(0, 3, 1, 2), (24, 31), mode="bilinear", antialias=True)
    assert torch.equal(resized(frames, 24, 31, "antialias"), expected.permute(0, 2, 3, 1))
    in_float = antialiased_in_float(frames.permute(0, 3, 1, 2), 24, 31)
    assert int((in_float.int() - expected.int()).abs().max()) <= 1


def test_the_cut_takes_half_a_level():
    frames = noise(4, 60, 80, 3)
    gap = resized(frames, 63, 84, "antialias").double() - resized(frames, 63, 84, "official").double()
    assert float(gap.mean()) == pytest.approx(0.5, abs=0.05)
