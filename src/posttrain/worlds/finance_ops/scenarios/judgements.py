"""Requests answered from the facts they give: questions on a list, and advice with evidence and ordered actions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from posttrain.worlds.finance_ops import money
from posttrain.worlds.finance_ops.answers import Answer, Decision
from posttrain.worlds.finance_ops.differences import odd_amount
from posttrain.worlds.finance_ops.calendar import after, shift
from posttrain.worlds.finance_ops.chart import BANK
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
    answer = Answer(Decision.ANSWER, f"The amount of {ref} is {value}.", (("amount", value),), (ref,))
    reply = Reply(answer, "RET-01", f"{ref}: {value}.", "the list says so", "the list may be incomplete")
    return Question(text, reply, (ref, party, value), value, ref)


def _overdue(bench: Bench) -> Question:
    ref, party, amount, due = bench.pick("SELECT ref, party, amount, due FROM receivables WHERE status = 'open'")
    value = money.text(amount)
    steps = (f"Confirm with {party} that {ref} is undisputed.", f"Send a reminder over {value}.", "Block new orders if it stays unpaid.")
    return _advice(bench, "overdue", {"ref": ref, "party": party, "amount": value, "date": due}, f"{party} is overdue with {value} on {ref}.",
                   steps, ("CRD-01", f"Overdue: {value} on {ref}.", f"it was due on {due}", "bad debt"))  # fmt: skip


def _overrun(bench: Bench) -> Question:
    centre, period = bench.pick("SELECT cost_centre, period FROM budgets")
    value, ref = money.text(odd_amount(bench.rng)), f"REP-{bench.rng.randint(1000, 9999)}"
    steps = (f"Check the largest postings of {centre} in {period}.", f"Request approval for the overrun of {value}.", f"Report {ref} to the budget owner.")
    slots = {"ref": ref, "cc": centre, "amount": value, "period": period}
    return _advice(bench, "overrun", slots, f"{centre} is {value} over budget in {period}.", steps,
                   ("BUD-01", f"Overrun: {value}.", f"{ref} shows it", "further overrun"))  # fmt: skip


def _short(bench: Bench) -> Question:
    account, ref = bench.rng.choice(list(BANK)), f"STM-{bench.rng.randint(1000, 9999)}"
    value, date = money.text(odd_amount(bench.rng)), after(f"{shift(bench.facts.period, 1)}-01", bench.rng.randint(0, 20))
    steps = (f"Confirm the payments due on {date}.", f"Request two approvals to move {value} to {account}.", f"Report {ref} to treasury.")
    slots = {"ref": ref, "account": account, "amount": value, "date": date}
    return _advice(bench, "short", slots, f"The {account} account is {value} short on {date}.", steps,
                   ("CSH-01", f"{account.capitalize()} short: {value}.", f"{ref} shows it", "payments may bounce"))  # fmt: skip


def _twice(bench: Bench) -> Question:
    ref, party, amount = bench.pick("SELECT ref, party, amount FROM payables WHERE status = 'open'")
    other, value = f"BILL-{bench.rng.randint(1000, 9999)}", money.text(amount)
    steps = (f"Compare {ref} and {other} with {party}.", f"Reverse {other} over {value}.", f"Report the case to {party}.")
    slots = {"ref": ref, "ref2": other, "party": party, "amount": value}
    return _advice(bench, "twice", slots, f"{other} looks like a second {ref} of {value} from {party}.", steps,
                   ("PUR-01", f"Duplicate: {other} repeats {ref}.", "amount and vendor agree", "double payment"))  # fmt: skip


def _no_order(bench: Bench) -> Question:
    ref, party, amount = bench.pick("SELECT ref, party, amount FROM payables WHERE status = 'open'")
    value = money.text(amount)
    steps = (f"Ask who ordered {ref} from {party}.", f"Release {value} once the order is approved.", "File the order with the bill.")
    return _advice(bench, "no_order", {"ref": ref, "party": party, "amount": value}, f"{ref} over {value} from {party} has no purchase order.",
                   steps, ("PUR-01", f"No order: {ref}.", "nobody recorded the order", "unordered goods"))  # fmt: skip


_ADVICE: tuple[Callable[[Bench], Question], ...] = (_overdue, _overrun, _short, _twice, _no_order)


def _advice(bench: Bench, name: str, slots: dict[str, str], summary: str, steps: tuple[str, str, str], style: tuple[str, str, str, str]) -> Question:
    rng = bench.rng
    shown = slots | {"amount": values.amount(rng, slots["amount"])}
    if "period" in slots:
        shown["period"] = values.period(rng, slots["period"])
    fact, ask = bench.phrase(f"advise.{name}", **shown), bench.phrase("advise.ask")
    text = f"{fact[0].upper()}{fact[1:]}. {ask[0].upper()}{ask[1:]}" if rng.random() < 0.8 else f"{ask[0].upper()}{ask[1:]} {fact[0].upper()}{fact[1:]}."
    value, ref = slots["amount"], slots["ref"]
    answer = Answer(Decision.PROPOSE, summary, (("amount", value),), (ref,), steps[: 3 if rng.random() < 0.3 else 2])
    topic, brief, cause, risk = style
    evidence = tuple(slots.values())
    return Question(text, Reply(answer, topic, brief, cause, risk, ref), evidence, value, ref)


def advise(bench: Bench) -> Question:
    """A situation with facts; the good answer names figure and source and gives actions in order: check first, then act."""
    return bench.rng.choice(_ADVICE)(bench)


_VAGUE_SUMMARIES = (
    "There may be an issue here that needs attention.", "This looks like something the team should review in more detail.",
    "The situation is not ideal and should be watched closely over the next days.", "Some follow-up seems useful.",
    "It is hard to say more at this point, but a careful look at everything would certainly be a good idea.", "This needs a closer look.",
)  # fmt: skip
_VAGUE_STEPS = (
    "Review the matter.", "Follow up as needed.", "Keep an eye on it.", "Talk to the people involved.", "Take suitable measures when the time comes.",
    "Consider all options carefully.", "Improve the process.", "Stay in contact with everyone concerned.",
    "Make sure that such things do not happen again in the future.", "Discuss the topic in one of the next team meetings.",
    "Decide later, depending on how the situation develops over time.", "Inform whoever may need to know about it.",
)  # fmt: skip


def vague(bench: Bench, good: Answer, *, steps: int = 2) -> Answer:
    """The same decision without evidence or concrete actions."""
    return Answer(good.decision, bench.rng.choice(_VAGUE_SUMMARIES), (), (), tuple(bench.rng.sample(_VAGUE_STEPS, steps)))


def toothless(bench: Bench, good: Answer, *, steps: int = 2) -> Answer:
    """Evidence is there, the actions are empty."""
    return good.but(next_steps=tuple(bench.rng.sample(_VAGUE_STEPS, steps)))


def unsupported(bench: Bench, good: Answer) -> Answer:
    """Actions without figure or source, under a vague summary."""
    return good.but(summary=bench.rng.choice(_VAGUE_SUMMARIES), figures=(), sources=())


def disordered(good: Answer) -> Answer:
    """Evidence is there, but acting comes before checking."""
    return good.but(next_steps=good.next_steps[::-1])


def burden(answer: Answer) -> float:
    """Length as a reader of tokens pays it: a digit each, other text four characters to one."""
    text = answer.json()
    digits = sum(letter.isdigit() for letter in text)
    return digits + (len(text) - digits) / 4


def worse(bench: Bench, good: Answer, index: int) -> Answer:
    """A worse answer of similar length: longer than the good one for even `index`, shorter for odd, so that length tells nothing."""
    if bench.rng.random() < 0.15:
        return disordered(good)
    pool = [vague(bench, good, steps=steps) for steps in (1, 2, 3, 3, 4, 4, 4, 4)]
    pool += [toothless(bench, good, steps=steps) for steps in (1, 2, 2, 3, 3)] + [unsupported(bench, good) for _ in range(2)]
    target = burden(good) * (1 + (1 if index % 2 == 0 else -1) * bench.rng.uniform(0.02, 0.15))
    return min(pool, key=lambda answer: abs(burden(answer) - target))
