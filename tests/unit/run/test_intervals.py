"""Intervals and the paired test agree with published values."""

from __future__ import annotations

import pytest

from sfa_dist.run.intervals import mcnemar, over_seeds, wilson


@pytest.mark.parametrize(
    ("right", "clips", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_of_newcombe_1998(right: int, clips: int, low: float, high: float) -> None:
    assert wilson(right, clips) == pytest.approx((low, high), abs=5e-5)
    assert wilson(clips - right, clips) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("first", "second", "p"), [(0, 0, 1.0), (0, 5, 0.0625), (2, 10, 0.0385742), (5, 5, 1.0)])
def test_mcnemar_is_the_two_sided_sign_test(first: int, second: int, p: float) -> None:
    assert mcnemar(first, second) == pytest.approx(p, rel=1e-5)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_an_interval_over_seeds_is_students() -> None:
    mean, deviation, half = over_seeds([0.5, 0.6, 0.7])
    assert (mean, deviation) == (pytest.approx(0.6), pytest.approx(0.1))
    assert half == pytest.approx(4.3027 * 0.1 / 3**0.5)
    assert over_seeds([0.0, 1.0] * 20)[2] == pytest.approx(1.96 * over_seeds([0.0, 1.0] * 20)[1] / 40**0.5, rel=1e-4)
