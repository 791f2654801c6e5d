"""Augmentation: shapes, known pixels, and randomness that belongs to the sample."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from data_samples import eval_transform

from sfa_dist.data.batches import resizing
from sfa_dist.data.batches.augment import Color, SpatialViews, TrainView, adjust_color, train_transform
from sfa_dist.data.batches.resizing import resized
from sfa_dist.data.sampling.randomness import below, permutation, sample_rng
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.recipe.blocks import AugmentBlock

NOTHING = AugmentBlock(scale_jitter=None, flip=0.0, color=0.0, gray=0.0)
EVERYTHING = AugmentBlock(flip=0.5, color=1.0, gray=0.5)


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(4, 40, 60), (4, 60, 40), (1, 24, 24), (2, 7, 9), (2, 32, 33)])
@pytest.mark.parametrize(("resize", "crop"), [(32, 24), (24, 24), (16, 24)])
def test_shapes(shape, resize, crop):
    clip = noise(*shape, 3)
    for number in range(5):
        out = train_transform(clip, resize, crop, EVERYTHING, sample_rng(0, 0, number, "augment"))
        assert (out.shape, out.dtype, out.is_contiguous()) == ((3, shape[0], crop, crop), torch.uint8, True)
    for views in (1, 3):
        for view in range(views):
            out = eval_transform(clip, resize, crop, view, views)
            assert (out.shape, out.dtype, out.is_contiguous()) == ((3, shape[0], crop, crop), torch.uint8, True)


def test_nothing_to_do_changes_no_pixel():
    clip = noise(3, 24, 24, 3)
    expected = clip.permute(3, 0, 1, 2)
    assert torch.equal(train_transform(clip, 24, 24, NOTHING, sample_rng(0, 0, 0, "augment")), expected)
    assert torch.equal(eval_transform(clip, 24, 24), expected)
    assert resized(clip, 24, 24, "official").data_ptr() == clip.data_ptr()


def test_views_are_left_centre_right_or_top_centre_bottom():
    wide = torch.arange(40, dtype=torch.uint8).view(1, 1, 40, 1).expand(1, 20, 40, 3)
    assert [int(eval_transform(wide, 20, 20, view, 3)[0, 0, 0, 0]) for view in range(3)] == [0, 10, 20]
    assert int(eval_transform(wide, 20, 20)[0, 0, 0, 0]) == 10
    tall = wide.transpose(1, 2)
    assert [int(eval_transform(tall, 20, 20, view, 3)[0, 0, 0, 0]) for view in range(3)] == [0, 10, 20]


def test_crops_are_where_the_official_code_has_them():
    """16:9 at 256 is 455 wide, rounded down; the middle one of three crops is at the half rounded up (scenic's
    `deterministic_crop`), a single one at the half rounded down (tf.image.resize_with_crop_or_pad)."""
    assert SpatialViews(256, 224).shrink(noise(1, 288, 512, 3)).shape == (1, 256, 455, 3)
    assert SpatialViews(100, 64).shrink(noise(1, 299, 200, 3)).shape == (1, 149, 100, 3)
    places = torch.arange(455).view(1, 1, 455, 1) % 256
    wide = places.to(torch.uint8).expand(1, 256, 455, 3)
    tall = wide.transpose(1, 2)
    for clip in (wide, tall):
        assert int(eval_transform(clip, 256, 224)[0, 0, 0, 0]) == 115
        assert [int(eval_transform(clip, 256, 224, view, 3)[0, 0, 0, 0]) for view in range(3)] == [0, 116, 231]
    uneven = torch.arange(257, dtype=torch.int64).view(1, 257, 1, 1).expand(1, 257, 257, 3).to(torch.uint8)
    assert [int(eval_transform(uneven, 257, 224, view, 3)[0, 0, 0, 0]) for view in range(3)] == [17, 17, 17]


@pytest.mark.parametrize("how", ["official", "antialias"])
def test_frames_may_come_a_few_at_a_time(how):
    clip, augment = noise(9, 30, 40, 3), EVERYTHING.model_copy(update={"resize": how})
    whole = train_transform(clip, 24, 20, augment, sample_rng(0, 0, 3, "augment"))
    view = TrainView(24, 20, augment, sample_rng(0, 0, 3, "augment"))
    parts = [view.shrink(clip[start : start + 2]) for start in range(0, 9, 2)]
    assert torch.equal(view.finish(torch.cat(parts)), whole)
    with pytest.raises(BadSample, match="the size of the frames changes inside the video"):
        view.shrink(noise(1, 31, 40, 3))


def test_the_official_resizes_are_two():
    clip, augment = noise(2, 60, 80, 3), NOTHING.model_copy(update={"scale_jitter": [1.1, 1.1]})
    expected = resized(resized(clip, 40, 53, "official"), 44, 58, "official")
    out = train_transform(clip, 40, 40, augment, sample_rng(0, 0, 0, "augment")).permute(1, 2, 3, 0)
    places = [(top, left) for top in range(5) for left in range(19)]
    assert any(torch.equal(expected[:, top : top + 40, left : left + 40], out) for top, left in places)


def ramps(size: int, slope: int) -> torch.Tensor:
    """A clip of one frame, (1, size, size, 3): red grows by `slope` a column, green by `slope` a row."""
    steps = torch.arange(size, dtype=torch.uint8) * slope
    clip = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    clip[0, :, :, 0], clip[0, :, :, 1] = steps, steps[:, None]
    return clip


def test_scale_jitter_draws_height_and_width_apart():
    """The slopes of two ramps tell the factors: each in its range, and one says nothing about the other."""
    augment, factors = NOTHING.model_copy(update={"scale_jitter": [0.9, 1.33]}), []
    for number in range(300):
        out = train_transform(ramps(60, 4), 60, 40, augment, sample_rng(0, 0, number, "augment")).double()
        wide = (out[0, 0, 20, -6] - out[0, 0, 20, 5]) / (29 * 4)
        tall = (out[1, 0, -6, 20] - out[1, 0, 5, 20]) / (29 * 4)
        factors.append((float(1 / tall), float(1 / wide)))
    tall, wide = np.array(factors).T
    for factor in (tall, wide):
        assert 0.88 < factor.min() < 0.93
        assert 1.29 < factor.max() < 1.36
        assert factor.mean() == pytest.approx((0.9 + 1.33) / 2, abs=0.03)
    assert abs(np.corrcoef(tall, wide)[0, 1]) < 0.15


def test_the_crop_is_anywhere_and_inside():
    """Without scaling a crop is a cut: its first pixel tells where, and every place is taken."""
    clip, places = ramps(28, 9), set()
    for number in range(400):
        out = train_transform(clip, 28, 24, NOTHING, sample_rng(0, 0, number, "augment"))
        left, top = int(out[0, 0, 0, 0]) // 9, int(out[1, 0, 0, 0]) // 9
        assert torch.equal(out, clip[:, top : top + 24, left : left + 24].permute(3, 0, 1, 2))
        places.add((top, left))
    assert places == {(top, left) for top in range(5) for left in range(5)}


def test_flip_colour_and_grey_come_as_often_as_the_recipe_says():
    """Official: flip 0.5, colour 0.8, grey 0.1, three coins of their own."""
    clip = torch.tensor([[200, 90, 40], [30, 120, 220]], dtype=torch.uint8).view(1, 1, 2, 3).expand(1, 2, 2, 3)
    seen = []
    for number in range(1500):
        rng = sample_rng(0, 0, number, "augment")
        out = train_transform(clip, 2, 2, AugmentBlock(scale_jitter=None), rng)[:, 0, 0].T.tolist()
        gray = all(len(set(pixel)) == 1 for pixel in out)
        same = out in ([[200, 90, 40], [30, 120, 220]], [[30, 120, 220], [200, 90, 40]])
        seen.append((out[0][0] < out[1][0], gray, same))
    flipped, gray, same = np.array(seen).T
    assert gray.mean() == pytest.approx(0.1, abs=0.03)
    assert same[~gray].mean() == pytest.approx(0.2, abs=0.04)
    # Red is the first channel of the left pixel; hue may change which one is the larger, so only of uncoloured clips.
    assert flipped[same].mean() == pytest.approx(0.5, abs=0.1)


def test_flip_mirrors_all_frames():
    clip = noise(3, 24, 24, 3)
    flipped = train_transform(clip, 24, 24, NOTHING.model_copy(update={"flip": 1.0}), sample_rng(0, 0, 0, "augment"))
    assert torch.equal(flipped, clip.permute(3, 0, 1, 2).flip(-1))


def test_gray_is_the_weighted_sum():
    pixel = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    assert adjust_color(pixel, None, True).flatten().tolist() == [round(200 * 0.2989 + 100 * 0.587 + 50 * 0.114)] * 3


def test_each_colour_operation_on_known_pixels():
    pixels = torch.tensor([[200, 100, 40], [40, 100, 200]], dtype=torch.uint8).T.reshape(1, 3, 1, 2)
    same = Color(brightness=0.0, saturation=1.0, contrast=1.0, hue=0.0)
    assert (adjust_color(pixels, same, False).int() - pixels.int()).abs().max() <= 1

    def adjusted(**change: float) -> list[list[int]]:
        return adjust_color(pixels, Color(**{**vars(same), **change}), False)[0, :, 0].T.tolist()

    assert adjusted(brightness=0.1)[0] == [226, 126, 66]  # + 25.5, half rounded up or to even
    # about the mean of each channel of the frame: red and blue 120, green 100
    assert adjusted(contrast=0.5) == [[160, 100, 80], [80, 100, 160]]
    hue, saturation, value = colorsys.rgb_to_hsv(200 / 255, 100 / 255, 40 / 255)
    for change, hsv in (
        ({"saturation": 0.6}, (hue, saturation * 0.6, value)),
        ({"saturation": 1.4}, (hue, min(1, saturation * 1.4), value)),
        ({"hue": 0.15}, ((hue + 0.15) % 1, saturation, value)),
    ):
        expected = [channel * 255 for channel in colorsys.hsv_to_rgb(*hsv)]
        np.testing.assert_allclose(adjusted(**change)[0], expected, atol=0.51)


@pytest.mark.parametrize(
    ("draw", "expected"),  # by TensorFlow 2.15, of brightness, saturation, contrast and hue without a cut in between
    [
        ((0.12, 1.4, 1.4, 0.2), [[121, 253, 0], [0, 255, 44], [0, 0, 27], [201, 153, 202]]),
        ((-0.12, 1.4, 0.6, -0.15), [[150, 10, 71], [180, 10, 10], [48, 9, 17], [107, 68, 76]]),
        ((0.1, 0.6, 1.3, 0.05), [[241, 199, 134], [255, 255, 137], [1, 19, 24], [149, 147, 165]]),
    ],
)
def test_colour_is_cut_at_the_end_alone(draw, expected):
    values = [[200, 100, 40], [250, 240, 10], [5, 30, 9], [128, 128, 128]]
    pixels = torch.tensor(values, dtype=torch.uint8).T.reshape(1, 3, 2, 2)
    assert adjust_color(pixels, Color(*draw), False)[0].flatten(1).T.tolist() == expected


def plainly_adjusted(frames: torch.Tensor, color: Color) -> torch.Tensor:
    """`adjust_color` as formulas for a whole clip, uint8 (T, 3, H, W)."""
    pixels = frames.float().contiguous() / 255 + color.brightness
    value = pixels.amax(dim=1, keepdim=True)
    most = value / (value - pixels.amin(dim=1, keepdim=True)).clamp_min(1e-12)
    pixels = value - (value - pixels) * most.clamp(0, color.saturation)
    mean = pixels.mean(dim=(-2, -1), keepdim=True)
    pixels = (pixels - mean) * color.contrast + mean
    red, green, blue = pixels.unbind(dim=1)
    high, low = pixels.amax(dim=1), pixels.amin(dim=1)
    spread = high - low
    sixths = torch.where(high == green, 2 + (blue - red) / spread, 4 + (red - green) / spread)
    sixths = torch.where(high == red, (green - blue) / spread, sixths)
    sixths = (sixths.nan_to_num(0.0) + 6 * color.hue).remainder(6)
    parts = ((sixths - 3).abs() - 1, 2 - (sixths - 2).abs(), 2 - (sixths - 4).abs())
    turned = torch.stack([part.clamp(0, 1) * spread + low for part in parts], dim=1)
    return (turned.clamp(0, 1) * 255).round().to(torch.uint8)


def corners(*shape: int) -> torch.Tensor:
    """Black, white, greys and saturated colours: channels of 0, 85, 170 and 255."""
    return noise(*shape) // 64 * 85


@pytest.mark.parametrize("values", [1, 9000, 1 << 40])
@pytest.mark.parametrize("make", [noise, corners])
def test_colour_in_place_has_the_bits_of_its_formulas(make, values, monkeypatch):
    """However many frames are changed at a time, and wherever the channels lie in memory."""
    monkeypatch.setattr(resizing, "VALUES_AT_ONCE", values)
    rng = np.random.default_rng(0)
    for size in ((24, 32), (7, 5), (1, 1), (64, 48)):
        frames = make(5, *size, 3).permute(0, 3, 1, 2)
        draws = rng.uniform((-32 / 255, 0.6, 0.6, -0.2), (32 / 255, 1.4, 1.4, 0.2), (8, 4)).tolist()
        for draw in (*draws, [0.0, 1.0, 1.0, 0.0]):
            expected = plainly_adjusted(frames, Color(*draw))
            assert torch.equal(adjust_color(frames, Color(*draw), False), expected)
            assert torch.equal(adjust_color(frames.contiguous(), Color(*draw), False), expected)


@pytest.mark.parametrize("make", [noise, corners])
@pytest.mark.parametrize("hue", [-0.2, -1 / 6, -0.05, 0.0, 0.01, 1 / 6, 0.2])
def test_hue_is_that_of_colorsys(make, hue):
    frames = make(1, 12, 12, 3).permute(0, 3, 1, 2)
    turned = adjust_color(frames, Color(0.0, 1.0, 1.0, hue), False)[0].flatten(1).T.tolist()
    for pixel, out in zip(frames[0].flatten(1).T.tolist(), turned, strict=True):
        own, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in pixel))
        expected = [255 * channel for channel in colorsys.hsv_to_rgb((own + hue) % 1, saturation, value)]
        np.testing.assert_allclose(out, expected, atol=0.501)


def test_parameters_are_the_same_for_all_frames():
    clip = noise(1, 30, 40, 3).expand(20, 30, 40, 3)
    out = train_transform(clip, 24, 20, EVERYTHING, sample_rng(0, 0, 1, "augment"))
    assert (out == out[:, :1]).all()


def test_pixels_depend_on_seed_epoch_sample_and_nothing_else():
    clip = noise(2, 30, 40, 3)

    def view(*key: int) -> bytes:
        return train_transform(clip, 24, 20, EVERYTHING, sample_rng(*key, "augment")).numpy().tobytes()

    np.random.seed(1)
    torch.manual_seed(1)
    first = view(0, 0, 0)
    torch.rand(5)
    assert view(0, 0, 0) == first
    assert len({view(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}) == 4
    assert sample_rng(0, 0, 0, "clip").random() != sample_rng(0, 0, 0, "augment").random()


def test_random_numbers_are_pinned():
    """Another library version must not change the pixels of a run that goes on."""
    rng = sample_rng(0, 1, 2, "augment")
    assert (rng.random(), below(rng, 1000)) == (0.20760552803269872, 526)
    assert sorted(permutation(rng, 9).tolist()) == list(range(9))
