"""The generated company: double entry, planted differences, determinism, and disjoint names."""

from __future__ import annotations

import sqlite3

import pytest

from posttrain.errors import DataError
from posttrain.worlds.finance_ops import calendar, ledger, money, names
from posttrain.worlds.finance_ops.books import MONTHS, books
from posttrain.worlds.finance_ops.chart import BANK, CONTROL
from posttrain.worlds.finance_ops.differences import Kind
from posttrain.worlds.finance_ops.ledger import Entry, Line, document_difference, simple, trial_balance, write

SEEDS = [(split, seed) for split in names.SPLITS for seed in (0, 7, -3, 10**12)]


@pytest.mark.parametrize(("split", "seed"), SEEDS)
def test_every_entry_and_the_whole_ledger_balance(split: str, seed: int) -> None:
    db = books(split, seed).open()
    assert db.execute("SELECT entry FROM lines GROUP BY entry HAVING SUM(amount) <> 0").fetchall() == []
    assert sum(trial_balance(db).values()) == 0


@pytest.mark.parametrize(("split", "seed"), SEEDS)
def test_only_the_planted_documents_differ_from_their_coding_and_by_the_planted_gap(split: str, seed: int) -> None:
    company = books(split, seed)
    db = company.open()
    gaps = {doc: gap for (doc,) in db.execute("SELECT DISTINCT doc FROM coding") if (gap := document_difference(db, doc))}
    truth = {found.doc: found.gap for found in company.differences if found.kind is not Kind.TIMING_DIFFERENCE}
    assert gaps == truth


@pytest.mark.parametrize(("split", "seed"), SEEDS)
def test_all_five_kinds_are_planted_once(split: str, seed: int) -> None:
    assert [found.kind for found in books(split, seed).differences] == list(Kind)


@pytest.mark.parametrize(("split", "seed"), SEEDS)
def test_the_true_correction_of_every_difference_brings_its_document_to_zero(split: str, seed: int) -> None:
    company = books(split, seed)
    db = company.open()
    for index, found in enumerate(company.differences):
        if found.amount:
            lines = simple(found.debit, found.credit, found.amount)
            write(db, Entry(f"FIX-{index}", found.doc, calendar.last_day(company.period), "fix", lines, state="trial"))
        assert document_difference(db, found.doc) == 0


@pytest.mark.parametrize(("split", "seed"), SEEDS[:4])
def test_bank_and_ledger_differ_by_exactly_the_planted_bank_differences(split: str, seed: int) -> None:
    """Month-end bank reconciliation: statement - ledger = receipt missing + 2 x charge reversed + cheque not yet cashed."""
    company = books(split, seed)
    db, end = company.open(), calendar.last_day(company.period)
    (bank,) = db.execute("SELECT SUM(amount) FROM bank_lines WHERE bank = 'operating' AND date <= ?", (end,)).fetchone()
    kinds = {found.kind: found for found in company.differences}
    expected = (
        kinds[Kind.UNMATCHED_RECEIPT].gap - kinds[Kind.WRONG_SIGN].gap + kinds[Kind.TIMING_DIFFERENCE].gap
    )  # the charge sits in the ledger as income: it is too high by twice the charge; the cheque has left the ledger only
    assert bank - trial_balance(db)[BANK["operating"]] == expected


def test_wrong_sign_is_corrected_by_twice_the_booked_amount() -> None:
    found = next(item for item in books("train", 1).differences if item.kind is Kind.WRONG_SIGN)
    db = books("train", 1).open()
    (booked,) = db.execute(
        "SELECT MAX(l.amount) FROM lines l JOIN entries e ON e.id = l.entry WHERE e.doc = ?", (found.doc,)
    ).fetchone()
    assert found.amount == 2 * booked
    assert (found.debit, found.credit) == found.booked[::-1]


def test_a_timing_difference_has_nothing_to_post_and_clears_in_the_next_period() -> None:
    company = books("train", 2)
    found = company.differences[-1]
    assert (found.debit, found.credit, found.amount) == ("none", "none", 0)
    assert found.cleared[:7] == calendar.shift(company.period, 1)


def test_the_truth_is_not_in_the_database() -> None:
    db = books("train", 3).open()
    text = "\n".join(db.iterdump()).lower()
    assert not any(kind.value in text for kind in Kind)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_or_split_does_not() -> None:
    first = books("train", 11).image
    books.cache_clear()
    assert books("train", 11).image == first
    assert books("train", 12).image != first
    assert books("dev", 11).image != first


def test_opened_copies_are_private() -> None:
    one, two = books("train", 4).open(), books("train", 4).open()
    one.execute("DELETE FROM lines")
    assert two.execute("SELECT COUNT(*) FROM lines").fetchone()[0] > 0


def test_an_entry_that_does_not_balance_is_refused() -> None:
    db = books("train", 5).open()
    with pytest.raises(DataError, match="does not balance"):
        write(db, Entry("JE-1", "DOC", "2026-01-01", "", (Line("1010", 5), Line("2000", -4))))
    with pytest.raises(DataError, match="does not balance"):
        write(db, Entry("JE-2", "DOC", "2026-01-01", "", ()))


def test_references_are_unique_within_their_table() -> None:
    db = books("train", 6).open()
    for table in ("entries", "receivables", "payables", "purchase_orders", "bank_lines", "drafts", "payment_requests"):
        assert db.execute(f"SELECT COUNT(*) - COUNT(DISTINCT ref) FROM {table}").fetchone() == (0,)


def test_the_next_reference_follows_the_highest_one_of_its_prefix() -> None:
    db = books("train", 6).open()
    (highest,) = db.execute("SELECT MAX(CAST(substr(ref, 4) AS INTEGER)) FROM entries WHERE ref LIKE 'JE-%'").fetchone()
    assert ledger.next_ref(db, "JE") == f"JE-{highest + 1}"
    assert ledger.next_ref(db, "NEW") == "NEW-101"


def test_history_has_closed_periods_and_one_open_month_to_work_in() -> None:
    company = books("dev", 8)
    rows = dict(company.open().execute("SELECT period, status FROM periods").fetchall())
    assert rows.pop(calendar.shift(company.period, 1)) == "open"
    assert rows.pop(company.period) == "open"
    assert list(rows.values()) == ["closed"] * (MONTHS - 1)


def test_every_ledger_line_uses_a_known_account() -> None:
    db = books("dev", 9).open()
    db.execute("PRAGMA foreign_keys = ON")
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    assert {code for code, _, _ in CONTROL} <= {code for (code,) in db.execute("SELECT code FROM accounts")}


def test_names_of_different_splits_never_meet() -> None:
    for part in (names.stems, names.areas, names.surnames):
        pools = [set(part(split)) for split in names.SPLITS]
        assert all(len(pool) >= 5 for pool in pools)
        assert sum(map(len, pools)) == len(set().union(*pools))


def test_tables_of_different_splits_share_no_party_cost_centre_or_approver() -> None:
    def contents(split: str) -> set[str]:
        found: set[str] = set()
        for seed in range(12):
            db = books(split, seed).open()
            for sql in ("SELECT name FROM parties", "SELECT name FROM cost_centres", "SELECT approver FROM approvals"):
                found |= {row[0] for row in db.execute(sql)}
        return found

    train, dev, test = (contents(split) for split in names.SPLITS)
    assert not train & test
    assert not train & dev
    assert not dev & test


def test_an_unknown_split_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="train, dev, test"):
        books("holdout", 1)


@pytest.mark.parametrize(
    ("minor", "text"), [(0, "0.00"), (5, "0.05"), (-5, "-0.05"), (123450, "1234.50"), (-8508134, "-85081.34")]
)
def test_money_goes_to_text_and_back(minor: int, text: str) -> None:
    assert money.text(minor) == text
    assert money.minor(text) == minor


@pytest.mark.parametrize("bad", ["", "12", "12.5", "1,200.00", "12.345", "EUR 1.00", "1e3", " 1.00", "１.００"])
def test_what_is_not_an_amount_is_refused(bad: str) -> None:
    with pytest.raises(DataError, match="not an amount"):
        money.minor(bad)


def test_amounts_are_found_in_every_form_that_requests_use() -> None:
    prose = "pay 1,250.40 EUR, EUR 99.00, €33,218.81 or +7.10; not 2026-03-31, INV-2041, 3.5 or 1.2345; left -85081.34."
    assert money.amounts_in(prose) == {"1250.40", "99.00", "33218.81", "7.10", "85081.34"}


@pytest.mark.parametrize(
    ("period", "months", "expected"), [("2026-01", -1, "2025-12"), ("2025-11", 3, "2026-02"), ("2024-05", 0, "2024-05")]
)
def test_periods_shift_over_year_ends(period: str, months: int, expected: str) -> None:
    assert calendar.shift(period, months) == expected


def test_days_stay_inside_their_month() -> None:
    assert calendar.last_day("2024-02") == "2024-02-29"
    assert calendar.day("2023-02", 30) == "2023-02-28"
    assert calendar.after("2023-12-31", 1) == "2024-01-01"


def test_a_copy_is_a_plain_sqlite_database() -> None:
    assert isinstance(books("train", 0).open(), sqlite3.Connection)
