"""Months as people write them, read as `YYYY-MM`: what a period in a call may refer to."""

from __future__ import annotations

import re
from collections.abc import Iterator

_NAMES = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_NAME = (
    r"(?P<name>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
_YEAR = r"(?P<year>(?:19|20)[0-9]{2})"
_DAY = r"[0-9]{1,2}(?:st|nd|rd|th)?"
_AND = r"\s*(?:,|/|-|\u2013|&|and|or|to|until|through)\s*"
_FORMS = tuple(
    re.compile(form, re.IGNORECASE | re.ASCII)
    for form in (
        rf"(?<!\w){_NAME}(?:\s+{_DAY})?[\s./,-]*(?:of\s+)?{_YEAR}(?!\w)",  # May 2026, 14 May 2026, May 14, 2026, 14-May-2026
        rf"(?<!\w){_NAME}{_AND}{_NAME.replace('name', 'next')}[\s,]*{_YEAR}(?!\w)",  # April and May 2026
        rf"(?<![\w-]){_YEAR}[\s/-]+{_NAME}(?!\w)",  # 2026 May
        rf"(?<![\w-]){_YEAR}[-/](?P<month>[0-9]{{1,2}})(?:[-/][0-9]{{1,2}})?(?![0-9])",  # 2026-05, 2026-05-14, 2026/5
        rf"(?<![\w.-]){_YEAR}\.(?P<month>[0-9]{{2}})\.[0-9]{{2}}(?![0-9])",  # 2026.05.14
        rf"(?<![\w.-])(?:(?P<other>[0-9]{{1,2}})[-/])?(?P<month>[0-9]{{1,2}})[-/]{_YEAR}(?![0-9])",  # 05/2026, 5/14/2026
        rf"(?<![\w.-])(?:[0-9]{{1,2}}\.)?(?P<month>[0-9]{{2}})\.{_YEAR}(?![0-9])",  # 05.2026, 14.05.2026; 7.2026 is a number
        rf"{_YEAR}\s*年\s*(?P<month>[0-9]{{1,2}})\s*月",
    )
)


def months(text: str) -> Iterator[str]:
    """The months that a text names, in English or in figures, also within a date, as `YYYY-MM`. Of a date whose month could be either of
    two numbers both are given, and a name alone has the year of the next one. A month without a year, and one that is told by another day
    (last month), is none."""
    for form in _FORMS:
        for match in form.finditer(text):
            parts = match.groupdict()
            if (name := parts.get("name")) is not None:
                numbers = [_NAMES.index(name[:3].lower()) + 1]
            else:
                numbers = [int(number) for number in (parts["month"], parts.get("other")) if number is not None]
            yield from (f"{parts['year']}-{number:02d}" for number in numbers if 1 <= number <= 12)
