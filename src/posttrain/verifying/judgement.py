"""Episode -> Judgement. A verifier is a plain callable; a judge that cannot judge raises VerifierError (never passes)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain.data.records import Episode, Task


@dataclass(frozen=True, slots=True)
class Step:
    """One checked step of a process verifier: what was checked, whether it held, and why not."""

    name: str
    passed: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Outcome (ORM) and steps (PRM) of one episode. `score` in [0, 1] is the reward; `passed` is the strict outcome."""

    passed: bool
    score: float
    steps: tuple[Step, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # extra measured values, e.g. {"tool_success": 1.0}

    @property
    def failed(self) -> list[str]:
        """The steps that did not hold, each with its reason."""
        return [f"{step.name}: {step.why}" for step in self.steps if not step.passed]


class EnvironmentView(Protocol):
    """What a verifier may see of the world after the episode: read-only rows of its database."""

    def query(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]: ...


class Verifier(Protocol):
    def __call__(self, task: Task, episode: Episode, environment: EnvironmentView | None) -> Judgement: ...
