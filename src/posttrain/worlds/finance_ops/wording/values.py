"""Surface forms of values: periods, amounts and currencies as people write them. All are resolvable from the text alone."""

from __future__ import annotations

import calendar
import random

CURRENCIES = {"EUR": "€", "USD": "$", "GBP": "£"}


def period(rng: random.Random, value: str) -> str:
    """'2026-03' as 'March 2026', 'Mar 2026', '03/2026' or '2026-03'."""
    year, month = value.split("-")
    full, short = calendar.month_name[int(month)], calendar.month_abbr[int(month)]
    return rng.choice((f"{full} {year}", f"{full} {year}", f"{short} {year}", f"{month}/{year}", value, value))


def amount(rng: random.Random, value: str, currency: str = "EUR") -> str:
    """'1250.40' as '1,250.40', '1250.40', 'EUR 1,250.40', '1,250.40 EUR' or with the sign."""
    whole, cents = value.split(".")
    grouped = f"{int(whole):,}.{cents}"
    return rng.choice(
        (grouped, grouped, value, value, f"{currency} {grouped}", f"{value} {currency}", f"{CURRENCIES[currency]}{grouped}")
    )
