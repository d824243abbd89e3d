"""Warm-up, cosine, floor: the rates as numbers."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.training import OptimiserOptions, learning_rate


def rates(total: int, **options: float) -> list[float]:
    return [learning_rate(OptimiserOptions(**options), step, total) for step in range(total)]


def test_the_rate_rises_linearly_to_its_peak_and_falls_along_a_cosine_towards_the_floor() -> None:
    got = rates(10, lr=1.0, warmup=0.4, floor=0.1)
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert got == pytest.approx([0.25, 0.5, 0.75, 1.0, *cosine])


def test_the_first_step_is_never_at_rate_zero() -> None:
    assert rates(1, lr=3.0) == [3.0]
    assert all(rate > 0 for rate in rates(200, lr=1e-3, floor=0.0))


def test_a_floor_of_one_is_a_constant_rate_after_warm_up() -> None:
    assert rates(8, lr=0.5, warmup=0.25, floor=1.0)[2:] == pytest.approx([0.5] * 6)


def test_a_step_beyond_the_plan_stays_at_the_floor() -> None:
    options = OptimiserOptions(lr=2.0, floor=0.05)
    assert learning_rate(options, 500, 100) == pytest.approx(0.1)


@given(st.integers(1, 300), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_the_rate_never_exceeds_its_peak_rises_once_and_then_only_falls(total: int, warmup: float, floor: float) -> None:
    got = rates(total, lr=1.0, warmup=warmup, floor=floor)
    top = got.index(max(got))
    assert 0 < max(got) <= 1.0 + 1e-12
    up, down = got[: top + 1], got[top:]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(up))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(down))
