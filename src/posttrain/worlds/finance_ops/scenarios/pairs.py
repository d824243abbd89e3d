"""Preference pairs: two continuations of one request, of which people prefer the first.

Five in thirteen are about advice: evidence and ordered actions against vague or disordered ones. The others are about what an assistant
with tools gets wrong most: guessing instead of looking up, refusing what is harmless, doing what must be refused, booking the wrong way
round. They are also the leash of this stage: a policy that learned from advice alone forgets its calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from posttrain.data.records import Message
from posttrain.worlds.finance_ops import money
from posttrain.worlds.finance_ops.answers import Answer, Decision, parse
from posttrain.worlds.finance_ops.scenarios import build, judgements, vagueness
from posttrain.worlds.finance_ops.scenarios.bench import Bench, Scenario
from posttrain.worlds.finance_ops.styles import dress

Pair = tuple[Scenario, Message, Message]

_DONE = (
    "This is done.",
    "It has been changed as you asked.",
    "The request is carried out.",
    "All set, nothing else is needed.",
    "I have taken care of it.",
)
_DECLINED = (
    "I cannot do this.",
    "I must not share this.",
    "This needs an approval first.",
    "I am not allowed to look at this.",
)
_DECLINED_STEPS = ("Ask your supervisor.", "Request two approvals.", "Contact the controller.")


def preference(bench: Bench, index: int) -> Pair:
    """The request, the better and the worse continuation. Kinds are taken in turn; lengths are balanced over them (see the tests)."""
    return _IN_TURN[index % len(_IN_TURN)](bench, index)


def _advice(bench: Bench, index: int) -> Pair:
    asked = judgements.advise(bench)
    better = dress(asked.reply, None, bench.tenant)
    worse = vagueness.worse(bench, better, index // 2)
    return build.advised(bench, asked, asked.reply), _said(better), _said(worse)


def _look_up(bench: Bench, index: int) -> Pair:
    """The call, against an answer in the right form whose figures nobody looked up; or the answer to what was found, against refusing."""
    found = build.tool_lookup(bench)
    if bench.rng.random() < 0.7:
        return found, _first(found), _said(_guessed(bench, found))
    return _at(found, len(found.gold) - 1), found.gold[-1], _refusal(bench)


def _help(bench: Bench, index: int) -> Pair:
    """A turn of a harmless request against refusing there: the first call, or what follows a result."""
    found = build.benign(bench)
    turns = [place for place, message in enumerate(found.gold) if message.role == "assistant"]
    place = bench.rng.choice(turns[1:]) if bench.rng.random() < 0.5 else 0
    return _at(found, place), found.gold[place], _refusal(bench)


def _hold(bench: Bench, index: int) -> Pair:
    """The refusal with its compliant way, against doing as asked: about half of the time after a result."""
    looked_up = bench.rng.random() < 0.3
    found = build.high_risk(bench)
    while looked_up and len(found.gold) == 1:
        found = build.high_risk(bench)
    last = found.gold[-1]
    done = Answer(Decision.ANSWER, bench.rng.choice(_DONE))
    return _at(found, len(found.gold) - 1), last, _said(done)


def _book(bench: Bench, index: int) -> Pair:
    """The entry that clears the difference, against the same entry the wrong way round."""
    lines: dict[str, str] = {}
    while lines.get("debit") == lines.get("credit"):  # a timing difference books nothing
        found = build.reconcile_task(bench)
        call = found.gold[0].tool_calls[0]
        lines = json.loads(call.arguments)
    lines["debit"], lines["credit"] = lines["credit"], lines["debit"]
    turned = replace(call, arguments=json.dumps(lines, separators=(",", ":")))
    return found, found.gold[0], replace(found.gold[0], tool_calls=(turned,))


# at the first turn and after a result: where only one of refusing and going on is ever the better side, that is what the policy learns
# to say there, harmless or not; holding comes twice as often as helping (docs/log.md, roads I and K)
_IN_TURN: tuple[Callable[[Bench, int], Pair], ...] = (
    _advice, _hold, _advice, _help, _hold, _advice, _book, _hold, _advice, _look_up, _hold, _help, _advice
)  # fmt: skip


def _at(found: Scenario, place: int) -> Scenario:
    """The scenario as it stands before a message of its gold continuation."""
    return replace(found, prompt=(*found.prompt, *found.gold[:place]))


def _refusal(bench: Bench) -> Message:
    steps = tuple(bench.rng.sample(_DECLINED_STEPS, bench.rng.choice((0, 1))))
    return _said(Answer(Decision.REFUSE, bench.rng.choice(_DECLINED), (), (), steps))


def _guessed(bench: Bench, found: Scenario) -> Answer:
    """The scenario's own answer with other amounts."""
    answer = parse(found.gold[-1].content)
    assert answer is not None, "a lookup ends with an answer"
    summary, figures = answer.summary, []
    for name, amount in answer.figures:
        other = money.text(bench.rng.randint(10_00, 250_000_00))
        summary = summary.replace(amount, other)
        figures.append((name, other))
    return answer.but(summary=summary, figures=tuple(figures))


def _first(found: Scenario) -> Message:
    assert found.gold[0].tool_calls, "the gold continuation starts with a call"
    return found.gold[0]


def _said(answer: Answer) -> Message:
    return Message("assistant", answer.json())
