from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from verifying_helpers import Ledger, call

from posttrain.data import Episode, Message, StopReason, Task, Turn
from posttrain.errors import VerifierError
from posttrain.verifying import ANSWER_MUTATIONS, CALL_MUTATIONS, EnvironmentView, Judgement, Rate, audit, edit_calls, expected
from posttrain.verifying import mutations as m

LINES = [{"account": "1001", "amount": "5.00"}, {"account": "2001", "amount": "-5.00"}]
ANSWER = '{"decision":"answer","figures":[{"name":"posted","amount":"5.00"}]}'


@pytest.fixture
def gold(task: Any, play: Any) -> tuple[Task, Episode]:
    wanted = [
        {"name": "query_erp", "arguments": {"table": "ap"}},
        {"name": "post_entry", "arguments": {"lines": LINES, "memo": "m"}},
    ]
    calls = (call("query_erp", table="ap"), call("post_entry", lines=LINES, memo="m"))
    answer = {"decision": "answer", "figures": [{"amount": "5.00"}]}
    return task(calls=wanted, answer=answer), play(*calls, answer=ANSWER)


@contextmanager
def replayed(task: Task, episode: Episode) -> Iterator[EnvironmentView]:
    ledger = Ledger()
    for outcome in episode.outcomes:
        if outcome.call.name == "post_entry":
            ledger.post(*((line["account"], line["amount"]) for line in json.loads(outcome.call.arguments)["lines"]))
    yield ledger
    ledger.connection.close()


def lenient(task: Task, episode: Episode, environment: EnvironmentView | None) -> Judgement:
    """Looks at the decision alone, as a careless reward would."""
    return Judgement('"answer"' in episode.answer, 1.0)


def balances(task: Task, episode: Episode, environment: EnvironmentView | None) -> Judgement:
    assert environment is not None
    total = environment.query("SELECT COUNT(*), SUM(CAST(amount AS REAL)) FROM entries")
    return Judgement(total == [(2, 0.0)], 1.0)


def test_a_sound_verifier_rejects_every_mutation_and_accepts_the_harmless_ones(gold: Any) -> None:
    report = audit(expected, [gold], CALL_MUTATIONS + ANSWER_MUTATIONS)
    assert report.false_accepts == Rate(0, 10)
    assert report.false_rejects == Rate(0, 3)
    assert set(report.by_mutation) == {"gold"} | {mutation.name for mutation in CALL_MUTATIONS + ANSWER_MUTATIONS}
    assert report.unjudged == 0


def test_a_careless_verifier_is_caught_and_refused_trust_with_the_worst_mutations_named(gold: Any) -> None:
    report = audit(lenient, [gold] * 20, CALL_MUTATIONS + ANSWER_MUTATIONS)
    assert report.by_mutation["drop_call"] == Rate(20, 20)
    assert report.by_mutation["empty_answer"] == Rate(0, 20)
    assert report.examples["drop_call"] == ("t1",) * 3
    with pytest.raises(VerifierError, match=r"160 of 200 false accepts \(80.0% > 2.0%\).*wrong_tool 100%"):
        report.require_trust()


def test_a_verifier_of_the_end_state_is_judged_on_the_state_that_each_mutation_leads_to(gold: Any) -> None:
    report = audit(balances, [gold], CALL_MUTATIONS, replayed)
    assert report.by_mutation["gold"].count == 0
    assert report.by_mutation["drop_call"].count == 0
    assert report.by_mutation["unbalance"].count == 0
    assert report.by_mutation["swap_accounts"].count == 1  # blind to it: the audit shows where


def test_a_verifier_that_cannot_judge_rejects_and_is_counted(gold: Any) -> None:
    def broken(*_: Any) -> Judgement:
        raise VerifierError("cannot")

    report = audit(broken, [gold], ANSWER_MUTATIONS)
    assert report.false_accepts.count == 0
    assert report.false_rejects == Rate(2, 2)
    assert report.unjudged == 6
    with pytest.raises(VerifierError, match="false rejects"):
        report.require_trust(least=1)


def test_too_few_episodes_are_no_ground_for_trust(gold: Any) -> None:
    report = audit(expected, [gold], CALL_MUTATIONS)
    with pytest.raises(VerifierError, match="too few"):
        report.require_trust()
    report.require_trust(least=1)


def test_a_rate_has_a_wilson_interval() -> None:
    low, high = Rate(2, 10).interval
    assert (low, high) == (pytest.approx(0.0567, abs=1e-3), pytest.approx(0.5098, abs=1e-3))
    assert Rate(0, 0).interval == (0.0, 1.0)
    assert Rate(0, 20).interval[0] == 0.0


@pytest.mark.parametrize("mutation", CALL_MUTATIONS + ANSWER_MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_does_not_apply_where_there_is_nothing_to_change(play: Any, mutation: m.Mutation) -> None:
    assert mutation.apply(play()) is None


@pytest.mark.parametrize(
    ("mutation", "arguments"),
    [
        (m.change_amount, {"lines": [{"account": "1001", "amount": "5.01"}, LINES[1]], "memo": "m"}),
        (m.flip_sign, {"lines": [{"account": "1001", "amount": "-5.00"}, LINES[1]], "memo": "m"}),
        (m.unbalance, {"lines": [LINES[0], {"account": "2001", "amount": "-4.99"}], "memo": "m"}),
    ],
)
def test_a_mutation_of_arguments_changes_the_last_call_that_it_fits(gold: Any, mutation: Any, arguments: dict[str, Any]) -> None:
    changed = mutation(gold[1])
    assert json.loads(changed.outcomes[1].call.arguments) == arguments
    assert changed.outcomes[0] == gold[1].outcomes[0]
    assert changed.messages[3].tool_calls == (changed.outcomes[1].call,)


def test_swapped_accounts_are_two_texts_of_one_object(play: Any) -> None:
    changed = m.swap_accounts(play(call("transfer", amount="5.00", payer="A", payee="B"), answer="x"))
    assert changed is not None
    assert json.loads(changed.outcomes[0].call.arguments) == {"amount": "5.00", "payer": "B", "payee": "A"}


def test_accounts_are_swapped_between_the_lines_of_one_entry(gold: Any) -> None:
    changed = m.swap_accounts(gold[1])
    assert changed is not None
    lines = json.loads(changed.outcomes[1].call.arguments)["lines"]
    assert lines == [{"account": "2001", "amount": "5.00"}, {"account": "1001", "amount": "-5.00"}]


def test_a_dropped_call_takes_its_result_and_outcome_with_it(gold: Any) -> None:
    changed = m.drop_call(gold[1])
    assert changed is not None
    assert [message.role for message in changed.messages] == ["user", "assistant", "tool", "assistant"]
    assert [outcome.call.name for outcome in changed.outcomes] == ["query_erp"]


def test_a_cut_answer_is_stopped_by_length(gold: Any) -> None:
    changed = m.truncated_answer(gold[1])
    assert changed is not None
    assert changed.stop is StopReason.LENGTH
    assert ANSWER.startswith(changed.answer)


def test_turns_that_came_with_the_request_are_left_alone_and_token_turns_follow_their_message() -> None:
    earlier, own = call("query_erp", table="ar"), call("query_erp", table="ap")
    made = Message("assistant", "", (own,))
    messages = (Message("user", "q"), Message("assistant", "", (earlier,)), Message("tool", "1"), made, Message("tool", "2"))
    turn = Turn(3, (1,), (0.0,), (0.0,), (False,), made, StopReason.END_OF_TURN)
    episode = Episode("t", None, "task", messages, (turn,), (), StopReason.MAX_TURNS, ())
    changed = edit_calls(episode, lambda one, number: replace(one, name=f"{one.name}{number}"))
    assert changed is not None
    assert changed.messages[1] == messages[1]
    assert changed.messages[3].tool_calls[0].name == "query_erp0"
    assert changed.turns[0].message == changed.messages[3]
