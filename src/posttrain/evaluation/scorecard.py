"""A scorecard: metrics with 95 % intervals, by slice, with the paired outcomes a gate needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Metric:
    """A measured value with its 95 % interval. `n` is the number of independent items; `unit` e.g. 'share', 'tokens', 's'."""

    value: float
    low: float
    high: float
    n: int
    unit: str = "share"


@dataclass(frozen=True, slots=True)
class Scorecard:
    """What one candidate scored on one suite.

    `metrics` are over all tasks; `slices["tenant=bank_A"]["tool_success"]` the same by slice. `outcomes["tool_success"]` maps a
    task id to that task's value: two scorecards of the same suite are compared task by task. `samples` keeps a few answers to read.
    """

    suite: str
    split: str
    seed: int
    n: int
    candidate: str
    metrics: Mapping[str, Metric]
    slices: Mapping[str, Mapping[str, Metric]] = field(default_factory=dict)
    outcomes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: tuple[Mapping[str, Any], ...] = ()
