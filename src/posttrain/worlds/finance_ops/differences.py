"""Month-end differences planted in the books, one of each kind. Their truth leaves with the generator: no table holds it."""

from __future__ import annotations

import random
import sqlite3
from dataclasses import dataclass
from enum import StrEnum

from posttrain.worlds.finance_ops.calendar import after, day, last_day
from posttrain.worlds.finance_ops.chart import BANK, FEES, PAYABLES, RECEIVABLES
from posttrain.worlds.finance_ops.ledger import Entry, simple, write


class Kind(StrEnum):
    """Why ledger and evidence disagree at month end."""

    UNMATCHED_RECEIPT = "unmatched_receipt"  # money came in, the ledger does not know it
    DUPLICATE_INVOICE = "duplicate_invoice"  # one bill was booked twice
    WRONG_SIGN = "wrong_sign"  # a bank charge was booked as income
    WRONG_ACCOUNT = "wrong_account"  # a bill sits on another expense account than its coding says
    TIMING_DIFFERENCE = "timing_difference"  # booked in time, the bank shows it days later: nothing to post


NO_ACCOUNT = "none"


@dataclass(frozen=True, slots=True)
class Difference:
    """The truth about one planted difference: where it is, what corrects it, and the figures its evidence shows.

    `amount` is the correcting amount in minor units (0 for timing); `gap` is what the month-end comparison shows;
    `entries` are the journal references involved; `booked` is the account pair (debit, credit) as the ledger has it.
    """

    kind: Kind
    doc: str
    party: str
    debit: str
    credit: str
    amount: int
    gap: int
    date: str
    entries: tuple[str, ...] = ()
    booked: tuple[str, str] = (NO_ACCOUNT, NO_ACCOUNT)
    cleared: str = ""


@dataclass(slots=True)
class Journal:
    """The open connection with counters for the references being handed out."""

    connection: sqlite3.Connection
    rng: random.Random
    counters: dict[str, int]

    def ref(self, prefix: str) -> str:
        step = self.rng.randint(1, 7)
        self.counters[prefix] = self.counters.get(prefix, self.rng.randint(1000, 8600)) + step
        return f"{prefix}-{self.counters[prefix]}"

    def post(
        self,
        doc: str,
        date: str,
        debit: str,
        credit: str,
        amount: int,
        *,
        memo: str = "",
        party: str | None = None,
        cost_centre: str | None = None,
    ) -> str:
        ref = self.ref("JE")
        write(self.connection, Entry(ref, doc, date, memo, simple(debit, credit, amount, cost_centre), party))
        return ref

    def code(self, doc: str, debit: str, credit: str, amount: int) -> None:
        self.connection.executemany("INSERT INTO coding VALUES (?, ?, ?)", [(doc, debit, amount), (doc, credit, -amount)])

    def bank_line(self, bank: str, date: str, amount: int, party: str, memo: str) -> str:
        ref = self.ref("BNK")
        self.connection.execute("INSERT INTO bank_lines VALUES (?, ?, ?, ?, ?, ?)", (ref, bank, date, amount, party, memo))
        return ref

    def bill(self, date: str, party: str, amount: int, account: str, centre: str, *, status: str = "open", memo: str = "") -> str:
        ref = self.ref("BILL")
        row = (ref, party, date, after(date, 30), amount, status, account, centre, memo)
        self.connection.execute("INSERT INTO payables VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        self.code(ref, account, PAYABLES, amount)
        return ref


@dataclass(frozen=True, slots=True)
class Cast:
    """Who may appear in a planted difference."""

    period: str
    customers: tuple[str, ...]
    vendors: tuple[str, ...]
    centres: tuple[str, ...]
    expenses: tuple[str, ...]


def odd_amount(rng: random.Random) -> int:
    """An amount whose size is even on a log scale between 60.00 and 60,000.00, so that approval limits cut it everywhere."""
    return int(10 ** rng.uniform(3.78, 6.78)) + 1


def plant(journal: Journal, cast: Cast) -> tuple[Difference, ...]:
    """Write the five differences into the books of `cast.period`; returns their truth."""
    return (
        _unmatched_receipt(journal, cast),
        _duplicate_invoice(journal, cast),
        _wrong_sign(journal, cast),
        _wrong_account(journal, cast),
        _timing_difference(journal, cast),
    )


def _unmatched_receipt(journal: Journal, cast: Cast) -> Difference:
    rng, amount = journal.rng, odd_amount(journal.rng)
    date, party = day(cast.period, rng.randint(20, 30)), rng.choice(cast.customers)
    doc = journal.bank_line("operating", date, amount, party, "incoming transfer")
    bank = BANK["operating"]
    journal.code(doc, bank, RECEIVABLES, amount)
    return Difference(Kind.UNMATCHED_RECEIPT, doc, party, bank, RECEIVABLES, amount, amount, date)


def _duplicate_invoice(journal: Journal, cast: Cast) -> Difference:
    rng, amount = journal.rng, odd_amount(journal.rng)
    date, party, expense, centre = (
        day(cast.period, rng.randint(3, 20)),
        rng.choice(cast.vendors),
        rng.choice(cast.expenses),
        rng.choice(cast.centres),
    )
    doc = journal.bill(date, party, amount, expense, centre, memo="regular supply")
    entries = tuple(
        journal.post(doc, after(date, delay), expense, PAYABLES, amount, memo="bill", party=party, cost_centre=centre)
        for delay in (0, 4)
    )
    return Difference(Kind.DUPLICATE_INVOICE, doc, party, PAYABLES, expense, amount, amount, date, entries, (expense, PAYABLES))


def _wrong_sign(journal: Journal, cast: Cast) -> Difference:
    amount, bank = odd_amount(journal.rng) // 2, BANK["operating"]
    date = day(cast.period, journal.rng.randint(24, 30))
    doc = journal.bank_line("operating", date, -amount, "bank", "bank charge")
    journal.code(doc, FEES, bank, amount)
    entry = journal.post(doc, date, bank, FEES, amount, memo="bank charge", cost_centre=journal.rng.choice(cast.centres))
    return Difference(Kind.WRONG_SIGN, doc, "bank", FEES, bank, 2 * amount, 2 * amount, date, (entry,), (bank, FEES))


def _wrong_account(journal: Journal, cast: Cast) -> Difference:
    rng, amount = journal.rng, odd_amount(journal.rng)
    date, party, centre = day(cast.period, rng.randint(3, 26)), rng.choice(cast.vendors), rng.choice(cast.centres)
    right, wrong = rng.sample(cast.expenses, 2)
    doc = journal.bill(date, party, amount, right, centre, memo="regular supply")
    entry = journal.post(doc, date, wrong, PAYABLES, amount, memo="bill", party=party, cost_centre=centre)
    return Difference(Kind.WRONG_ACCOUNT, doc, party, right, wrong, amount, amount, date, (entry,), (wrong, PAYABLES))


def _timing_difference(journal: Journal, cast: Cast) -> Difference:
    rng, amount, bank = journal.rng, odd_amount(journal.rng), BANK["operating"]
    date, party = last_day(cast.period), rng.choice(cast.vendors)
    doc, cleared = journal.ref("CHQ"), after(date, rng.randint(1, 4))
    journal.code(doc, PAYABLES, bank, amount)
    entry = journal.post(doc, date, PAYABLES, bank, amount, memo="cheque sent", party=party)
    line = journal.bank_line("operating", cleared, -amount, party, f"cheque {doc}")
    return Difference(
        Kind.TIMING_DIFFERENCE, doc, party, NO_ACCOUNT, NO_ACCOUNT, 0, amount, date, (entry, line), (PAYABLES, bank), cleared
    )
