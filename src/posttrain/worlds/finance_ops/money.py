"""Money as integer minor units inside, as decimal strings with two digits at every edge; never a float."""

from __future__ import annotations

import re

from posttrain.errors import DataError

AMOUNT_PATTERN = r"^-?[0-9]{1,10}\.[0-9]{2}$"
_AMOUNT = re.compile(AMOUNT_PATTERN)
_IN_TEXT = re.compile(r"(?<![\w.])-?\d{1,3}(?:,\d{3})+\.\d{2}(?!\d)|(?<![\w.,])-?\d+\.\d{2}(?!\d)")


def text(minor: int) -> str:
    """123450 -> '1234.50'; the sign stays in front."""
    sign = "-" if minor < 0 else ""
    return f"{sign}{abs(minor) // 100}.{abs(minor) % 100:02d}"


def minor(amount: str) -> int:
    """'1234.50' -> 123450. Raises DataError for anything but a decimal string with two digits."""
    if not _AMOUNT.match(amount):
        raise DataError(
            "not an amount", where="amount", value=amount, remedy="write a decimal string with two digits, such as '1250.40'"
        )
    whole, cents = amount.lstrip("-").split(".")
    value = int(whole) * 100 + int(cents)
    return -value if amount.startswith("-") else value


def amounts_in(prose: str) -> set[str]:
    """Every amount written in a text, thousands separators removed and the sign dropped: '1,250.40 EUR' -> {'1250.40'}."""
    return {match.group().replace(",", "").lstrip("-") for match in _IN_TEXT.finditer(prose)}
