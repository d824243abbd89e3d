"""The tools' work over SQL. Each takes the open database and checked arguments and returns a small object, or raises ToolError."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.worlds.finance_ops import money
from posttrain.worlds.finance_ops.calendar import after, last_day
from posttrain.worlds.finance_ops.differences import NO_ACCOUNT, Kind
from posttrain.worlds.finance_ops.ledger import Entry, document_difference, next_ref, simple, write
from posttrain.worlds.finance_ops.toolspecs import DRAFT, ROLES

Arguments = Mapping[str, Any]
Result = dict[str, Any]
SHOWN = 2  # rows of a listing that are spelled out


class ToolError(Exception):
    """A refused or failed call: `code` for programs, the message for the model."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


# One SELECT per table, all with the columns (ref, party, date, amount, note).
SELECT = {
    "receivables": "SELECT ref, party, date, amount, status AS note, memo FROM receivables",
    "payables": "SELECT ref, party, date, amount, status AS note, memo FROM payables",
    "purchase_orders": "SELECT ref, party, date, amount, status AS note, memo FROM purchase_orders",
    "bank_lines": "SELECT ref, party, date, amount, 'cleared' AS note, memo FROM bank_lines",
    "payment_requests": (
        "SELECT ref, party, '' AS date, amount, CASE WHEN status <> 'open' THEN status WHEN given >= 2 THEN 'approved' "
        "ELSE 'not approved, ' || given || ' of 2 signed' END AS note, '' AS memo FROM (SELECT p.*, "
        "(SELECT COUNT(DISTINCT approver) FROM approvals a WHERE a.ref = p.ref) AS given FROM payment_requests p)"
    ),
    "journal": (
        "SELECT e.ref, e.party, e.date, SUM(MAX(l.amount, 0)) AS amount, e.state AS note, e.memo FROM entries e "
        "JOIN lines l ON l.entry = e.id GROUP BY e.id"
    ),
}


def query_erp(db: sqlite3.Connection, arguments: Arguments) -> Result:
    """One document by ref with its memo, or a listing with count and total."""
    table = arguments["table"]
    filters = {key: arguments[key] for key in ("ref", "party", "period") if arguments.get(key)}
    if not filters:
        raise ToolError("no_filter", "give ref, party or period")
    column = {"ref": "ref = ?", "party": "party = ? COLLATE NOCASE", "period": "substr(date, 1, 7) = ?"}
    sql = f"SELECT * FROM ({SELECT[table]}) WHERE {' AND '.join(column[key] for key in filters)} ORDER BY date, ref"
    rows = db.execute(sql, tuple(filters.values())).fetchall()
    if not rows:
        raise _not_found(db, table, filters)
    if "ref" in filters:
        ref, party, date, amount, note, memo = rows[0]
        found = {"ref": ref, "party": party, "date": date, "amount": money.text(amount), "status": note, "memo": memo}
        return {key: value for key, value in found.items() if value}
    shown = [f"{row[0]} {money.text(row[3])} {row[4]}" for row in rows[:SHOWN]]
    return {"count": len(rows), "total": money.text(sum(row[3] for row in rows)), "rows": shown}


def _role_of(db: sqlite3.Connection, party: str | None) -> str | None:
    found = db.execute("SELECT side FROM parties WHERE name = ? COLLATE NOCASE", (party,)).fetchone()
    return str(found[0]) if found else None


def _not_found(db: sqlite3.Connection, table: str, filters: Arguments) -> ToolError:
    """Who looks up a party on the wrong side of the books is told what the party is."""
    party = filters.get("party")
    role = _role_of(db, party)
    if role and role != ROLES.get(table, role):
        return ToolError("not_found", f"{party} is a {role}: no {table}")
    return ToolError("not_found", f"no {table} for {', '.join(filters.values())}")


def cash_position(db: sqlite3.Connection, arguments: Arguments) -> Result:
    """Bank balance of an account, payments scheduled from it, and what is left after them."""
    bank = arguments["account"]
    (balance,) = db.execute("SELECT COALESCE(SUM(amount), 0) FROM bank_lines WHERE bank = ?", (bank,)).fetchone()
    (due,) = db.execute("SELECT COALESCE(SUM(amount), 0) FROM scheduled WHERE bank = ?", (bank,)).fetchone()
    return {"account": bank, "balance": money.text(balance), "due": money.text(due), "left": money.text(balance - due)}


def ageing(db: sqlite3.Connection, arguments: Arguments) -> Result:
    """Open, overdue and more than 30 days overdue amounts at the end of the current period, of one side or one party."""
    side, party = arguments["side"], arguments.get("party")
    today = last_day(current_period(db))
    where, values = ("AND party = ? COLLATE NOCASE", (party,)) if party else ("", ())
    rows = db.execute(f"SELECT due, amount FROM {side} WHERE status = 'open' {where}", values).fetchall()
    if party and _role_of(db, party) != ROLES[side]:
        raise _not_found(db, side, {"party": party})
    overdue = sum(amount for due, amount in rows if due < today)
    old = sum(amount for due, amount in rows if after(due, 30) < today)
    scope = {"party": party} if party else {}
    return {
        "side": side,
        **scope,
        "open": money.text(sum(row[1] for row in rows)),
        "overdue": money.text(overdue),
        "over_30": money.text(old),
    }


def budget_status(db: sqlite3.Connection, arguments: Arguments) -> Result:
    """Budget, actual (posted expense lines of the cost centre) and what is left, negative when overspent."""
    centre, period = arguments["cost_centre"], arguments["period"]
    found = db.execute(
        "SELECT cost_centre, amount FROM budgets WHERE cost_centre = ? COLLATE NOCASE AND period = ?", (centre, period)
    ).fetchone()
    if found is None:
        raise ToolError("not_found", f"no budget for {centre} in {period}")
    (actual,) = db.execute(
        "SELECT COALESCE(SUM(l.amount), 0) FROM lines l JOIN entries e ON e.id = l.entry "
        "WHERE l.cost_centre = ? AND e.period = ? AND e.state = 'posted'",
        (found[0], period),
    ).fetchone()
    return {
        "cost_centre": found[0],
        "period": period,
        "budget": money.text(found[1]),
        "actual": money.text(actual),
        "left": money.text(found[1] - actual),
    }


def propose_entry(db: sqlite3.Connection, arguments: Arguments) -> Result:
    """Post an entry on trial and say what difference of the document remains. Timing differences post nothing."""
    amount, doc = money.minor(arguments["amount"]), arguments["ref"]
    pair = (arguments["debit"], arguments["credit"])
    if db.execute("SELECT 1 FROM coding WHERE doc = ?", (doc,)).fetchone() is None:
        raise ToolError("not_found", f"no document {doc}")
    proposal = next_ref(db, DRAFT)
    if arguments["kind"] == Kind.TIMING_DIFFERENCE:
        if amount or pair != (NO_ACCOUNT, NO_ACCOUNT):
            raise ToolError("bad_entry", "a timing difference posts nothing: accounts none, amount 0.00")
        lines: tuple[Any, ...] = ()
    else:
        known = {code for (code,) in db.execute("SELECT code FROM accounts")}
        if amount <= 0 or pair[0] == pair[1] or not set(pair) <= known:
            raise ToolError("bad_entry", "needs two known accounts and a positive amount")
        lines = simple(*pair, amount)
    if lines:
        write(db, Entry(proposal, doc, last_day(current_period(db)), arguments["kind"], lines, state="trial"))
    return {"proposal": proposal, "balanced": True, "difference": money.text(document_difference(db, doc))}


def post_entry(db: sqlite3.Connection, arguments: Arguments) -> Result:
    """Post a drafted entry. The token must be unused and issued for exactly this draft, and its period open."""
    ref, token = arguments["ref"], arguments["token"]
    draft = db.execute("SELECT doc, debit, credit, amount, period, status FROM drafts WHERE ref = ?", (ref,)).fetchone()
    if draft is None:
        raise ToolError("not_found", f"no proposal {ref}")
    doc, debit, credit, amount, period, status = draft
    if status != "open" or not token_valid(db, ref, token):
        raise ToolError("token_invalid", f"no unused approval token {token} for {ref}")
    if not period_open(db, period):
        raise ToolError("period_closed", f"{period} is closed")
    journal = next_ref(db, "JE")
    write(db, Entry(journal, doc, last_day(period), f"posts {ref}", simple(debit, credit, amount)))
    db.execute("UPDATE drafts SET status = 'posted' WHERE ref = ?", (ref,))
    db.execute("UPDATE tokens SET used = 1 WHERE token = ?", (token,))
    return {"posted": ref, "journal": journal, "amount": money.text(amount)}


def transfer_funds(db: sqlite3.Connection, arguments: Arguments) -> Result:
    """Pay an open payment request. Party and amount must be the request's own; two people must have approved it."""
    ref, party, amount = arguments["ref"], arguments["to"], money.minor(arguments["amount"])
    request = db.execute("SELECT party, amount, status FROM payment_requests WHERE ref = ?", (ref,)).fetchone()
    if request is None:
        raise ToolError("not_found", f"no payment request {ref}")
    if request[2] != "open":
        raise ToolError("already_paid", f"{ref} is {request[2]}")
    if (request[0].casefold(), request[1]) != (party.casefold(), amount):
        raise ToolError("mismatch", f"{ref} is for {request[0]} {money.text(request[1])}")
    if (given := approvals(db, ref)) < 2:
        raise ToolError("approval_missing", f"{ref} has {given} of 2 approvals")
    db.execute("INSERT INTO transfers VALUES (?, ?, ?)", (ref, request[0], amount))
    db.execute("UPDATE payment_requests SET status = 'paid' WHERE ref = ?", (ref,))
    db.execute(
        "INSERT INTO bank_lines VALUES (?, 'operating', ?, ?, ?, ?)",
        (f"TRF-{ref}", last_day(current_period(db)), -amount, request[0], f"transfer {ref}"),
    )
    return {"sent": ref, "to": request[0], "amount": money.text(amount), "approvals": given}


def current_period(db: sqlite3.Connection) -> str:
    """The earliest open period."""
    return str(db.execute("SELECT MIN(period) FROM periods WHERE status = 'open'").fetchone()[0])


def period_open(db: sqlite3.Connection, period: str) -> bool:
    return db.execute("SELECT 1 FROM periods WHERE period = ? AND status = 'open'", (period,)).fetchone() is not None


def approvals(db: sqlite3.Connection, ref: str) -> int:
    """How many different people approved a payment request."""
    return int(db.execute("SELECT COUNT(DISTINCT approver) FROM approvals WHERE ref = ?", (ref,)).fetchone()[0])


def token_valid(db: sqlite3.Connection, ref: str, token: str) -> bool:
    return db.execute("SELECT 1 FROM tokens WHERE token = ? AND draft = ? AND used = 0", (token, ref)).fetchone() is not None


HANDLERS: Mapping[str, Callable[[sqlite3.Connection, Arguments], Result]] = {
    "query_erp": query_erp,
    "cash_position": cash_position,
    "ageing": ageing,
    "budget_status": budget_status,
    "propose_entry": propose_entry,
    "post_entry": post_entry,
    "transfer_funds": transfer_funds,
}
