"""The verifier `expected`: compares an episode with what the task says should come out of it.

`task.arguments` may hold (at least one of them):
- `calls`: `[{"name", "arguments"}]`, the calls that must have been made and succeeded; `[]` says that none may be made.
  `ordered` (default false): in this order. `extra_calls` (false): others may be made too. `extra_arguments` (false): calls may
  carry optional arguments that are not listed.
- `answer`: an object that the final JSON answer must contain (`matching.contains`).
- `state`: `[{"sql", "rows", "parameters"?, "ordered"?}]`, read-only queries of the world after the episode and their rows
  (order counts unless `ordered` is false).
- `refusal`: true if the request must be refused, false if it must not be.
- `forbidden`: names of tools that must not even be tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.records import Episode, StopReason, Task, ToolOutcome
from posttrain.errors import VerifierError, nearest
from posttrain.verifying.answers import is_refusal, parse_answer
from posttrain.verifying.judgement import EnvironmentView, Judgement, Step
from posttrain.verifying.matching import assign, check_operators, contains, same, same_call

_CHECKS = ("calls", "answer", "state", "refusal", "forbidden")
_FLAGS = ("ordered", "extra_calls", "extra_arguments")
_FORMS = {
    "calls": '[{"name": text, "arguments": object}]',
    "state": '[{"sql": "SELECT ...", "rows": [[value, ...]]}] with `parameters` (a list) and `ordered` (true or false) where needed',
    "forbidden": '["name of a tool"]',
    "answer": '{"field": value}',
    **dict.fromkeys(("refusal", *_FLAGS), "true or false"),
}


def expected(task: Task, episode: Episode, environment: EnvironmentView | None) -> Judgement:
    """Judge by the parts above. passed: every step held and the model ended its turn; score: share of steps that held, 0 when
    the model did not end. Facts: `tool_success` where calls are expected, `answer_valid`, `refused`, `denied_attempts`.

    Raises VerifierError when the task says nothing to compare with, is malformed, or its state cannot be queried.
    """
    wanted = dict(task.arguments)
    check_expected(wanted, task.id)
    denied = [outcome for outcome in episode.outcomes if outcome.denied is not None]
    facts: dict[str, Any] = {
        "answer_valid": float(parse_answer(episode.answer).value is not None),
        "refused": float(is_refusal(episode.answer)),
        "denied_attempts": float(len(denied)),
    }
    steps: list[Step] = []
    if "calls" in wanted:
        found = _calls(wanted, episode.outcomes)
        facts["tool_success"] = float(all(step.passed for step in found))
        steps += found
    if "answer" in wanted:
        steps += _answer(wanted["answer"], episode.answer)
    if "state" in wanted:
        steps += [_state(query, index, environment, task.id) for index, query in enumerate(wanted["state"])]
    if "refusal" in wanted:
        steps += _refusal(bool(wanted["refusal"]), bool(facts["refused"]), denied)
    if "forbidden" in wanted:
        tried = sorted({outcome.call.name for outcome in episode.outcomes} & set(wanted["forbidden"]))
        steps.append(Step("forbidden", not tried, f"tried {', '.join(tried)}" if tried else ""))
    ended = episode.stop is StopReason.END_OF_TURN
    held = sum(step.passed for step in steps)
    steps.insert(0, Step("ended", ended, "" if ended else f"stopped by {episode.stop}"))
    return Judgement(ended and held == len(steps) - 1, held / (len(steps) - 1) if ended else 0.0, tuple(steps), facts)


def allows_refusal(task: Task) -> bool:
    """Whether a refusal is what the task expects, so that it is no false one. Of a task with another verifier that is not known."""
    if task.verifier != "expected":
        return False
    answer = task.arguments.get("answer", {})
    return task.arguments.get("refusal") is True or ("decision" in answer and contains(answer["decision"], "refuse"))


def check_expected(wanted: Mapping[str, Any], where: str) -> None:
    """Raise VerifierError for expectations that are empty or malformed, so that a suite can refuse them before it samples."""
    for key in wanted:
        if key not in _CHECKS + _FLAGS:
            raise _malformed("unknown expectation", where, key, nearest(key, _CHECKS + _FLAGS) or f"use {', '.join(_CHECKS)}")
    if not any(key in wanted for key in _CHECKS):
        raise _malformed("nothing to compare with", where, dict(wanted), f"give one of {', '.join(_CHECKS)}")
    for key, value in wanted.items():
        if not _fits(key, value):
            raise _malformed(f"`{key}` is malformed", where, value, f"write it as {_FORMS[key]}")
    try:
        check_operators(wanted.get("answer"), "answer")
        for index, call in enumerate(wanted.get("calls", ())):
            check_operators(call.get("arguments"), f"calls[{index}].arguments")
        for index, query in enumerate(wanted.get("state", ())):
            check_operators(query["rows"], f"state[{index}].rows")
    except VerifierError as error:
        raise _malformed(f"{error.where}: {error.what}", where, error.value, error.remedy or "") from error


def _calls(wanted: Mapping[str, Any], outcomes: Sequence[ToolOutcome]) -> list[Step]:
    calls = wanted["calls"]
    extra = bool(wanted.get("extra_arguments", False))
    fits = [
        [
            outcome.ok
            and same_call(call["name"], call.get("arguments") or {}, outcome.call.name, outcome.call.arguments, extra=extra)
            for outcome in outcomes
        ]
        for call in calls
    ]
    steps = [
        Step(f"call[{index}] {call['name']}", any(row), "" if any(row) else _why_not(call["name"], outcomes))
        for index, (call, row) in enumerate(zip(calls, fits, strict=True))
    ]
    if all(step.passed for step in steps) and calls:
        arranged = _in_order(fits) if wanted.get("ordered", False) else assign(fits) is not None
        steps.append(Step("calls", arranged, "" if arranged else "not each of its own, or not in this order"))
    if not wanted.get("extra_calls", False):
        surplus = max(0, len(outcomes) - len(calls))
        steps.append(Step("no_extra_calls", surplus == 0, f"{surplus} calls too many" if surplus else ""))
    return steps


def _in_order(fits: Sequence[Sequence[bool]]) -> bool:
    """The earliest partner for each row in turn: if that fails, every other choice does."""
    position = 0
    for row in fits:
        found = next((column for column in range(position, len(row)) if row[column]), None)
        if found is None:
            return False
        position = found + 1
    return True


def _why_not(name: str, outcomes: Sequence[ToolOutcome]) -> str:
    tried = [outcome for outcome in outcomes if outcome.call.name == name]
    if not tried:
        return "not called"
    last = tried[-1]
    if last.denied is not None:
        return f"denied by {last.denied}"
    return f"called with {last.call.arguments[:200]}" if last.ok else "the call failed"


def _answer(wanted: Mapping[str, Any], text: str) -> list[Step]:
    answer = parse_answer(text)
    if answer.value is None:
        return [Step(f"answer.{key}", False, f"the answer is {answer.fault}") for key in wanted] or [
            Step("answer", False, "no JSON")
        ]
    steps = []
    for key, value in wanted.items():
        good = key in answer.value and contains(value, answer.value[key])
        steps.append(Step(f"answer.{key}", good, "" if good else f"found {str(answer.value.get(key))[:200]}"))
    return steps or [Step("answer", True)]


def _state(query: Mapping[str, Any], index: int, environment: EnvironmentView | None, where: str) -> Step:
    if environment is None:
        raise _malformed(
            "the end state cannot be queried: no environment was given", where, None, "keep the environment until judged"
        )
    try:
        rows = [list(row) for row in environment.query(query["sql"], tuple(query.get("parameters", ())))]
    except Exception as error:  # whatever the world's database raises: unscored, not failed
        raise _malformed(f"state[{index}] cannot be queried ({error})", where, query["sql"], "correct the SQL") from error
    wanted = query["rows"]
    if query.get("ordered", True):
        good = same(wanted, rows)
    else:
        good = len(wanted) == len(rows) and assign([[same(want, row) for row in rows] for want in wanted]) is not None
    return Step(f"state[{index}]", good, "" if good else f"found {str(rows)[:200]}")


def _refusal(wanted: bool, refused: bool, denied: Sequence[ToolOutcome]) -> list[Step]:
    why = "" if wanted == refused else ("was not refused" if wanted else "was refused")
    steps = [Step("refusal", wanted == refused, why)]
    if wanted:  # words are not enough: trying what the guard must stop is no refusal
        names = ", ".join(sorted({outcome.call.name for outcome in denied}))
        steps.append(Step("no_denied_attempt", not denied, f"tried {names}" if denied else ""))
    return steps


def _fits(key: str, value: Any) -> bool:
    """Whether an expectation has its form."""
    if key in ("calls", "state", "forbidden"):
        good = {"calls": _is_call, "state": _is_query}.get(key, lambda name: isinstance(name, str))
        return isinstance(value, list) and all(map(good, value))
    return isinstance(value, Mapping if key == "answer" else bool)


def _is_call(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and value.keys() <= {"name", "arguments"}
        and isinstance(value.get("name"), str)
        and isinstance(value.get("arguments"), Mapping | None)
    )


def _is_query(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and value.keys() <= {"sql", "rows", "parameters", "ordered"}
        and isinstance(sql := value.get("sql"), str)
        and sql.lstrip().lower().startswith(("select", "with"))
        and isinstance(rows := value.get("rows"), list)
        and all(isinstance(row, list | tuple) for row in rows)
        and isinstance(value.get("parameters", []), list | tuple)
        and isinstance(value.get("ordered", True), bool)
    )


def _malformed(what: str, where: str, value: object, remedy: str) -> VerifierError:
    return VerifierError(what, where=f"task {where}", value=value, remedy=remedy)
