"""Double-entry arithmetic over the database: write balanced entries, measure balances and differences."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from posttrain.errors import DataError


@dataclass(frozen=True, slots=True)
class Line:
    """One ledger line: `amount` in minor units, debit > 0, credit < 0."""

    account: str
    amount: int
    cost_centre: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A journal entry to write. `doc` is the source document; its lines must sum to zero."""

    ref: str
    doc: str
    date: str
    memo: str
    lines: tuple[Line, ...]
    party: str | None = None
    state: str = "posted"


@cache
def schema_sql() -> str:
    return files(__package__).joinpath("schema.sql").read_text(encoding="utf-8")


def simple(debit: str, credit: str, amount: int, cost_centre: str | None = None) -> tuple[Line, Line]:
    """Debit one account, credit another. The cost centre follows expense accounts (codes from 6000)."""
    return (
        Line(debit, amount, cost_centre if debit >= "6" else None),
        Line(credit, -amount, cost_centre if credit >= "6" else None),
    )


def write(connection: sqlite3.Connection, entry: Entry) -> int:
    """Insert an entry and its lines; returns its row id. Raises DataError when it does not balance."""
    total = sum(line.amount for line in entry.lines)
    if total != 0 or not entry.lines:
        raise DataError("journal entry does not balance", where=entry.ref, value=total, remedy="debits must equal credits")
    cursor = connection.execute(
        "INSERT INTO entries (ref, doc, date, period, party, memo, state) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (entry.ref, entry.doc, entry.date, entry.date[:7], entry.party, entry.memo, entry.state),
    )
    row = int(cursor.lastrowid or 0)
    connection.executemany(
        "INSERT INTO lines (entry, account, cost_centre, amount) VALUES (?, ?, ?, ?)",
        [(row, line.account, line.cost_centre, line.amount) for line in entry.lines],
    )
    return row


def next_ref(connection: sqlite3.Connection, prefix: str) -> str:
    """The next free reference of a prefix over entries and drafts: JE-2041 -> JE-2042."""
    (last,) = connection.execute(
        "SELECT MAX(CAST(substr(ref, ?) AS INTEGER)) FROM (SELECT ref FROM entries UNION ALL SELECT ref FROM drafts) WHERE ref LIKE ?",
        (len(prefix) + 2, f"{prefix}-%"),
    ).fetchone()
    return f"{prefix}-{(last or 100) + 1}"


DIFFERENCE_SQL = """
SELECT account, SUM(booked) - SUM(coded) FROM (
  SELECT account, amount AS coded, 0 AS booked FROM coding WHERE doc = ?
  UNION ALL
  SELECT l.account, 0, l.amount FROM lines l JOIN entries e ON e.id = l.entry WHERE e.doc = ?
) GROUP BY account HAVING SUM(booked) <> SUM(coded) ORDER BY account
"""


def differences(rows: Sequence[tuple[str, int]]) -> int:
    """What is left to correct for one document, in minor units: half the sum of absolute account gaps (debit = credit)."""
    return sum(abs(gap) for _, gap in rows) // 2


def document_difference(connection: sqlite3.Connection, doc: str) -> int:
    """Ledger (trial postings included) against the document's coding."""
    return differences(connection.execute(DIFFERENCE_SQL, (doc, doc)).fetchall())


def trial_balance(connection: sqlite3.Connection) -> dict[str, int]:
    """Balance per account over posted entries; the values sum to zero."""
    return dict(
        connection.execute(
            "SELECT l.account, SUM(l.amount) FROM lines l JOIN entries e ON e.id = l.entry WHERE e.state = 'posted' GROUP BY l.account"
        ).fetchall()
    )
