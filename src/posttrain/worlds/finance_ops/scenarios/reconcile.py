"""Reconciliation: an evidence extract of one planted difference, and the entry that clears it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from posttrain.worlds.finance_ops import money
from posttrain.worlds.finance_ops.answers import Answer, Decision
from posttrain.worlds.finance_ops.differences import Difference, Kind
from posttrain.worlds.finance_ops.scenarios.bench import Bench
from posttrain.worlds.finance_ops.styles import Reply
from posttrain.worlds.finance_ops.wording.values import amount as write_amount

_LINES = {
    Kind.UNMATCHED_RECEIPT: ("rec.money_in", "rec.not_booked"),
    Kind.DUPLICATE_INVOICE: ("rec.bill_once", "rec.booked_twice"),
    Kind.WRONG_SIGN: ("rec.charge", "rec.charge_reversed"),
    Kind.WRONG_ACCOUNT: ("rec.bill_coded", "rec.misbooked"),
    Kind.TIMING_DIFFERENCE: ("rec.cheque", "rec.cleared"),
}


_CAUSES = {
    Kind.UNMATCHED_RECEIPT: "the receipt was never booked",
    Kind.DUPLICATE_INVOICE: "the bill was booked twice",
    Kind.WRONG_SIGN: "the charge was booked the wrong way round",
    Kind.WRONG_ACCOUNT: "the bill was booked to another account",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One difference as a request, with the entry that clears it."""

    text: str
    truth: Difference
    arguments: dict[str, str]


def case(bench: Bench) -> Case:
    """A difference of any kind from the bench's books, told in the split's words."""
    truth = bench.rng.choice(bench.facts.differences)
    arguments = {
        "ref": truth.doc,
        "debit": truth.debit,
        "credit": truth.credit,
        "amount": money.text(truth.amount),
        "kind": str(truth.kind),
    }
    return Case(_told(bench, truth), truth, arguments)


def _told(bench: Bench, truth: Difference) -> str:
    rng, slots = bench.rng, _slots(bench, truth)
    lines = [bench.phrase(name, **slots) for name in _LINES[truth.kind]]
    if rng.random() < 0.3:
        lines.reverse()
    lines.insert(rng.choice((0, 2, 2)), bench.phrase("rec.gap", **slots))
    join = rng.choice(("; ", "\n", "\n- ", ". "))
    body = ("- " if join == "\n- " else "") + join.join(lines)
    ask = bench.phrase("rec.ask")
    head, request = bench.phrase("rec.head"), f"{ask[0].upper()}{ask[1:]}{'' if ask.endswith('?') else '.'}"
    first, then = (f"{head} {body}", request) if rng.random() < 0.6 else (request, f"{head} {body}")
    return f"{first}\n{then}"


def _slots(bench: Bench, truth: Difference) -> dict[str, str]:
    def shown(value: int) -> str:
        plain = write_amount(bench.rng, money.text(value))
        return plain.strip("EUR €")

    debit, credit = truth.booked
    entries = (*truth.entries, "", "")
    return {
        "ref": truth.doc,
        "party": truth.party,
        "date": truth.date,
        "gap": shown(truth.gap),
        "amount": shown(truth.gap),
        "half": shown(truth.gap // 2),
        "bank": {Kind.UNMATCHED_RECEIPT: truth.debit, Kind.TIMING_DIFFERENCE: credit}.get(truth.kind, truth.credit),
        "ar": truth.credit,
        "dr": debit,
        "cr": credit,
        "right": truth.debit,
        "je1": entries[0],
        "je2": entries[1],
        "line": entries[1],
        "cleared": truth.cleared,
    }


def proposal_reply(arguments: dict[str, str], result: dict[str, Any]) -> Reply:
    """The closing answer after the trial posting."""
    ref, kind, amount = arguments["ref"], arguments["kind"].replace("_", " "), arguments["amount"]
    if arguments["debit"] == "none":
        answer = Answer(
            Decision.PROPOSE,
            f"{ref} is a timing difference; nothing is to be posted now.",
            (("amount", amount),),
            (ref,),
            ("Check the bank line next month.",),
        )
        return Reply(answer, "REC-01", f"{ref}: timing, no entry.", "the bank clears it later", "a lost cheque", ref)
    summary = f"Trial entry {result['proposal']} clears the {kind} on {ref}."
    answer = Answer(
        Decision.PROPOSE,
        summary,
        (("amount", amount),),
        (ref, result["proposal"]),
        (f"Get {result['approval']} approval for {result['proposal']}.",),
    )
    return Reply(
        answer,
        "JNL-03",
        f"{ref}: {kind}, {amount}.",
        _CAUSES[Kind(arguments["kind"])],
        "wrong month-end figures",
        result["proposal"],
    )
