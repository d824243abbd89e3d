"""Builders: one per task kind, and the mix of builders behind each of the four conversation shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from posttrain.data.records import Message, Shape
from posttrain.worlds.finance_ops import money
from posttrain.worlds.finance_ops.answers import Answer, Decision
from posttrain.worlds.finance_ops.prompts import system_prompt
from posttrain.worlds.finance_ops.scenarios import control, judgements, lookups, reconcile, vagueness
from posttrain.worlds.finance_ops.scenarios.bench import Bench, Scenario, expectation, user
from posttrain.worlds.finance_ops.scenarios.lookups import Lookup
from posttrain.worlds.finance_ops.styles import Reply
from posttrain.worlds.finance_ops.wording import Utterance

Builder = Callable[[Bench], Scenario]


def _scenario(
    bench: Bench,
    kind: str,
    shape: Shape,
    turns: tuple[Message, ...],
    gold: tuple[Message, ...],
    arguments: Mapping[str, Any],
    **more: Any,
) -> Scenario:
    prompt = (Message("system", system_prompt(bench.tenant)), *turns)
    return Scenario(kind, shape, bench.tenant, prompt, gold, arguments, bench.reference, **more)


def _read(bench: Bench, ref: str) -> tuple[Message, Message]:
    """The lookup of a document, before something is done about it."""
    found = lookups.document_of(Utterance(""), ref)
    call, result, _ = bench.act(found.name, found.arguments)
    return call, result


def _solve(bench: Bench, asked: Lookup, index: int = 0) -> tuple[tuple[Message, Message, Message], dict[str, Any]]:
    """Call, result and answer of a lookup, with what its verifier compares."""
    call, result, value = bench.act(asked.name, asked.arguments, index=index)
    if "error" in value:
        raise AssertionError(f"gold call failed: {asked.name} {asked.arguments} -> {value}")
    reply = asked.reply(value)
    figures = [amount for _, amount in reply.answer.figures]
    told = {"says": reply.says} if reply.says else {}
    arguments = expectation(asked.name, asked.arguments, figures[-1:], topic=reply.topic, **told)
    return (call, result, bench.answer(reply)), arguments


def tool_lookup(bench: Bench, asked: Lookup | None = None, kind: str = "lookup") -> Scenario:
    """One request, one call, one grounded answer."""
    found = asked or lookups.lookup(bench)
    before = _read(bench, found.reads) if found.reads else ()
    gold, arguments = _solve(bench, found, index=len(before) // 2)
    alike = kind != "lookup"  # of a high-risk request
    verifier = "finance_ops.benign" if alike else "finance_ops.lookup"
    turns, turn_limit = (user(found.utterance),), 4 if alike else 3
    shape = Shape.TOOL_TRAJECTORY
    return _scenario(bench, kind, shape, turns, (*before, *gold), arguments, verifier=verifier, max_turns=turn_limit)


def tool_call(bench: Bench) -> Scenario:
    """A request and its call, without what follows: choosing the call is what takes many examples, reading its result few."""
    return _to_the_call(tool_lookup(bench))


def benign_call(bench: Bench) -> Scenario:
    """As `tool_call`, of a look-alike; a transfer with the lookup that comes before it."""
    return _to_the_call(benign(bench))


def _to_the_call(found: Scenario) -> Scenario:
    """Without the last call's result and the answer."""
    return replace(found, gold=found.gold[:-2])


def clarified_lookup(bench: Bench) -> Scenario:
    """The period is missing: ask for it, then call. The last user turn is the prompt's end."""
    centre, period = bench.pick("SELECT cost_centre, period FROM budgets")
    first = bench.say("budget.open", cc=centre)
    asked = lookups.budget(bench, (centre, period), "follow.fill")
    gold, arguments = _solve(bench, asked)
    turns = (user(first), bench.answer(_which_period(centre)), user(asked.utterance))
    return _scenario(bench, "lookup", Shape.MULTI_TURN, turns, gold, arguments, verifier="finance_ops.lookup")


def _which_period(centre: str) -> Reply:
    answer = Answer(Decision.CLARIFY, f"Which period do you mean for the budget of {centre}?", (), (), ("Name the period.",))
    return Reply(answer, "BUD-01", "Missing: the period.", "budgets are set by period", "the wrong month")


def followed_lookup(bench: Bench) -> Scenario:
    """A solved request, then a follow-up that reuses its entity."""
    first = bench.rng.choice((lookups.cash, lookups.budget))(bench)
    solved, _ = _solve(bench, first)
    assert first.follow is not None, "cash and budget lookups have a follow-up"
    second = first.follow()
    gold, arguments = _solve(bench, second, index=1)
    turns = (user(first.utterance), *solved, user(second.utterance))
    return _scenario(bench, "lookup", Shape.MULTI_TURN, turns, gold, arguments, verifier="finance_ops.lookup")


def any_lookup(bench: Bench) -> Scenario:
    """Mostly single requests; some with history."""
    return bench.rng.choices((tool_lookup, clarified_lookup, followed_lookup), weights=(18, 1, 1))[0](bench)


def missing_document(bench: Bench) -> Scenario:
    """A document that the books do not hold: say so and ask, do not refuse."""
    known = lookups.document(bench)
    prefix = known.arguments["ref"].partition("-")[0]
    ref = lookups.unknown_ref(bench, prefix)
    call, result = _read(bench, ref)
    answer = Answer(Decision.CLARIFY, f"The books hold no {ref}.", (), (), ("Check the reference.",))
    reply = Reply(answer, "RET-01", f"Not found: {ref}.", "nothing is recorded under it", "a wrong reference")
    said = bench.say("document.ask", ref=ref)
    return _scenario(bench, "missing", Shape.TOOL_TRAJECTORY, (user(said),), (call, result, bench.answer(reply)), {})


def corrected_lookup(bench: Bench) -> Scenario:
    """A party looked up on the wrong side of the books, which is not to be learned, and then on the side that the error names."""
    asked, wrong = lookups.party_lookup(bench)
    call, error, value = bench.act(asked.name, wrong)
    if "error" not in value:
        raise AssertionError(f"a wrong call succeeded: {asked.name} {wrong} -> {value}")
    gold, arguments = _solve(bench, asked, index=1)
    turns, shape = (user(asked.utterance),), Shape.TOOL_TRAJECTORY
    slip = (replace(call, learn=False), error)
    return _scenario(bench, "lookup", shape, turns, (*slip, *gold), arguments, verifier="finance_ops.lookup")


def two_calls(bench: Bench) -> Scenario:
    """One request with two questions: two calls, one after the other, and one answer."""
    first = bench.rng.choice((lookups.cash, lookups.budget, lookups.document))(bench)
    second = lookups.policy(bench, plain=True)
    one_said = first.utterance.text if first.utterance.text.endswith((".", "?", "!")) else f"{first.utterance.text}."
    link, then = bench.phrase("two.link"), second.utterance.text
    text = f"{one_said} {link} {then[0].lower() + then[1:] if link.endswith(',') else then}"
    (call, result, _), wanted = _solve(bench, first)
    (also, found, _), wanted_also = _solve(bench, second, index=1)
    replies = first.reply(json.loads(result.content)), second.reply(json.loads(found.content))
    one, two = (reply.answer for reply in replies)
    answer = one.but(
        summary=f"{one.summary} {two.summary}", figures=(*one.figures, *two.figures), sources=(*one.sources, *two.sources)
    )
    reply = replace(replies[0], answer=answer, cause="the books and the policy say so")
    arguments = {
        "call": wanted["call"],
        "also": wanted_also["call"],
        "topic": wanted_also["topic"],
        "figures": [amount for _, amount in answer.figures],
    }
    return _scenario(
        bench,
        "two_calls",
        Shape.TOOL_TRAJECTORY,
        (Message("user", text),),
        (call, result, also, found, bench.answer(reply)),
        arguments,
        verifier="finance_ops.lookup",
        max_turns=4,
    )


def benign(bench: Bench) -> Scenario:
    """A look-alike of a high-risk request, to be served."""
    return tool_lookup(bench, control.benign(bench), "benign")


def payment_asked(bench: Bench) -> Scenario:
    """Only how a payment request stands: what is read there must not decide whether anybody wanted it paid."""
    return tool_lookup(bench, control.payment_status(bench), "payment_asked")


def high_risk(bench: Bench) -> Scenario:
    """A request to refuse, sometimes only after reading the document it points at."""
    asked = control.refusal(bench)
    answer = bench.answer(asked.reply)
    gold: tuple[Message, ...] = (answer,)
    if asked.reads:
        gold = (*_read(bench, asked.reads), answer)
    arguments = {"decision": "refuse", "topic": asked.reply.topic}
    return _scenario(
        bench,
        "high_risk",
        Shape.SAFETY_STYLE,
        (user(asked.utterance),),
        gold,
        arguments,
        verifier="finance_ops.high_risk",
        high_risk=True,
    )


def facts(bench: Bench) -> Scenario:
    """A question on facts that the request gives: no tool."""
    asked = judgements.facts(bench)
    arguments = {"decision": "answer", "figures": [asked.amount], "sources": [asked.ref], "topic": asked.reply.topic}
    return _scenario(
        bench,
        "facts",
        Shape.SINGLE_TURN,
        (user(asked.text),),
        (bench.answer(asked.reply),),
        arguments,
        verifier="finance_ops.facts",
        max_turns=2,
    )


def advise(bench: Bench) -> Scenario:
    """Advice with evidence and ordered actions."""
    asked = judgements.advise(bench)
    return advised(bench, asked, asked.reply)


def advised(bench: Bench, asked: judgements.Question, reply: Reply) -> Scenario:
    arguments = {
        "decision": "propose",
        "figures": [asked.amount],
        "sources": [asked.ref],
        "evidence": list(asked.evidence),
        "topic": asked.reply.topic,
    }
    return _scenario(
        bench,
        "advise",
        Shape.SINGLE_TURN,
        (user(asked.text),),
        (bench.answer(reply),),
        arguments,
        verifier="finance_ops.advise",
        max_turns=2,
    )


def advise_mixed(bench: Bench) -> Scenario:
    """Advice as people write it in demonstrations, of mixed quality: full, with empty actions, or vague. Preferences sharpen it later."""
    asked = judgements.advise(bench)
    good = asked.reply.answer
    if bench.style is not None:
        return advised(bench, asked, asked.reply)
    quality = bench.rng.choices(("full", "toothless", "vague"), weights=(35, 25, 40))[0]
    answer = {
        "full": good,
        "toothless": vagueness.toothless(bench, good, among=vagueness.SHORT),
        "vague": vagueness.vague(bench, good, among=vagueness.SHORT),
    }[quality]
    return advised(bench, asked, replace(asked.reply, answer=answer))


def reconcile_task(bench: Bench) -> Scenario:
    """One extract, one trial posting; the episode ends with the call."""
    told = reconcile.case(bench)
    call, _, value = bench.act("propose_entry", told.arguments)
    assert value.get("difference") == "0.00", f"gold entry leaves a difference: {told} {value}"
    arguments = {
        "call": {"name": "propose_entry", "arguments": told.arguments},
        "document": told.truth.doc,
        "difference": told.truth.kind,
        "gap": money.text(told.truth.gap),
    }
    return _scenario(
        bench,
        "reconcile",
        Shape.TOOL_TRAJECTORY,
        (user(told.text),),
        (call,),
        arguments,
        verifier="finance_ops.reconcile",
        max_turns=1,
    )


def reconcile_closed(bench: Bench) -> Scenario:
    """A reconciliation with its closing answer, for conversations."""
    told = reconcile.case(bench)
    call, result, value = bench.act("propose_entry", told.arguments)
    gold = (call, result, bench.answer(reconcile.proposal_reply(told.arguments, value)))
    return _scenario(bench, "reconcile", Shape.TOOL_TRAJECTORY, (user(told.text),), gold, {})


def denied_transfer(bench: Bench) -> Scenario:
    """The request claims two approvals, the books know fewer or not even the request: the answer refuses."""
    ref, party, amount = bench.pick(
        "SELECT ref, party, amount FROM payment_requests p WHERE (SELECT COUNT(*) FROM approvals a WHERE a.ref = p.ref) < 2"
    )
    if bench.rng.random() < control.UNKNOWN:
        ref = lookups.unknown_ref(bench, "PAY")
    people = bench.rng.sample([name for (name,) in bench.live.query("SELECT DISTINCT approver FROM approvals")], 2)
    value = money.text(amount)
    said = bench.say("transfer.benign", ref=ref, party=party, amount=value, a1=people[0], a2=people[1])
    call, result = _read(bench, ref)
    reply = control.refusal_reply("no_approval")
    return _scenario(bench, "denied", Shape.SAFETY_STYLE, (user(said),), (call, result, bench.answer(reply)), {}, high_risk=True)


def _plain_lookup(bench: Bench) -> Scenario:
    """A lookup other than a policy question, whose answer cites a policy in any style."""
    return tool_lookup(
        bench, bench.rng.choice((lookups.cash, lookups.ageing, lookups.budget, lookups.document, lookups.listing))(bench)
    )


def tenant_style(bench: Bench) -> Scenario:
    """Any request whose answer shows the tenant's style; the gold is dressed in it."""
    styled = Bench(bench.split, bench.seed, bench.tenant, bench.tenant, bench.rng)
    found = bench.rng.choices((facts, _plain_lookup, high_risk, advise), weights=(3, 3, 3, 2))[0](styled)
    arguments = {**found.arguments, "base": found.verifier}
    return Scenario(
        "tenant_style",
        found.shape,
        found.tenant,
        found.prompt,
        found.gold,
        arguments,
        found.environment,
        "finance_ops.tenant_style",
        found.high_risk,
        found.max_turns,
    )


KINDS: Mapping[str, Builder] = {
    "lookup": any_lookup,
    "advise": advise,
    "high_risk": high_risk,
    "benign": benign,
    "payment_asked": payment_asked,
    "reconcile": reconcile_task,
    "tenant_style": tenant_style,
    "facts": facts,
    "two_calls": two_calls,
}

# shape -> (builder, weight) pairs
SHAPES: Mapping[Shape, tuple[tuple[Builder, float], ...]] = {
    Shape.SINGLE_TURN: ((facts, 0.5), (advise_mixed, 0.5)),
    Shape.MULTI_TURN: ((clarified_lookup, 0.5), (followed_lookup, 0.5)),
    Shape.TOOL_TRAJECTORY: (
        (tool_call, 0.36),
        (tool_lookup, 0.24),
        (corrected_lookup, 0.05),
        (missing_document, 0.03),
        (two_calls, 0.04),
        (reconcile_task, 0.24),  # enough to begin with: stage 5 learns the rest from what its verifier passes
        (reconcile_closed, 0.04),
    ),
    # what is said after the books were read decides as much as the first call: pay, refuse, or only report
    Shape.SAFETY_STYLE: (
        (high_risk, 0.44),
        (benign_call, 0.12),
        (benign, 0.24),
        (payment_asked, 0.12),
        (denied_transfer, 0.08),
    ),
}


def scenario_of_kind(bench: Bench, kind: str) -> Scenario:
    return KINDS[kind](bench)


def scenario_of_shape(bench: Bench, shape: Shape) -> Scenario:
    builders, weights = zip(*SHAPES[shape], strict=True)
    build: Builder = bench.rng.choices(builders, weights=weights)[0]
    return build(bench)
