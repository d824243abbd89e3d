"""What a gate says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """The four verdicts of a gate."""

    REAL_GAIN = "real_gain"  # a target improved beyond chance and every guardrail held: may be promoted
    REWARD_HACKING = "reward_hacking"  # what was trained on improved while a guardrail or the audited truth fell
    IDLE_DRIFT = "idle_drift"  # no target improved beyond chance, nothing broke: the model moved for nothing
    REGRESSION = "regression"  # no target improved and a guardrail fell


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison the gate made. `difference` is candidate minus parent (paired where the tasks match), with its interval at
    the policy's confidence. A value that a side lacks is None, and so is a difference to it, and an interval of too few values."""

    metric: str
    role: str  # "target" | "guardrail" | "proxy"
    slice: str
    parent: float | None
    candidate: float | None
    difference: float | None
    low: float | None
    high: float | None
    n: int
    requirement: str
    passed: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's decision with every check that led to it."""

    outcome: Outcome
    checks: tuple[Check, ...]
    reasons: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.outcome is Outcome.REAL_GAIN

    def to_json(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome.value, "checks": [asdict(check) for check in self.checks], "reasons": list(self.reasons),
            "notes": dict(self.notes),
        }  # fmt: skip
