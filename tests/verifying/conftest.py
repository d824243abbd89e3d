"""Episodes written by hand: what a model said and called, without tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from verifying_helpers import Ledger

from posttrain.data import Episode, Message, StopReason, Task, ToolCall, ToolOutcome

settings.register_profile("posttrain", deadline=None, derandomize=True)
settings.load_profile("posttrain")

Play = Callable[..., Episode]


@pytest.fixture
def play() -> Play:
    """play(call, call, ..., answer="...", failed={0}, denied={1: "rule"}, stop=...)"""

    def make(
        *calls: ToolCall, answer: str = "", failed: Any = (), denied: Any = None, stop: StopReason = StopReason.END_OF_TURN
    ) -> Episode:
        denied = denied or {}
        messages = [Message("user", "please")]
        outcomes = []
        for number, made in enumerate(calls):
            content = f"result {number}"
            messages += [Message("assistant", "", (made,)), Message("tool", content, (), made.id)]
            outcomes.append(ToolOutcome(made, content, number not in failed and number not in denied, denied.get(number)))
        if answer:
            messages.append(Message("assistant", answer))
        return Episode("t1", "bank_A", "task", tuple(messages), (), tuple(outcomes), stop, ())

    return make


@pytest.fixture
def task() -> Callable[..., Task]:
    return lambda **expected: Task("t1", (Message("user", "please"),), arguments=expected)


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger()
    yield made
    made.connection.close()
