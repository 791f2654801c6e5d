"""The learning rate is a function of the step alone, the official one."""

from __future__ import annotations

import math

import pytest

from sfa_dist.training.schedule import learning_rate

CURVE = {"base": 0.4, "total_steps": 100, "warmup_steps": 10}


def test_it_warms_up_linearly_from_zero() -> None:
    assert [learning_rate(step, **CURVE) for step in (0, 1, 5, 10)] == pytest.approx([0.0, 0.04, 0.2, 0.4])


def test_it_falls_as_half_a_cosine_to_zero() -> None:
    assert learning_rate(55, **CURVE) == pytest.approx(0.2)
    assert learning_rate(10 + 30, **CURVE) == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert learning_rate(100, **CURVE) == pytest.approx(0.0, abs=1e-12)
    rates = [learning_rate(step, **CURVE) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_it_is_the_product_that_the_official_code_computes() -> None:
    """scenic, lr_schedules.py: constant * linear_warmup * cosine_decay, the cosine counted from the warm-up's end."""
    for step in range(100):
        warmup = min(1.0, step / 10)
        cosine = 0.5 * (1 + math.cos(math.pi * (max(0.0, step - 10) / 90 % 1.0)))
        assert learning_rate(step, **CURVE) == pytest.approx(0.4 * warmup * cosine)


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(0, base=0.4, total_steps=10, warmup_steps=0) == 0.4


@pytest.mark.parametrize("warmup", [10, 11, 1000])
def test_a_warmup_longer_than_the_run_only_rises(warmup: int) -> None:
    rates = [learning_rate(step, base=1.0, total_steps=10, warmup_steps=warmup) for step in range(10)]
    assert rates == pytest.approx([step / warmup for step in range(10)])


def test_steps_beyond_the_end_stay_at_zero() -> None:
    assert learning_rate(500, **CURVE) == pytest.approx(0.0, abs=1e-12)
