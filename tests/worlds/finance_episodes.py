"""Episodes for the judges of finance_ops: replays of gold, and gold with something changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from posttrain.data.records import Episode, Message, StopReason, Task, ToolCall, ToolOutcome
from posttrain.verifying.judgement import Judgement
from posttrain.worlds.finance_ops import FinanceOps
from posttrain.worlds.finance_ops.answers import Answer, parse

WORLD = FinanceOps()
Solved = tuple[Task, tuple[Message, ...]]


def solved(kind: str, n: int = 12, *, split: str = "test", seed: int = 5) -> list[Solved]:
    return WORLD.solved_tasks(kinds=(kind,), n=n, split=split, seed=seed)


def play(task: Task, turns: Sequence[Message]) -> tuple[Episode, Judgement]:
    """Run the assistant turns on a fresh environment, tools and all, and judge the episode."""
    environment = WORLD.environment(task.environment, tenant=task.tenant)
    messages, outcomes = list(task.messages), []
    for turn in turns:
        if turn.role != "assistant":
            continue
        messages.append(turn)
        for call in turn.tool_calls:
            result = environment.call(call.name, json.loads(call.arguments), tenant=task.tenant)
            outcomes.append(ToolOutcome(call, result.content, result.ok))
            messages.append(Message("tool", result.content, tool_call_id=call.id))
    episode = Episode(task.id, task.tenant, task.kind, tuple(messages), (), tuple(outcomes), StopReason.END_OF_TURN, ())
    judgement = WORLD.verifiers()[task.verifier](task, episode, environment)
    environment.close()
    return episode, judgement


def gold_answer(gold: Sequence[Message]) -> Answer:
    answer = parse(gold[-1].content)
    assert answer is not None
    return answer


def with_answer(gold: Sequence[Message], answer: Answer | str) -> list[Message]:
    return [*gold[:-1], Message("assistant", answer if isinstance(answer, str) else answer.json())]


def call(name: str, index: int = 0, **arguments: Any) -> Message:
    return Message("assistant", "", (ToolCall(f"call_{index}", name, json.dumps(arguments)),))


def first_call(gold: Sequence[Message]) -> tuple[str, dict[str, Any]]:
    found = gold[0].tool_calls[0]
    return found.name, json.loads(found.arguments)


def failed(judgement: Judgement) -> set[str]:
    return {step.name for step in judgement.steps if not step.passed}
