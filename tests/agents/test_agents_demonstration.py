"""A demonstration is played like an episode: its calls act on the world behind the guard, and the verifier judges what came of them."""

from __future__ import annotations

import pytest
from agents_fakes import END, FakeContract, FakeWorld, ask, encode

from posttrain.agents import Guard
from posttrain.agents.demonstration import play_demonstration
from posttrain.data import Episode, Message, StopReason, ToolCall
from posttrain.verifying import Judgement


def calls(by: int, identity: str = "mine") -> Message:
    return Message("assistant", "", (ToolCall(identity, "add", f'{{"by":{by}}}'),))


def play(*turns: Message, world: FakeWorld, count: int = 5, **fields: object) -> tuple[Episode, Judgement | None]:
    task = ask(verifier="counted", arguments={"count": count}, demonstration=turns, **fields)
    return play_demonstration(task, contract=FakeContract(), world=world, guard=Guard.of(world))


def test_calls_act_on_the_world_and_its_own_results_are_read() -> None:
    world = FakeWorld()
    claimed = Message("tool", '{"count": 99}', (), "mine")
    episode, judgement = play(calls(2), claimed, calls(3), claimed, Message("assistant", "it is 5"), world=world)
    assert [arguments for _, arguments, _ in world.executed] == [{"by": 2}, {"by": 3}]
    assert [message.content for message in episode.messages if message.role == "tool"] == ['{"count": 2}', '{"count": 5}']
    assert (episode.answer, episode.stop) == ("it is 5", StopReason.END_OF_TURN)
    assert judgement is not None and judgement.passed
    assert all(environment.closed for environment in world.environments)


def test_its_turns_are_the_tokens_that_the_contract_writes() -> None:
    episode, _ = play(Message("assistant", "five"), world=FakeWorld())
    (turn,) = episode.turns
    assert turn.ids == (*encode("five"), END) == episode.ids[turn.prompt_length :]
    assert not any(turn.forced)


def test_a_turn_that_is_not_to_be_learned_is_played_as_forced() -> None:
    call = Message("assistant", "", (ToolCall("mine", "add", '{"by":5}'),), learn=False)
    episode, _ = play(call, Message("assistant", "it is 5"), world=FakeWorld())
    assert [set(turn.forced) for turn in episode.turns] == [{True}, {False}]


@pytest.mark.parametrize("tenant", ["retail_B", None])
def test_the_verifier_has_the_last_word(tenant: str | None) -> None:
    world = FakeWorld()
    _, judgement = play(calls(2), Message("assistant", "it is 5"), world=world, tenant=tenant)
    assert judgement is not None and not judgement.passed


@pytest.mark.parametrize(("tenant", "paid"), [("retail_B", ["50.00"]), ("bank_A", []), (None, [])])
def test_the_guard_stands_before_its_calls(tenant: str | None, paid: list[str]) -> None:
    world = FakeWorld()
    pay = Message("assistant", "", (ToolCall("mine", "pay", '{"amount":"50.00"}'),))
    episode, _ = play(pay, Message("assistant", "paid"), world=world, tenant=tenant)
    assert [arguments["amount"] for _, arguments, _ in world.executed] == paid
    assert (episode.outcomes[0].denied is None) == bool(paid)


def test_one_that_stops_too_early_ends_there() -> None:
    episode, _ = play(calls(5), world=FakeWorld(), max_turns=3)
    assert (episode.stop, len(episode.outcomes)) == (StopReason.CANCELLED, 1)
    assert play(calls(5), world=FakeWorld(), max_turns=1)[0].stop is StopReason.MAX_TURNS
