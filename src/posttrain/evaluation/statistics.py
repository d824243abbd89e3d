"""Intervals: Wilson for shares, t for means, and paired differences for what two candidates did on the same tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

Interval = tuple[float, float]


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a share (Wilson 1927). n = 0 knows nothing: (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    z = _z(confidence)
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of a mean. One value has no spread to judge by: the interval is that value (as a difference it proves nothing,
    see below)."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) == 0:
        return math.nan, math.nan
    mean = float(array.mean())
    if len(array) == 1:
        return mean, mean
    half = float(stats.t.ppf(0.5 + confidence / 2, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return mean - half, mean + half


def is_share(values: Sequence[float]) -> bool:
    """All values are 0 or 1."""
    return all(value in (0.0, 1.0) for value in values)


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Wilson where all values are 0/1, t otherwise."""
    return wilson(float(sum(values)), len(values), confidence) if is_share(values) else mean_interval(values, confidence)


def paired_difference(after: Sequence[float], before: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean difference, low, high) of after - before, value by value.

    0/1 outcomes: Newcombe's (1998) paired score interval, method 10, which stays sensible with few or no discordant pairs.
    Others: Student's t on the differences. Equal differences have no spread to judge by: the exact interval of the share that has their
    sign then, times the difference. A single one proves nothing: the interval is infinite.
    """
    a, b = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    assert a.shape == b.shape and len(a) > 0, "a paired difference needs the same tasks on both sides"
    if not (is_share(a.tolist()) and is_share(b.tolist())):
        return _mean_difference(a - b, confidence)
    n = len(a)
    p_after, p_before = float(a.mean()), float(b.mean())
    low_a, high_a = wilson(float(a.sum()), n, confidence)
    low_b, high_b = wilson(float(b.sum()), n, confidence)
    phi = _correlation(a, b)
    down = (p_after - low_a) ** 2 - 2 * phi * (p_after - low_a) * (high_b - p_before) + (high_b - p_before) ** 2
    up = (high_a - p_after) ** 2 - 2 * phi * (high_a - p_after) * (p_before - low_b) + (p_before - low_b) ** 2
    d = p_after - p_before
    return d, d - math.sqrt(max(0.0, down)), d + math.sqrt(max(0.0, up))


def _mean_difference(differences: np.ndarray, confidence: float) -> tuple[float, float, float]:
    d, n = float(differences.mean()), len(differences)
    if n == 1:
        return d, -math.inf, math.inf
    if not np.allclose(differences, d, rtol=1e-9, atol=1e-12):
        return d, *mean_interval(differences.tolist(), confidence)
    least = 2 * ((1 - confidence) / 2) ** (1 / n) - 1  # Clopper & Pearson's lower end of n of n, as a mean of signs
    return d, min(d, d * least), max(d, d * least)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """phi of the 2x2 table, 0 where a margin is empty; Newcombe's continuity correction for positive association."""
    n = len(a)
    both, only_a, only_b = float((a * b).sum()), float((a * (1 - b)).sum()), float(((1 - a) * b).sum())
    neither = n - both - only_a - only_b
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins <= 0:
        return 0.0
    product = both * neither - only_a * only_b
    corrected = product if product <= 0 else max(0.0, product - n / 2)
    return corrected / math.sqrt(margins)


def unpaired_difference(after: Interval, before: Interval, values: tuple[float, float]) -> tuple[float, float, float]:
    """(difference, low, high) of two independent estimates from their own intervals (square-and-add, Zou & Donner 2008). Two intervals
    without width (equal values on each side) tell nothing of the spread: the result is infinite."""
    (low_a, high_a), (low_b, high_b), (a, b) = after, before, values
    if math.isclose(low_a, high_a) and math.isclose(low_b, high_b):
        return a - b, -math.inf, math.inf
    return a - b, a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b)


def at_confidence(stored: Interval, value: float, n: int, confidence: float) -> Interval:
    """A mean's 95 % interval at another confidence, by the quantiles of Student's t; infinite for a single value."""
    if n < 2:
        return -math.inf, math.inf
    wider = float(stats.t.ppf(0.5 + confidence / 2, n - 1) / stats.t.ppf(0.975, n - 1))
    return value - wider * (value - stored[0]), value + wider * (stored[1] - value)


def _z(confidence: float) -> float:
    return float(stats.norm.ppf(0.5 + confidence / 2))
