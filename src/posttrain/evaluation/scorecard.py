"""A scorecard: metrics with 95 % intervals, by slice, with the paired outcomes a gate needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from posttrain.errors import DataError

Direction = Literal["up", "down"]

# Metrics and which way is better (None: as a policy says). Of each task, where it applies to the task (evaluation/run.py):
TASK_METRICS: Mapping[str, Direction | None] = {
    "schema_validity_constrained": "up", "schema_validity_free": "up", "task_success": "up", "tool_success": "up",
    "groundedness": "up", "high_risk_refusal": "up", "false_refusal": "down", "verifier_pass": "up", "verifier_score": "up",
    "policy_conformity": "up", "unasked_action": "down", "mean_length": None, "truncated": "down", "unscored": "down", "episode_s": "down",
}  # fmt: skip
# of the whole suite only (pipeline/measure.py):
SUITE_METRICS: Mapping[str, Direction | None] = {"kl_to_parent": "down", "latency_s": "down", "latency_ratio": "down"}
METRICS: Mapping[str, Direction | None] = {**TASK_METRICS, **SUITE_METRICS}
SHARES = frozenset(METRICS) - {"mean_length", "episode_s", *SUITE_METRICS}  # from 0 to 1


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
    task id to that task's value: two scorecards of the same suite are compared task by task. `tasks` maps a task id to its tenant
    and kind. `samples` keeps a few answers to read. `tasks_sha256` is of all that the tasks hold (None: written before it was kept).
    """

    suite: str
    split: str
    seed: int
    n: int
    candidate: str
    metrics: Mapping[str, Metric]
    slices: Mapping[str, Mapping[str, Metric]] = field(default_factory=dict)
    outcomes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    samples: tuple[Mapping[str, Any], ...] = ()
    tasks_sha256: str | None = None

    def metric(self, name: str, slice: str | None = None) -> Metric:
        """The metric, overall or in a slice ('kind=advise'). Raises DataError naming what there is."""
        table = self.metrics if slice is None else self.slices.get(slice)
        if table is None:
            raise DataError(
                "the scorecard has no such slice",
                where=self.candidate,
                value=slice,
                remedy=f"slices: {', '.join(sorted(self.slices))}",
            )
        if name not in table:
            place = "" if slice is None else f" in {slice}"
            raise DataError(
                f"the scorecard has no such metric{place}",
                where=self.candidate,
                value=name,
                remedy=f"metrics: {', '.join(sorted(table))}",
            )
        return table[name]

    def values(self, name: str, slice: str | None = None) -> dict[str, float]:
        """Outcome by task id, restricted to a slice; empty for metrics that are not per task (latency, drift)."""
        outcomes = self.outcomes.get(name, {})
        if slice is None:
            return dict(outcomes)
        key, _, wanted = slice.partition("=")
        return {task: value for task, value in outcomes.items() if self.tasks.get(task, {}).get(key) == wanted}

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("suite", "split", "seed", "n", "candidate")},
            "metrics": _plain(self.metrics),
            "slices": {name: _plain(table) for name, table in self.slices.items()},
            "outcomes": {name: dict(values) for name, values in self.outcomes.items()},
            "tasks": {name: dict(values) for name, values in self.tasks.items()},
            "samples": [dict(sample) for sample in self.samples],
            "tasks_sha256": self.tasks_sha256,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "scorecard") -> Scorecard:
        """Raises DataError when a part is missing or garbled."""
        try:
            return cls(
                value["suite"], value["split"], int(value["seed"]), int(value["n"]), value["candidate"], _metrics(value["metrics"]),
                {name: _metrics(table) for name, table in value["slices"].items()}, value["outcomes"], value.get("tasks", {}),
                tuple(value.get("samples", ())), value.get("tasks_sha256"),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"not a scorecard ({error})", where=where, remedy="write one with `posttrain evaluate ... --json`"
            ) from error


def _plain(table: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: asdict(metric) for name, metric in table.items()}


def _metrics(table: Mapping[str, Any]) -> dict[str, Metric]:
    return {name: Metric(**metric) for name, metric in table.items()}
