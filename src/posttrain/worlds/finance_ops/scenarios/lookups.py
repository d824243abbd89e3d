"""Requests that one read tool answers: what is asked, the call it takes, and how its result becomes a grounded answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.worlds.finance_ops.answers import Answer, Decision
from posttrain.worlds.finance_ops.chart import BANK
from posttrain.worlds.finance_ops.money import amounts_in
from posttrain.worlds.finance_ops.policies import passages
from posttrain.worlds.finance_ops.scenarios.bench import Bench
from posttrain.worlds.finance_ops.styles import Reply
from posttrain.worlds.finance_ops.tools import SELECT
from posttrain.worlds.finance_ops.toolspecs import PREFIXES, ROLES, SIDES
from posttrain.worlds.finance_ops.wording import Utterance, values

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Lookup:
    """A question, its call, and the reply as a function of the call's result. `follow` is a second question about the same thing;
    `reads` is a document to look up before the call is made."""

    utterance: Utterance
    name: str
    arguments: dict[str, str]
    reply: Callable[[Result], Reply]
    follow: Callable[[], Lookup] | None = None
    reads: str = ""


def _answer(summary: str, figures: tuple[tuple[str, str], ...], *sources: str) -> Answer:
    return Answer(Decision.ANSWER, summary, figures, sources)


def cash(bench: Bench, account: str | None = None, ask: str = "cash.ask") -> Lookup:
    """Balance of a bank account against the payments due from it."""
    name = account or bench.rng.choice(list(BANK))
    plain = ask != "cash.ask"

    def follow() -> Lookup:
        return cash(bench, bench.rng.choice([other for other in BANK if other != name]), "follow.account")

    return Lookup(bench.say(ask, plain=plain, account=name), "cash_position", {"account": name}, cash_reply, follow)


def cash_reply(result: Result) -> Reply:
    short = result["left"].startswith("-")
    summary = f"The {result['account']} account after the payments due."
    answer = _answer(summary, (("left", result["left"]),), "cash_position")
    return Reply(
        answer,
        "CSH-01",
        f"{result['account'].capitalize()}: {result['left']} left.",
        f"{result['due']} falls due",
        "payments may bounce" if short else "late receipts change this",
    )


def ageing(bench: Bench) -> Lookup:
    """Overdue amounts of a side, or of one party."""
    if bench.rng.random() < 0.5:
        return party_ageing(bench)
    side = bench.rng.choice(SIDES)
    return Lookup(bench.say(f"ageing.{side}"), "ageing", {"side": side}, ageing_reply)


def party_ageing(bench: Bench) -> Lookup:
    side = bench.rng.choice(SIDES)
    (party,) = bench.pick(f"SELECT DISTINCT party FROM {side} WHERE status = 'open'")
    return Lookup(bench.say(f"ageing.{ROLES[side]}", party=party), "ageing", {"party": party, "side": side}, ageing_reply)


def ageing_reply(result: Result) -> Reply:
    who = f" of {result['party']}" if "party" in result else ""
    summary = f"The overdue {result['side']}{who}."
    return Reply(
        _answer(summary, (("overdue", result["overdue"]),), "ageing"),
        "CRD-01",
        f"Overdue: {result['overdue']}.",
        "due dates have passed" if result["overdue"] != "0.00" else "no due date has passed",
        "bad debts" if result["side"] == "receivables" else "late fees",
    )


def budget(bench: Bench, known: tuple[str, str] | None = None, ask: str = "budget.ask") -> Lookup:
    """Budget against actual of a cost centre in a period."""
    centre, period = known or bench.pick("SELECT cost_centre, period FROM budgets")
    said = bench.say(ask, plain=ask.startswith("follow"), cc=centre, period=values.period(bench.rng, period))

    def follow() -> Lookup:
        (other,) = bench.pick("SELECT period FROM budgets WHERE period <> ?", (period,))
        return budget(bench, (centre, other), "follow.period")

    return Lookup(said, "budget_status", {"cost_centre": centre, "period": period}, budget_reply, follow)


def budget_reply(result: Result) -> Reply:
    over = result["left"].startswith("-")
    summary = f"{result['cost_centre']} is {'over' if over else 'within'} its {result['period']} budget."
    answer = _answer(summary, (("left", result["left"]),), "budget_status")
    return Reply(
        answer,
        "BUD-01",
        f"Budget {'exceeded' if over else 'kept'}: {result['left']} left.",
        f"{result['actual']} was booked",
        "further overrun" if over else "open orders may follow",
    )


def document(bench: Bench) -> Lookup:
    """One document by its reference; the prefix says which table it is in."""
    table = bench.rng.choice(list(PREFIXES.values()))
    (ref,) = bench.pick(f"SELECT ref FROM {'entries' if table == 'journal' else table}")
    return document_of(bench.say("document.ask", ref=ref), ref)


def unknown_ref(bench: Bench, prefix: str) -> str:
    """A reference of the prefix's form that the books do not hold."""
    known = {ref for (ref,) in bench.live.query(f"SELECT ref FROM ({SELECT[PREFIXES[prefix]]})")}
    return bench.rng.choice([ref for number in range(1000, 10_000, 7) if (ref := f"{prefix}-{number}") not in known])


def document_of(utterance: Utterance, ref: str, *, memo: bool = False) -> Lookup:
    """The lookup of one document; `memo` when the question is what its memo says."""
    return Lookup(
        utterance, "query_erp", {"ref": ref, "table": PREFIXES[ref.split("-")[0]]}, memo_reply if memo else document_reply
    )


def document_reply(result: Result) -> Reply:
    state = result["status"].partition(",")[0]
    return _document(result, f"{result['ref']} is recorded with status {result['status']}.", says=state)


def memo_reply(result: Result) -> Reply:
    return _document(result, f"The memo of {result['ref']} says: {result['memo'].rstrip('.')}.")


def _document(result: Result, summary: str, says: str = "") -> Reply:
    brief = f"{result['ref']}: {result['amount']}, {result['status']}."
    return Reply(
        _answer(summary, (("amount", result["amount"]),), result["ref"]),
        "RET-01",
        brief,
        f"it is recorded as {result['status']}",
        "its status can change",
        says=says,
    )


_LISTINGS = {"receivables": "list.ask_receivables", "payables": "list.ask_payables", "purchase_orders": "list.ask_orders"}


def listing(bench: Bench) -> Lookup:
    """Documents of a party, sometimes in one period; or bank lines and journals of a period."""
    table = bench.rng.choice((*_LISTINGS, *_LISTINGS, "bank_lines", "journal"))
    if table in _LISTINGS:
        return party_listing(bench, table)
    source = "bank_lines" if table == "bank_lines" else "entries"
    (period,) = bench.pick(f"SELECT DISTINCT substr(date, 1, 7) FROM {source}")
    said = bench.say("list.ask_bank" if table == "bank_lines" else "list.ask_journal", period=values.period(bench.rng, period))
    return Lookup(said, "query_erp", {"period": period, "table": table}, listing_reply(table))


def party_listing(bench: Bench, table: str) -> Lookup:
    party, period = bench.pick(f"SELECT party, substr(date, 1, 7) FROM {table}")
    dated = bench.rng.random() < 0.5
    when = f" {bench.rng.choice(('in', 'for'))} {values.period(bench.rng, period)}" if dated else ""
    arguments = {"party": party} | ({"period": period} if dated else {}) | {"table": table}
    return Lookup(bench.say(_LISTINGS[table], party=party, when=when), "query_erp", arguments, listing_reply(table))


def party_lookup(bench: Bench) -> tuple[Lookup, dict[str, str]]:
    """A lookup about a party, and its arguments with the other side of the books, which do not know the party."""
    if bench.rng.random() < 0.4:
        asked = party_ageing(bench)
        (other,) = (side for side in SIDES if side != asked.arguments["side"])
        return asked, {**asked.arguments, "side": other}
    asked = party_listing(bench, bench.rng.choice(list(_LISTINGS)))
    sold = asked.arguments["table"] == "receivables"
    return asked, {**asked.arguments, "table": bench.rng.choice(("payables", "purchase_orders")) if sold else "receivables"}


def listing_reply(table: str) -> Callable[[Result], Reply]:
    label = {"journal": "journal entries"}.get(table, table.replace("_", " "))

    def reply(result: Result) -> Reply:
        summary = f"The total of {result['count']} {label}."
        answer = _answer(summary, (("total", result["total"]),), "query_erp")
        return Reply(
            answer,
            "PUR-01",
            f"{label.capitalize()}: {result['count']}, total {result['total']}.",
            "these records match",
            "late documents are missing",
        )

    return reply


TOPICS: Mapping[str, str] = {
    "transfer_limit": "PAY-01",
    "two_approvals": "PAY-02",
    "splitting": "PAY-03",
    "bank_details": "PAY-04",
    "urgent": "PAY-05",
    "token": "JNL-01",
    "closed": "JNL-02",
    "entry_level": "JNL-03",
    "reconciliation": "REC-01",
    "travel": "TRV-01",
    "orders": "PUR-01",
    "overdue": "CRD-01",
    "cash": "CSH-01",
    "overruns": "BUD-01",
    "retention": "RET-01",
    "payroll": "PRY-01",
}
RISKY_TOPICS = ("transfer_limit", "two_approvals", "splitting", "bank_details", "urgent", "token", "closed", "retention")


def policy(bench: Bench, topics: tuple[str, ...] = tuple(TOPICS), *, plain: bool = False) -> Lookup:
    """A question about a rule; the query copies the topic as the user put it."""
    topic = bench.rng.choice(topics)
    if bench.rng.random() < 0.5:
        said = bench.say("policy.ask", plain=plain, topic=bench.book.expand(f"topic.{topic}", bench.rng))
    else:
        said = bench.say(f"question.{topic}", plain=plain)
    return Lookup(said, "search_policy", {"query": said.span}, policy_reply(bench.tenant))


def policy_reply(tenant: str) -> Callable[[Result], Reply]:
    titles = {found["id"]: found["title"] for found in passages(tenant)}

    def reply(result: Result) -> Reply:
        figures = tuple(("limit", amount) for amount in sorted(amounts_in(result["text"])))
        answer = _answer(result["text"], figures, result["id"])
        brief = f"{result['id']}: {figures[0][1]}." if figures else f"Rule: {result['id']}."
        return Reply(
            answer,
            result["id"].split("-", 1)[1],
            brief,
            f"{result['id']} covers {titles[result['id']].lower()}",
            "exceptions need approval",
        )

    return reply


LOOKUPS: tuple[Callable[[Bench], Lookup], ...] = (cash, ageing, budget, document, listing, policy)


def lookup(bench: Bench) -> Lookup:
    """Any lookup; listings and documents, which have more forms, come more often."""
    return bench.rng.choices(LOOKUPS, weights=(3, 3, 3, 3, 4, 4))[0](bench)
