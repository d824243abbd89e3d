from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from agents_fakes import FakeWorld, ask, call

import posttrain.agents as room
from posttrain.agents import Budget, Guard, Spent, Toolbox, replay_in
from posttrain.agents.tools import validator_of
from posttrain.data import Episode, Message, StopReason, ToolCall, ToolOutcome, ToolSpec
from posttrain.errors import DataError


def test_everything_that_is_listed_is_there_and_the_light_part_loads_without_torch() -> None:
    assert all(getattr(room, name) is not None for name in room.__all__)
    with pytest.raises(AttributeError, match="nothing_here"):
        room.nothing_here  # noqa: B018
    code = "import sys, posttrain.agents, posttrain.agents.guard; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_budget_counts_calls_tokens_and_seconds() -> None:
    now = [0.0]
    spent = Spent(Budget(max_calls=2, max_tokens=10, max_seconds=5.0), clock=lambda: now[0])
    assert [spent.take_call() for _ in range(3)] == [True, True, False]
    assert spent.calls == 2
    spent.tokens = 7
    assert spent.tokens_left(5) == 3
    assert spent.exhausted() is None
    now[0] = 5.0
    assert spent.exhausted() is StopReason.MAX_TURNS
    spent.tokens = 10
    assert spent.exhausted() is StopReason.LENGTH


def test_a_budget_without_limits_is_never_spent() -> None:
    spent = Spent(Budget(None, None, None), clock=lambda: 1e9)
    spent.tokens = 10**9
    assert all(spent.take_call() for _ in range(100))
    assert spent.tokens_left(192) == 192
    assert spent.exhausted() is None


def test_a_replay_makes_the_successful_calls_again_in_a_world_of_its_own() -> None:
    world = FakeWorld()
    made = [ToolCall("call_0", "add", '{"by":4}'), ToolCall("call_1", "pay", '{"amount":"900.00"}')]
    outcomes = (ToolOutcome(made[0], "", True), ToolOutcome(made[1], "", False, "not_permitted"))
    episode = Episode("t", "retail_B", "task", (), (), outcomes, StopReason.END_OF_TURN, ())
    with replay_in(world)(ask(environment={"start": 1}), episode) as environment:
        assert environment.query("") == [(5,)]
    assert world.environments[0].closed == 1
    assert world.executed == [("add", {"by": 4}, "retail_B")]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000])
def test_arguments_that_are_no_object_reach_neither_guard_nor_world(text: str) -> None:
    world = FakeWorld()
    task = ask()
    box = Toolbox(task.tools, task.tenant, world, Guard(""), lambda: world.environment({}))  # type: ignore[arg-type]
    outcome = box.run(ToolCall("call_0", "add", text), task.messages)
    assert "invalid_arguments" in outcome.content
    assert world.environments == []


@pytest.mark.parametrize(
    "text",
    ['{"by":1e30}', '{"by":1e999}', '{"by":NaN}', '{"by":"\\ud800"}', '{"\\ud800":1}', '{"x":' + "[" * 500 + "]" * 500 + "}"],
)
def test_arguments_that_nobody_can_read_are_an_outcome(text: str) -> None:
    tool = ToolSpec("add", "", {"type": "object", "properties": {"by": {"type": "number"}, "x": {"const": 1}}})
    world: Any = object()  # says nothing of the facts, so the guard reads the arguments
    box = Toolbox([tool], "retail_B", world, Guard("permit(principal, action, resource);"), lambda: pytest.fail("executed"))
    outcome = box.run(ToolCall("call_0", "add", text), ())
    assert not outcome.ok and any(word in outcome.content for word in ("invalid_arguments", "policy_error"))


SAID = {"type": "string", "pattern": r"^[0-9]+\.[0-9]{2}$", "x-grounded": "user"}


@pytest.mark.parametrize(
    ("request_", "result", "reason"),
    [
        ("pay 5.00", "", None),
        ("how does it stand?", '{"amount":"5.00"}', "not_said_by_user"),
        ("pay 4.00", "5.00", "not_said_by_user"),
        ("", "", "not_said_by_user"),
    ],
)
def test_a_call_with_a_value_that_the_user_did_not_give_is_denied_before_anybody_is_asked(
    request_: str, result: str, reason: str | None
) -> None:
    world = FakeWorld()
    pay = ToolSpec("pay", "", {"type": "object", "properties": {"amount": SAID}, "required": ["amount"]})
    box = Toolbox(
        [pay], "retail_B", world, Guard("permit(principal, action, resource);"), lambda: world.environment({"start": 1})
    )
    outcome = box.run(ToolCall("call_0", "pay", '{"amount":"5.00"}'), [Message("user", request_), Message("tool", result)])
    assert (outcome.denied, outcome.ok) == (reason, reason is None)
    assert bool(world.executed) == (reason is None)


def test_a_form_that_cannot_be_searched_for_denies() -> None:
    slow = {"type": "string", "pattern": "^b{0,9}(a|a)+$", "x-grounded": "user"}
    pay = ToolSpec("pay", "", {"type": "object", "properties": {"to": slow}, "required": ["to"]})
    world: Any = object()
    box = Toolbox([pay], "retail_B", world, Guard("permit(principal, action, resource);"), lambda: pytest.fail("executed"))
    outcome = box.run(ToolCall("call_0", "pay", '{"to":"aa"}'), [Message("user", "a" * 60 + "_")])
    assert outcome.denied == "not_said_by_user"


def test_a_validator_is_compiled_once_and_a_broken_schema_names_its_tool() -> None:
    assert validator_of(ask().tools[0]) is validator_of(ask().tools[0])
    with pytest.raises(DataError, match="tool odd: its parameters are no JSON Schema"):
        validator_of(ToolSpec("odd", "", {"type": "object", "required": 3}))
    with pytest.raises(DataError, match="tool remote"):
        validator_of(ToolSpec("remote", "", {"$ref": "http://localhost:9/schema"}))


def test_the_fakes_speak_the_contracts_language() -> None:
    assert call("add", by=1) == '<tool_call>{"name":"add","arguments":{"by":1}}</tool_call>'
