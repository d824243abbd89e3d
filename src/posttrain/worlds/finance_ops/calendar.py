"""Periods 'YYYY-MM' and dates 'YYYY-MM-DD' as text, with the little arithmetic that books need."""

from __future__ import annotations

from calendar import monthrange
from datetime import date, timedelta


def shift(period: str, months: int) -> str:
    """'2026-01' shifted by -1 is '2025-12'."""
    year, month = map(int, period.split("-"))
    index = year * 12 + month - 1 + months
    return f"{index // 12:04d}-{index % 12 + 1:02d}"


def day(period: str, number: int) -> str:
    """The date of that day of the period, held inside the month."""
    year, month = map(int, period.split("-"))
    return f"{period}-{min(number, monthrange(year, month)[1]):02d}"


def last_day(period: str) -> str:
    return day(period, 31)


def after(iso: str, days: int) -> str:
    return (date.fromisoformat(iso) + timedelta(days=days)).isoformat()
