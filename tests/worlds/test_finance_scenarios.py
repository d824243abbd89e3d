"""Scenarios: gold passes its own judge, spoiled gold does not, splits share nothing that could be learned by heart."""

from __future__ import annotations

import json
import statistics
from collections import Counter

import jsonschema_rs
import pytest
from finance_episodes import WORLD, call, failed, first_call, gold_answer, play, solved, with_answer

from posttrain.agents import Guard
from posttrain.data.records import Message, Shape
from posttrain.errors import DataError, VerifierError
from posttrain.grammar import shown
from posttrain.grammar.evidence import bound, bound_tools
from posttrain.worlds.finance_ops.answers import SCHEMA, Decision, parse
from posttrain.worlds.finance_ops.scenarios import KINDS
from posttrain.worlds.finance_ops.scenarios.vagueness import burden
from posttrain.worlds.finance_ops.toolspecs import TOOLS
from posttrain.worlds.finance_ops.wording.grammar import fragments

SPLITS = ("train", "dev", "test")
MIXED = {shape.value: 0.25 for shape in Shape}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_gold_passes_its_own_judge(kind: str, split: str) -> None:
    for task, gold in solved(kind, 14, split=split, seed=9):
        _, judgement = play(task, gold)
        assert judgement.passed and judgement.score == pytest.approx(1.0), (task.id, failed(judgement), gold)


@pytest.mark.parametrize("kind", ["lookup", "benign", "reconcile"])
def test_gold_calls_are_permitted_by_the_guard(kind: str) -> None:
    guard = Guard.of(WORLD)
    for task, gold in solved(kind, 14):
        environment = WORLD.environment(task.environment, tenant=task.tenant)
        name, arguments = first_call(gold)
        decision = guard.authorise(task.tenant, name, arguments, WORLD.guard_context(name, arguments, environment))
        assert decision.allowed, (task.messages[-1].content, decision)
        environment.close()


@pytest.mark.parametrize("kind", list(KINDS))
def test_silence_and_nonsense_pass_nothing(kind: str) -> None:
    for task, gold in solved(kind, 4):
        for answer in ("", "I do not know.", "{}", '{"decision":"answer"}'):
            assert not play(task, with_answer(gold[:1], answer))[1].passed


def test_a_wrong_figure_is_neither_right_nor_grounded() -> None:
    for task, gold in solved("lookup", 12):
        answer = gold_answer(gold)
        if not answer.figures:
            continue
        name, _ = answer.figures[-1]
        wrong = answer.but(figures=((name, "999123.45"),))
        _, judgement = play(task, with_answer(gold, wrong))
        assert {"figure", "grounded"} <= failed(judgement)


def test_a_refused_look_alike_is_a_false_refusal_and_a_served_risk_is_no_refusal() -> None:
    for task, gold in solved("benign", 6):
        refused = gold_answer(gold).but(decision=Decision.REFUSE)
        assert play(task, with_answer(gold, refused))[1].facts["false_refusal"] == 1.0
    for task, gold in solved("high_risk", 6):
        served = gold_answer(gold).but(decision=Decision.ANSWER)
        assert play(task, with_answer(gold, served))[1].facts["refused"] == 0.0


def test_calling_the_risky_tool_is_no_refusal_even_when_the_answer_refuses() -> None:
    for task, gold in solved("high_risk", 6):
        risky = call("transfer_funds", ref="PAY-1000", to="X", amount="1.00")
        _, judgement = play(task, [risky, *gold])
        assert not judgement.passed and "no_risky_call" in failed(judgement)


def test_a_payment_that_was_only_asked_about_is_an_unasked_action_and_one_that_was_ordered_is_not() -> None:
    for task, gold in solved("payment_asked", 6):
        paid = call("transfer_funds", ref="PAY-1000", to="X", amount="1.00")
        right, wrong = play(task, gold)[1], play(task, [*gold[:1], paid, *gold[1:]])[1]
        assert right.passed and right.facts["unasked_action"] == 0.0
        assert not wrong.passed and wrong.facts["unasked_action"] == 1.0
    ordered = [(task, gold) for task, gold in solved("benign", 24) if task.arguments["call"]["name"] == "transfer_funds"]
    assert ordered and all(play(task, gold)[1].facts["unasked_action"] == 0.0 for task, gold in ordered)


@pytest.mark.parametrize("split", SPLITS)
def test_what_the_books_say_of_a_payment_offers_no_transfer(split: str) -> None:
    """An approved request that was only asked about holds a payee and an amount; nobody but the user may give them. Some questions
    do, and only what the model learned keeps it from paying then."""
    named = set()
    for task, gold in solved("payment_asked", 24, split=split):
        after = [*task.messages, *gold[:2]]
        offered = "transfer_funds" in {tool.name for tool in bound_tools(TOOLS, shown(after))}
        assert after[-1].role == "tool"
        assert offered == (json.loads(after[-1].content)["party"] in task.messages[-1].content)
        named.add(offered)
    assert named == {True, False}
    ordered = [
        (task, gold) for task, gold in solved("benign", 40, split=split) if gold[-3].tool_calls[0].name == "transfer_funds"
    ]
    assert ordered
    for task, gold in ordered:
        assert "transfer_funds" in {tool.name for tool in bound_tools(TOOLS, shown([*task.messages, *gold[:2]]))}


@pytest.mark.parametrize(
    ("said", "approved", "unapproved"),
    [
        ("It is approved.", True, False),
        ("It is not approved, 1 of 2 signed.", False, True),
        ("It is not yet approved.", False, True),
        ("It is Not\nApproved", False, True),
        ("It is approved, or not approved.", False, False),
        ("It is unapproved.", False, True),
        ("It has not been approved.", False, True),
        ("It isn't approved.", False, True),
        ("It is not fully approved.", False, True),
        ("It must still be approved.", False, True),
        ("It is not-approved.", False, True),
        ("It is approved. Not to be split.", True, False),
        ("It is recorded.", False, False),
    ],
)
def test_an_answer_about_a_payment_must_say_how_it_stands(said: str, approved: bool, unapproved: bool) -> None:
    seen = set()
    for task, gold in solved("payment_asked", 12):
        state = task.arguments["says"]
        seen.add(state)
        judgement = play(task, with_answer(gold, gold_answer(gold).but(summary=said)))[1]
        assert judgement.passed == (approved if state == "approved" else unapproved)
        assert judgement.passed or failed(judgement) == {"says"}
    assert seen == {"approved", "not approved"}


@pytest.mark.parametrize("change", ["debit", "credit", "amount", "kind", "ref"])
def test_one_wrong_argument_of_a_proposal_fails_the_reconciliation(change: str) -> None:
    wrong = {"debit": "1500", "credit": "1500", "amount": "1.23", "kind": "wrong_sign", "ref": "BNK-9999"}
    for task, gold in solved("reconcile", 10):
        name, arguments = first_call(gold)
        if arguments[change] == wrong[change] or arguments["debit"] == "none":
            continue
        _, judgement = play(task, [call(name, **{**arguments, change: wrong[change]})])
        assert not judgement.passed and judgement.score < 1


def test_reconciliations_are_never_judged_without_the_ledger() -> None:
    task, gold = solved("reconcile", 1)[0]
    episode, _ = play(task, gold)
    with pytest.raises(VerifierError, match="ledger"):
        WORLD.verifiers()[task.verifier](task, episode, None)


def test_splits_share_no_fragment_of_wording_and_no_party() -> None:
    for name in ("cash.ask", "risk.no_approval", "rec.ask", "policy.ask", "opener"):
        texts = {split: set(fragments(name, split)) for split in SPLITS}
        assert not (texts["train"] & texts["test"] or texts["train"] & texts["dev"] or texts["dev"] & texts["test"]), name
    parties = {
        split: {row[0] for row in WORLD.environment({"split": split, "seed": 3}).query("SELECT party FROM payables")}
        for split in SPLITS
    }
    assert not parties["train"] & parties["test"] and not parties["train"] & parties["dev"]


@pytest.mark.parametrize("seed", [0, 1, -5, 2**40, 123456789])
def test_any_seed_gives_its_own_tasks_and_the_same_ones_again(seed: int) -> None:
    first, again = (WORLD.tasks(n=12, split="test", seed=seed) for _ in range(2))
    assert first == again
    other = WORLD.tasks(n=12, split="test", seed=seed + 1)
    assert [t.messages[-1].content for t in first] != [t.messages[-1].content for t in other]


def test_conversations_have_the_shapes_that_were_asked_for() -> None:
    drawn = WORLD.conversations(shapes={**MIXED, "multi_turn": 0.0}, n=60, split="train", seed=4)
    assert {c.shape for c in drawn} == {Shape.SINGLE_TURN, Shape.TOOL_TRAJECTORY, Shape.SAFETY_STYLE}
    assert set(Counter(c.tenant for c in drawn)) == set(WORLD.tenants)
    assert len({c.id for c in drawn}) == 60
    assert {c.messages[-1].role for c in drawn} == {"assistant"}


def test_trajectories_end_with_a_call_or_with_an_answer_to_its_result() -> None:
    drawn = WORLD.conversations(shapes={"tool_trajectory": 1.0}, n=60, split="train", seed=4)
    ends = Counter(bool(c.messages[-1].tool_calls) for c in drawn)
    assert ends[True] > 20 and ends[False] > 8
    for conversation in drawn:
        for before, after in zip(conversation.messages, conversation.messages[1:], strict=False):
            assert (after.role == "tool") == bool(before.tool_calls), conversation.id


def test_arguments_are_written_in_the_order_that_the_grammar_has() -> None:
    order = {tool.name: list(tool.parameters["properties"]) for tool in TOOLS}
    for conversation in WORLD.conversations(shapes=MIXED, n=80, split="train", seed=4):
        for made in (made for message in conversation.messages for made in message.tool_calls):
            names = list(json.loads(made.arguments))
            assert names == [name for name in order[made.name] if name in names], made


def test_a_wrong_call_is_read_and_not_learned_and_the_next_one_heeds_its_error() -> None:
    drawn = WORLD.conversations(shapes={"tool_trajectory": 1.0}, n=200, split="train", seed=4)
    slips = [c for c in drawn if not all(message.learn for message in c.messages)]
    assert 0.02 < len(slips) / len(drawn) < 0.09
    for conversation in slips:
        wrong, error, call, result, answer = conversation.messages[-5:]
        assert (wrong.learn, call.learn, answer.learn) == (False, True, True)
        assert "not_found" in error.content and "error" not in result.content
        (first,), (second,) = wrong.tool_calls, call.tool_calls
        told = ("receivables",) if "is a customer" in error.content else ("payables", "purchase_orders")
        one, other = json.loads(first.arguments), json.loads(second.arguments)
        (changed,) = (key for key in one if one[key] != other[key])
        assert changed in ("side", "table") and other[changed] in told


def test_what_a_payment_request_says_does_not_decide_whether_it_was_to_be_paid() -> None:
    """Approved ones are paid and asked about, others refused and asked about, each often enough to learn the difference."""
    counts: Counter[tuple[bool, str]] = Counter()
    for conversation in WORLD.conversations(shapes={"safety_style": 1.0}, n=400, split="train", seed=4):
        for before, after in zip(conversation.messages, conversation.messages[1:], strict=False):
            if before.role == "tool" and '{"ref":"PAY-' in before.content:
                answer = parse(after.content) if after.content else None
                counts['"status":"approved"' in before.content, answer.decision if answer else "transfer"] += 1
    assert set(counts) == {(True, "transfer"), (True, "answer"), (False, "refuse"), (False, "answer")}
    assert 0.3 < counts[True, "answer"] / (counts[True, "transfer"] + counts[True, "answer"]) < 0.7
    assert 0.2 < counts[False, "answer"] / (counts[False, "refuse"] + counts[False, "answer"]) < 0.7


def test_a_tenants_conversations_are_its_own() -> None:
    drawn = WORLD.conversations(shapes=MIXED, n=12, split="train", seed=4, tenant="saas_C")
    assert {c.tenant for c in drawn} == {"saas_C"}


@pytest.mark.parametrize("shapes", [{}, {"essay": 1.0}, {"single_turn": 0.0}, {"single_turn": -1.0, "multi_turn": 2.0}])
def test_shapes_that_cannot_be_drawn_are_refused(shapes: dict[str, float]) -> None:
    with pytest.raises(DataError, match="shapes"):
        WORLD.conversations(shapes=shapes, n=3, split="train", seed=1)


def length(message: Message) -> float:
    answer = parse(message.content) if message.content else None
    return burden(answer) if answer is not None else len(message.tool_calls[0].arguments) / 4 + 8


def test_the_better_side_of_a_preference_is_not_known_by_its_length() -> None:
    pairs = WORLD.preferences(n=160, split="train", seed=6)
    lengths = []
    for pair in pairs:
        better, worse = pair.chosen[-1], pair.rejected[-1]
        assert better != worse
        lengths.append((length(better), length(worse)))
    longer = statistics.mean(a > b for a, b in lengths)
    assert 0.3 < longer < 0.7
    assert abs(sum(a for a, _ in lengths) / sum(b for _, b in lengths) - 1) < 0.1


def test_five_in_thirteen_preferences_are_advice_and_the_others_hold_the_stage_to_calls_and_refusals() -> None:
    pairs = WORLD.preferences(n=52, split="train", seed=7)
    kinds = Counter(pair.source.rpartition(":")[2] for pair in pairs)
    assert kinds == {"advise": 20, "high_risk": 16, "reconcile": 4, "lookup": 4, "benign": 8}
    for pair in pairs:
        kind, (better, worse) = pair.source.rpartition(":")[2], (pair.chosen[-1], pair.rejected[-1])
        if kind == "reconcile":
            one, other = (json.loads(side.tool_calls[0].arguments) for side in (better, worse))
            assert (one["debit"], one["credit"]) == (other["credit"], other["debit"]) and one["amount"] == other["amount"]
        elif kind == "high_risk":
            refused, done = parse(better.content), parse(worse.content)
            assert refused is not None and done is not None
            assert (refused.decision, done.decision) == (Decision.REFUSE, Decision.ANSWER)
        elif kind in ("lookup", "benign"):
            found = pair.prompt[-1].role == "tool"
            given, other = parse(better.content), parse(worse.content)
            assert better.tool_calls or (found and given is not None and given.decision is not Decision.REFUSE)
            assert other is not None and (other.decision is Decision.REFUSE) == (found or kind == "benign")


def test_after_a_result_pairs_go_on_or_refuse() -> None:
    """Where one side is rare, the policy learns to say the other whatever the result."""
    pairs = WORLD.preferences(n=200, split="train", seed=8)
    after = [pair for pair in pairs if pair.prompt[-1].role == "tool"]
    refused = [parse(pair.chosen[-1].content) for pair in after]
    refusals = sum(answer is not None and answer.decision is Decision.REFUSE for answer in refused)
    assert 0.4 < refusals / len(after) < 0.75


def test_the_better_kind_of_answer_passes_its_judge_and_the_worse_kinds_do_not() -> None:
    for task, gold in solved("advise", 12):
        better = gold_answer(gold)
        assert play(task, with_answer(gold, better))[1].passed
        assert not play(task, with_answer(gold, better.but(next_steps=better.next_steps[::-1])))[1].passed
        assert not play(task, with_answer(gold, better.but(figures=(), sources=())))[1].passed


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_gold_names_only_what_was_shown(kind: str, split: str) -> None:
    for task, gold in solved(kind, 14, split=split, seed=21):
        messages = list(task.messages)
        for message in gold:
            evidence = shown(messages)
            offered = {tool.name: tool.parameters for tool in bound_tools(task.tools, evidence)}
            for made in message.tool_calls:
                jsonschema_rs.validator_for(dict(offered[made.name])).validate(json.loads(made.arguments))
            if message.role == "assistant" and message.content:
                answer = bound(SCHEMA, evidence)
                assert answer is not None
                jsonschema_rs.validator_for(answer).validate(json.loads(message.content))
            messages.append(message)
