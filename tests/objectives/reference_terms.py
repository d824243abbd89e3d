"""Plain-numpy terms of the reference functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.float64]
Made = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]  # inputs, params, expected


def sigma(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, dtype=float)))


def softmax(z: Any) -> Array:
    e = np.exp(np.asarray(z, dtype=float) - np.max(z))
    return e / e.sum()


def kl(p: Any, q: Any) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def slope(loss: Callable[[Array], float], at: Any, step: float = 1e-6) -> Array:
    at = np.array(at, dtype=float)
    out = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        out[place] = (loss(up) - loss(down)) / (2 * step)
    return out


def ragged_mask(rng: Generator, rows: int, width: int) -> tuple[list[int], Array]:
    lengths = [int(rng.integers(0, width + 1)) for _ in range(rows)]
    lengths[0] = width
    return lengths, np.array([[float(t < n) for t in range(width)] for n in lengths])


def numbers(rng: Generator, *shape: int) -> Array:
    return np.round(rng.normal(size=shape), 3)
