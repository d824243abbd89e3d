"""Intervals against published values and properties that must hold for any data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.evaluation.statistics import at_confidence, interval, mean_interval, paired_difference, unpaired_difference, wilson

BITS = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60)


def test_wilson_equals_the_textbook_value_for_eight_of_ten() -> None:
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)


def test_wilson_of_nothing_knows_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@given(BITS)
def test_wilson_holds_its_share_and_stays_between_zero_and_one(values: list[float]) -> None:
    low, high = wilson(sum(values), len(values))
    assert 0 <= low <= sum(values) / len(values) + 1e-12
    assert sum(values) / len(values) - 1e-12 <= high <= 1


def test_a_mean_interval_equals_students_t_by_hand() -> None:
    # mean 2, s = 1, n = 3, t(0.975, 2) = 4.302653
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-5)


def test_one_value_is_its_own_interval() -> None:
    assert mean_interval([0.3]) == (0.3, 0.3)


def test_the_paired_interval_equals_newcombes_method_ten_worked_by_hand() -> None:
    # both 36, only after 12, only before 2, neither 0: p = 0.96 and 0.76, phi = (36*0 - 12*2) / sqrt(48*2*38*12)
    after, before = [1.0] * 36 + [1.0] * 12 + [0.0] * 2, [1.0] * 36 + [0.0] * 12 + [1.0] * 2
    phi = -24 / math.sqrt(48 * 2 * 38 * 12)
    (l1, u1), (l2, u2) = wilson(48, 50), wilson(38, 50)
    down = math.sqrt((0.96 - l1) ** 2 - 2 * phi * (0.96 - l1) * (u2 - 0.76) + (u2 - 0.76) ** 2)
    up = math.sqrt((u1 - 0.96) ** 2 - 2 * phi * (u1 - 0.96) * (0.76 - l2) + (0.76 - l2) ** 2)
    assert paired_difference(after, before) == pytest.approx((0.2, 0.2 - down, 0.2 + up))


def test_pairing_narrows_the_interval_where_outcomes_agree() -> None:
    after, before = [1.0] * 30 + [0.0] * 10, [1.0] * 24 + [0.0] * 16
    _, low, high = paired_difference(after, before)
    d, loose_low, loose_high = unpaired_difference(wilson(30, 40), wilson(24, 40), (0.75, 0.6))
    assert d == pytest.approx(0.15)
    assert high - low < loose_high - loose_low


@given(BITS)
def test_the_same_outcomes_differ_by_zero_within_their_interval(values: list[float]) -> None:
    d, low, high = paired_difference(values, values)
    assert d == 0
    assert low <= 0 <= high


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=50))
def test_swapping_the_sides_mirrors_the_interval(pairs: list[tuple[float, float]]) -> None:
    after, before = [a for a, _ in pairs], [b for _, b in pairs]
    d, low, high = paired_difference(after, before)
    assert paired_difference(before, after) == pytest.approx((-d, -high, -low), abs=1e-12)


def test_real_values_use_the_t_interval_of_the_differences() -> None:
    after, before = [0.5, 0.7, 0.9], [0.4, 0.5, 0.9]
    low, high = mean_interval(list(np.subtract(after, before)))
    assert paired_difference(after, before) == pytest.approx((0.1, low, high))


def test_a_single_real_difference_proves_nothing() -> None:
    assert paired_difference([0.6], [0.5]) == (pytest.approx(0.1), -math.inf, math.inf)


@pytest.mark.parametrize(("n", "beyond_chance"), [(2, False), (5, False), (6, True), (30, True)])
def test_equal_differences_are_beyond_chance_where_their_signs_are(n: int, beyond_chance: bool) -> None:
    before = [0.1 * (i % 5) for i in range(n)]
    after = [value + 0.1 for value in before]  # equal up to rounding
    d, low, high = paired_difference(after, before)
    assert (low > 0) is beyond_chance
    assert low < d <= high
    assert paired_difference(before, after) == pytest.approx((-d, -high, -low))


def test_values_without_any_spread_on_either_side_prove_nothing_unpaired() -> None:
    assert unpaired_difference((0.6, 0.6), (0.5, 0.5), (0.6, 0.5)) == (pytest.approx(0.1), -math.inf, math.inf)
    assert unpaired_difference((0.6, 0.6), (0.4, 0.5), (0.6, 0.45))[1] > 0


def test_a_stored_interval_of_a_mean_is_exact_at_another_confidence() -> None:
    values = [1.0, 2.0, 4.0, 4.5]
    assert at_confidence(interval(values), 2.875, 4, 0.8) == pytest.approx(interval(values, 0.8))
    assert at_confidence((1.0, 1.0), 1.0, 1, 0.8) == (-math.inf, math.inf)


def test_ninety_five_percent_intervals_cover_about_ninety_five_percent() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        shared = rng.random(60) < 0.5
        before = np.where(rng.random(60) < 0.3, rng.random(60) < 0.5, shared).astype(float)
        after = np.where(rng.random(60) < 0.3, rng.random(60) < 0.8, shared).astype(float)
        _, low, high = paired_difference(after.tolist(), before.tolist())
        hits += low <= 0.3 * 0.3 <= high
    assert 0.91 <= hits / 400 <= 0.99
