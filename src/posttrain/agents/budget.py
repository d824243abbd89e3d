"""What an episode may spend, and what it has spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from posttrain.data.records import StopReason


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of one episode. None: no limit of that kind. `max_tokens` counts what the model wrote, not what it read."""

    max_calls: int | None = 8
    max_tokens: int | None = None
    max_seconds: float | None = None


@dataclass(slots=True)
class Spent:
    """The running account of one episode against its budget."""

    budget: Budget
    clock: Callable[[], float] = time.monotonic
    calls: int = 0
    tokens: int = 0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def seconds(self) -> float:
        return self.clock() - self.started

    def tokens_left(self, wanted: int) -> int:
        """How many of the wanted tokens may still be written."""
        return wanted if self.budget.max_tokens is None else min(wanted, self.budget.max_tokens - self.tokens)

    def take_call(self) -> bool:
        """Count one call; False when none is left."""
        if self.budget.max_calls is not None and self.calls >= self.budget.max_calls:
            return False
        self.calls += 1
        return True

    def exhausted(self) -> StopReason | None:
        """Why no further turn may be started: LENGTH for tokens, MAX_TURNS for time."""
        if self.tokens_left(1) < 1:
            return StopReason.LENGTH
        if self.budget.max_seconds is not None and self.seconds >= self.budget.max_seconds:
            return StopReason.MAX_TURNS
        return None
