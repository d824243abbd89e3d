"""What judges read off an episode: its answer, its calls, the amounts it may use, and weighted steps into a Judgement."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.records import Episode, Task, ToolOutcome
from posttrain.verifying.judgement import Judgement, Step
from posttrain.worlds.finance_ops.answers import Answer, parse
from posttrain.worlds.finance_ops.money import amounts_in
from posttrain.worlds.finance_ops.policies import passages

Weighted = tuple[Step, float]


def answer_of(episode: Episode) -> Answer | None:
    """The final answer, or None when there is none or it is not valid."""
    return parse(episode.answer)


def arguments_of(outcome: ToolOutcome) -> dict[str, Any]:
    try:
        value = json.loads(outcome.call.arguments)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def same(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Equal arguments up to case and surrounding space."""
    return {key: str(value).strip().casefold() for key, value in given.items()} == {
        key: str(value).strip().casefold() for key, value in wanted.items()
    }


def context_of(episode: Episode) -> str:
    """Everything the answer may rest on: system and user turns and tool results."""
    return "\n".join(message.content for message in episode.messages if message.role in ("system", "user", "tool"))


def grounded(answer: Answer, context: str) -> float:
    """Share of the answer's amounts, figures and prose alike, that occur in the context. 1.0 without any amount."""
    used = {amount.lstrip("-") for _, amount in answer.figures} | amounts_in(" ".join((answer.summary, *answer.next_steps)))
    return sum(amount in amounts_in(context) for amount in used) / len(used) if used else 1.0


def sourced(answer: Answer, task: Task, context: str) -> bool:
    """Every source is real: a tool of the task, a policy of the tenant, or an id that occurs in the context."""
    known = {tool.name for tool in task.tools} | {found["id"] for found in passages(task.tenant or "")}
    return all(
        source in known or re.search(rf"(?<![\w-]){re.escape(source)}(?![\w-])", context) is not None for source in answer.sources
    )


def judged(weighted: Sequence[Weighted], **facts: Any) -> Judgement:
    """Score = share of the weights whose step passed; passed = all steps."""
    total = sum(weight for _, weight in weighted)
    score = sum(weight for step, weight in weighted if step.passed) / total
    steps = tuple(step for step, _ in weighted)
    return Judgement(all(step.passed for step in steps), round(score, 6), steps, facts)


def step(name: str, passed: bool, why: str = "") -> Step:
    return Step(name, passed, "" if passed else why)
