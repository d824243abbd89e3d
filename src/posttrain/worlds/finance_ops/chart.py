"""The chart of accounts: control accounts that every company has, and expense accounts drawn per company."""

from __future__ import annotations

import random

BANK = {"operating": "1010", "payroll": "1020", "reserve": "1030", "tax": "1040"}
RECEIVABLES, PAYABLES, EQUITY, REVENUE, FEES, SALARIES = "1100", "2000", "3000", "4000", "6900", "7000"

CONTROL: tuple[tuple[str, str, str], ...] = (
    *((code, f"{name} bank account", "asset") for name, code in BANK.items()),
    (RECEIVABLES, "receivables", "asset"),
    (PAYABLES, "payables", "liability"),
    (EQUITY, "opening equity", "equity"),
    (REVENUE, "revenue", "income"),
    (FEES, "bank charges", "expense"),
    (SALARIES, "salaries", "expense"),
)

EXPENSES = (
    "rent",
    "travel",
    "software",
    "freight",
    "marketing",
    "repairs",
    "utilities",
    "insurance",
    "consulting",
    "supplies",
    "training",
    "telecoms",
)


def expense_accounts(rng: random.Random, count: int) -> dict[str, str]:
    """`count` expense accounts, code -> name, with codes 6100..6890 drawn without repetition."""
    codes = sorted(rng.sample(range(6100, 6900, 10), count))
    return dict(zip(map(str, codes), rng.sample(EXPENSES, count), strict=True))
