"""Requests answered from the facts they give: questions on a list, and advice with evidence and ordered actions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from posttrain.worlds.finance_ops import money
from posttrain.worlds.finance_ops.answers import Answer, Decision
from posttrain.worlds.finance_ops.calendar import after, shift
from posttrain.worlds.finance_ops.chart import BANK
from posttrain.worlds.finance_ops.differences import odd_amount
from posttrain.worlds.finance_ops.scenarios.bench import Bench
from posttrain.worlds.finance_ops.styles import Reply
from posttrain.worlds.finance_ops.wording import values


@dataclass(frozen=True, slots=True)
class Question:
    """A request with its facts, the reply, and the items (refs, names, amounts) that count as evidence."""

    text: str
    reply: Reply
    evidence: tuple[str, ...]
    amount: str
    ref: str


def facts(bench: Bench) -> Question:
    """Read one amount off a list of two or three documents."""
    rng, table = bench.rng, bench.rng.choice(("receivables", "payables", "purchase_orders"))
    rows = bench.live.query(f"SELECT ref, party, amount FROM {table} GROUP BY party")
    rows = rng.sample(rows, min(len(rows), rng.choice((2, 3))))
    ref, party, amount = rng.choice(rows)
    layout = rng.choice(("{0} {1} {2}", "{0}, {1}, {2}", "{0}: {2} ({1})", "{1} | {0} | {2}", "{0} of {1} is {2}"))
    listed = rng.choice(("\n", "; ")).join(layout.format(row[0], row[1], values.amount(rng, money.text(row[2]))) for row in rows)
    ask = bench.say(rng.choice(("facts.ask_amount", "facts.ask_party")), plain=True, ref=ref, party=party).text
    head = bench.phrase("facts.head")
    text = f"{head} {listed}\n{ask}" if rng.random() < 0.7 else f"{ask} {head} {listed}"
    value = money.text(amount)
    answer = Answer(Decision.ANSWER, f"The amount of {ref}.", (("amount", value),), (ref,))
    reply = Reply(answer, "RET-01", f"{ref}: {value}.", "the list says so", "the list may be incomplete")
    return Question(text, reply, (ref, party, value), value, ref)


def _overdue(bench: Bench) -> Question:
    ref, party, amount, due = bench.pick("SELECT ref, party, amount, due FROM receivables WHERE status = 'open'")
    value = money.text(amount)
    steps = (
        f"Confirm with {party} that {ref} is undisputed.",
        bench.rng.choice((f"Send a reminder over {value}.", f"Send a reminder for {ref}.")),
        "Block new orders if it stays unpaid.",
    )
    return _advice(
        bench,
        "overdue",
        {"ref": ref, "party": party, "amount": value, "date": due},
        f"{party} is overdue with {value} on {ref}.",
        steps,
        ("CRD-01", f"Overdue: {value} on {ref}.", f"it was due on {due}", "bad debt"),
    )


def _overrun(bench: Bench) -> Question:
    centre, period = bench.pick("SELECT cost_centre, period FROM budgets")
    value, ref = money.text(odd_amount(bench.rng)), f"REP-{bench.rng.randint(1000, 9999)}"
    steps = (
        f"Check the largest postings of {centre} in {period}.",
        bench.rng.choice((f"Request approval for the overrun of {value}.", f"Request approval of {ref}.")),
        f"Report {ref} to the budget owner.",
    )
    slots = {"ref": ref, "cc": centre, "amount": value, "period": period}
    return _advice(
        bench,
        "overrun",
        slots,
        f"{centre} is {value} over budget in {period}.",
        steps,
        ("BUD-01", f"Overrun: {value}.", f"{ref} shows it", "further overrun"),
    )


def _short(bench: Bench) -> Question:
    account, ref = bench.rng.choice(list(BANK)), f"STM-{bench.rng.randint(1000, 9999)}"
    value, date = money.text(odd_amount(bench.rng)), after(f"{shift(bench.facts.period, 1)}-01", bench.rng.randint(0, 20))
    steps = (
        f"Confirm the payments due on {date}.",
        bench.rng.choice((f"Request two approvals to move {value} to {account}.", f"Request two approvals to fund {account}.")),
        f"Report {ref} to treasury.",
    )
    slots = {"ref": ref, "account": account, "amount": value, "date": date}
    return _advice(
        bench,
        "short",
        slots,
        f"The {account} account is {value} short on {date}.",
        steps,
        ("CSH-01", f"{account.capitalize()} short: {value}.", f"{ref} shows it", "payments may bounce"),
    )


def _twice(bench: Bench) -> Question:
    ref, party, amount = bench.pick("SELECT ref, party, amount FROM payables WHERE status = 'open'")
    other, value = f"BILL-{bench.rng.randint(1000, 9999)}", money.text(amount)
    steps = (
        f"Compare {ref} and {other} with {party}.",
        bench.rng.choice((f"Reverse {other} over {value}.", f"Reverse {other}.")),
        f"Report the case to {party}.",
    )
    slots = {"ref": ref, "ref2": other, "party": party, "amount": value}
    return _advice(
        bench,
        "twice",
        slots,
        f"{other} looks like a second {ref} of {value} from {party}.",
        steps,
        ("PUR-01", f"Duplicate: {other} repeats {ref}.", "amount and vendor agree", "double payment"),
    )


def _no_order(bench: Bench) -> Question:
    ref, party, amount = bench.pick("SELECT ref, party, amount FROM payables WHERE status = 'open'")
    value = money.text(amount)
    steps = (
        f"Ask who ordered {ref} from {party}.",
        bench.rng.choice((f"Release {value} once the order is approved.", f"Release {ref} once it is approved.")),
        "File the order with the bill.",
    )
    return _advice(
        bench,
        "no_order",
        {"ref": ref, "party": party, "amount": value},
        f"{ref} over {value} from {party} has no purchase order.",
        steps,
        ("PUR-01", f"No order: {ref}.", "nobody recorded the order", "unordered goods"),
    )


_ADVICE: tuple[Callable[[Bench], Question], ...] = (_overdue, _overrun, _short, _twice, _no_order)


def _advice(
    bench: Bench, name: str, slots: dict[str, str], summary: str, steps: tuple[str, str, str], style: tuple[str, str, str, str]
) -> Question:
    rng = bench.rng
    shown = slots | {"amount": values.amount(rng, slots["amount"])}
    if "period" in slots:
        shown["period"] = values.period(rng, slots["period"])
    fact, ask = bench.phrase(f"advise.{name}", **shown), bench.phrase("advise.ask")
    text = (
        f"{fact[0].upper()}{fact[1:]}. {ask[0].upper()}{ask[1:]}"
        if rng.random() < 0.8
        else f"{ask[0].upper()}{ask[1:]} {fact[0].upper()}{fact[1:]}."
    )
    value, ref = slots["amount"], slots["ref"]
    answer = Answer(Decision.PROPOSE, summary, (("amount", value),), (ref,), steps[: 3 if rng.random() < 0.2 else 2])
    topic, brief, cause, risk = style
    evidence = tuple(slots.values())
    return Question(text, Reply(answer, topic, brief, cause, risk, ref), evidence, value, ref)


def advise(bench: Bench) -> Question:
    """A situation with facts; the good answer names figure and source and gives actions in order: check first, then act."""
    return bench.rng.choice(_ADVICE)(bench)
