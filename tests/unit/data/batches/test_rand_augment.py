"""RandAugment on known pixels, and the properties of the official one that are easy to lose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sfa_dist.data.batches.augment import train_transform
from sfa_dist.data.batches.rand_augment import OPERATIONS, rand_augment
from sfa_dist.recipe.blocks import AugmentBlock, RandAugmentBlock

CALM = {"scale_jitter": None, "flip": 0.0, "color": 0.0, "gray": 0.0}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def image(*values: int) -> torch.Tensor:
    """uint8 (3, 1, n), the same in all channels."""
    return torch.tensor(values, dtype=torch.uint8).expand(3, 1, len(values)).clone()


def apply(name: str, pixels: torch.Tensor, magnitude: int = 10) -> torch.Tensor:
    """An operation on one frame, uint8 (3, H, W) -> the same."""
    return OPERATIONS[name](pixels.unsqueeze(1), magnitude, rng())[:, 0]


@pytest.mark.parametrize(
    ("name", "magnitude", "before", "after"),
    [
        ("auto_contrast", 10, (50, 100, 150), (0, 127, 255)),
        ("auto_contrast", 10, (7, 7, 7), (7, 7, 7)),
        ("invert", 10, (0, 100, 255), (255, 155, 0)),
        ("posterize", 10, (0, 31, 255), (0, 16, 240)),  # 4 bits
        ("posterize", 15, (0, 31, 255), (0, 28, 252)),  # 6 bits
        ("posterize", 20, (0, 31, 255), (0, 31, 255)),  # 8 bits: nothing
        ("solarize", 5, (0, 127, 128, 255), (0, 127, 127, 0)),
        # Thresholds from 256 on wrap, by TensorFlow 2.15: 384 is 128; 256 and 512 are 0, which inverts; 307 is 51.
        ("solarize", 10, (0, 127, 128, 255), (255, 128, 127, 0)),
        ("solarize", 12, (0, 50, 51, 255), (0, 50, 204, 0)),
        ("solarize", 15, (0, 127, 128, 255), (0, 127, 127, 0)),
        ("solarize", 20, (0, 127, 128, 255), (255, 128, 127, 0)),
        ("posterize", 2, (0, 127, 128, 255), (0, 0, 128, 128)),  # no bit: a shift by 8 is one by 7
        ("posterize", 23, (0, 127, 128, 255), (0, 0, 128, 128)),  # 9 bits: a shift by -1, which wraps
        ("solarize_add", 10, (0, 127, 128), (110, 237, 128)),
        ("solarize_add", 20, (0, 127, 128), (220, 255, 128)),
        ("brightness", 5, (10, 100, 255), (10, 100, 255)),  # a factor of 1
        ("brightness", 15, (10, 100, 255), (28, 255, 255)),  # 2.8
        ("color", 15, (10, 100, 255), (10, 100, 255)),  # grey has no colour
        ("identity", 15, (1, 2, 3), (1, 2, 3)),
    ],
)
def test_on_known_pixels(name, magnitude, before, after):
    assert apply(name, image(*before), magnitude)[0, 0].tolist() == list(after)


def test_color_moves_away_from_grey():
    red = torch.tensor([200, 50, 50], dtype=torch.uint8).view(3, 1, 1)
    gray = round(0.2989 * 200 + 0.5870 * 50 + 0.1140 * 50)
    expected = [min(255, gray + 2.8 * (200 - gray)), max(0, gray + 2.8 * (50 - gray))]
    assert apply("color", red, 15).flatten().tolist()[:2] == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("magnitude", "expected"), [(15, [[255, 56, 0], [0, 40, 115]]), (3, [[172, 108, 77], [16, 31, 48]])]
)
def test_color_is_tensorflows(magnitude, expected):
    pixels = torch.tensor([[200, 100, 51], [10, 33, 60]], dtype=torch.uint8).T.reshape(3, 1, 2)
    assert apply("color", pixels, magnitude)[:, 0].T.tolist() == expected


def test_smoothing_takes_a_level_off_the_same_flat_areas_as_tensorflows():
    lost = [
        n for n in range(60) if int(apply("sharpness", torch.full((3, 5, 5), n, dtype=torch.uint8), 0)[0, 2, 2]) < n
    ]
    assert lost == [3, 6, 12, 15, 23, 24, 30, 31, 46, 47, 48, 49]


def test_contrast_blends_with_white_as_in_the_official_library():
    pixels = torch.full((3, 256, 256), 200, dtype=torch.uint8)
    assert set(apply("contrast", pixels, 15).flatten().tolist()) == {round(255 + 2.8 * (200 - 255))}


def test_equalize_is_that_of_pil():
    pixels = torch.from_numpy(np.random.default_rng(0).normal(100, 20, (3, 64, 48)).clip(0, 255).astype(np.uint8))
    expected = np.asarray(ImageOps.equalize(Image.fromarray(pixels.permute(1, 2, 0).numpy())))
    assert np.array_equal(apply("equalize", pixels).permute(1, 2, 0).numpy(), expected)
    assert torch.equal(apply("equalize", image(5, 5, 5)), image(5, 5, 5))


def test_sharpness_keeps_the_border_and_flat_areas():
    pixels = torch.full((3, 5, 5), 100, dtype=torch.uint8)
    assert torch.equal(apply("sharpness", pixels, 15), pixels)
    pixels[:, 2, 2] = 113  # its mean with the neighbours is (5 * 113 + 8 * 100) / 13 = 105
    sharp = apply("sharpness", pixels, 10)  # a factor of 1.9
    assert sharp[0, 2, 2] == round(105 + 1.9 * 8)
    assert sharp[0, 0].tolist() == [100] * 5


@pytest.mark.parametrize(("magnitude", "side"), [(10, 80), (15, 120), (20, 160)])
def test_the_hole_of_cutout_is_black_and_in_one_place_of_all_frames(magnitude, side):
    """scenic's own cutout of videos: 2 x int(magnitude / 10 x 40) pixels a side, of 0, less what is outside."""
    clip = torch.full((3, 6, 224, 256), 9, dtype=torch.uint8)
    largest = 0
    for seed in range(60):
        out = OPERATIONS["cutout"](clip, magnitude, rng(seed))
        hole = out == 0
        assert torch.equal(hole, hole[:1, :1].expand_as(hole))
        assert (out[~hole] == 9).all()
        rows, columns = hole[0, 0].any(dim=1).sum(), hole[0, 0].any(dim=0).sum()
        assert hole[0, 0].sum() == rows * columns > 0
        largest = max(largest, int(rows), int(columns))
    assert largest == side


def test_all_frames_have_the_same_operations_and_statistics():
    """A clip of equal frames stays one, but for the seams; a darker frame is not stretched by itself."""
    frames = torch.from_numpy(np.random.default_rng(0).integers(20, 200, (1, 3, 16, 16), dtype=np.uint8)).repeat(
        4, 1, 1, 1
    )
    for name, operation in OPERATIONS.items():
        out = operation(frames.transpose(0, 1), 15, rng())[:, :, 1:-1]
        assert torch.equal(out, out[:, :1].expand_as(out)), name
    frames[0] //= 2
    stretched = OPERATIONS["auto_contrast"](frames.transpose(0, 1), 15, rng())
    assert stretched[:, 0].max() < 200


def test_each_operation_is_drawn():
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8))
    results = {rand_augment(frames, 1, 9, rng(seed)).numpy().tobytes() for seed in range(200)}
    assert len(results) > len(OPERATIONS)  # cutout alone has many


def test_it_takes_the_place_of_colour():
    clip = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))
    plain = train_transform(clip, 32, 32, AugmentBlock(**CALM), rng())
    augment = AugmentBlock(**CALM, rand_augment=RandAugmentBlock(layers=2, magnitude=9))
    views = [train_transform(clip, 32, 32, augment, rng(seed)) for seed in range(8)]
    assert any(not torch.equal(view, plain) for view in views)
    assert all(view.shape == plain.shape and view.dtype == torch.uint8 and view.is_contiguous() for view in views)
    with pytest.raises(ValueError, match="replaces color and gray"):
        AugmentBlock(rand_augment=RandAugmentBlock())
