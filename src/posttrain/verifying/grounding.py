"""Is every figure of an answer one that the model was shown? The rule, so that a number can be argued about:

A **figure** is a number in the answer's text (of a JSON answer: in its values), read with or without a currency sign or code,
thousands separators (1,234.50), a percent sign, or a unit (1.5万 = 15000, 2亿, 15k, 3m, 1bn). Not figures:
- parts of identifiers: a number joined to a Latin letter, `_` or `#`, directly or by `-`, `/`, `.` (JV-1002, INV2024/7, #88);
- dates, times and periods (2024-03-01, 2024/3, 01.03.2024, 3月5日, 12:30) and years (whole 1900-2099 without sign or unit);
- small counts: whole numbers up to 10 without sign, unit or point, and the markers of a numbered list.

A figure is **grounded** when the same number occurs in what the model read: the request, the system text and the tool results.
There every number counts, also one inside an identifier or the name of a field. Numbers are compared as decimals (1,234.5 =
1234.50) without their sign ("overdrawn by 50.00" for -50.00); a percentage also as its hundredth (12.5 % = 0.125). Sums or
differences that the model worked out itself are not grounded: an answer's figure must come from the system of record.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from posttrain.data.records import Episode
from posttrain.verifying.answers import parse_answer

_NUMBER = r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?"
_CODES = "USD|EUR|GBP|CNY|RMB|JPY|HKD|CHF|SGD"
_FIGURE = re.compile(rf"(?P<money>(?:[$€£¥]|{_CODES})\s?)?(?P<number>{_NUMBER})(?P<unit>\s?[%万亿]|(?:k|m|bn)\b)?", re.IGNORECASE)
_ALONE = re.compile(rf"(?:{_CODES})?(?:{_NUMBER})(?:k|m|bn|{_CODES})?", re.IGNORECASE)  # letters that make no identifier
_RUN = re.compile(r"[A-Za-z0-9_#]+(?:(?:[-_/]|\.(?=\d)|,(?=\d{3}))[A-Za-z0-9_#]+)*")
_DATES = re.compile(
    r"(?<![\w.])(?:(?:19|20)\d\d[-/]\d{1,2}(?:[-/]\d{1,2})?|\d{1,2}[-/.]\d{1,2}[-/.](?:19|20)\d\d|\d{1,2}:\d\d(?::\d\d)?)(?![\d/])"
    r"|(?:\d{4}\s?年)?\s?\d{1,2}\s?月(?:\s?\d{1,2}\s?[日号])?|\d{4}\s?年",
    re.ASCII,  # so that a Chinese character before a date does not hide it
)
_MARKER = re.compile(r"(?m)^\s*\d{1,2}[.)、](?=\s|[^\d.])")
_HARD_SPACE = re.compile(r"(?<=\d)[\u00a0\u202f](?=\d{3}(?!\d))")
_UNITS = {"万": 10_000, "亿": 100_000_000, "k": 1_000, "m": 1_000_000, "bn": 1_000_000_000}
_SMALL, _YEARS = 10, range(1900, 2100)


@dataclass(frozen=True, slots=True)
class Groundedness:
    """The figures of one answer, and those that nothing the model read contains."""

    figures: tuple[Decimal, ...]
    ungrounded: tuple[Decimal, ...]

    @property
    def share(self) -> float | None:
        """Grounded figures / figures, or None without figures: nothing to measure."""
        return 1 - len(self.ungrounded) / len(self.figures) if self.figures else None


def figures(text: str) -> tuple[Decimal, ...]:
    """The figures of an answer in their order, by the rule above."""
    return tuple(value for value, _ in _figures(text))


def grounded(answer: str, sources: Iterable[str]) -> Groundedness:
    """Compare an answer's figures with the numbers of the sources."""
    shown = {number for source in sources for number in _numbers(source)}
    found = list(_figures(answer))
    return Groundedness(tuple(value for value, _ in found), tuple(value for value, forms in found if not shown & forms))


def episode_groundedness(episode: Episode) -> Groundedness:
    """An episode's answer against everything it was shown: system text, request and tool results."""
    return grounded(episode.answer, (message.content for message in episode.messages if message.role != "assistant"))


def _figures(text: str) -> Iterator[tuple[Decimal, set[Decimal]]]:
    """(value, the forms under which it may have been shown)."""
    answer = parse_answer(text)
    values = [text] if answer.value is None else list(_leaves(answer.value, names=False))
    for value in values:
        plain = _MARKER.sub(" ", _DATES.sub(" ", _normal(value)))
        for match in _FIGURE.finditer(_RUN.sub(_without_identifier, plain)):
            found, unit = _read(match)
            bare = match["number"].isdigit() and not (match["money"] or unit)
            if not bare or (found > _SMALL and int(found) not in _YEARS):
                yield found, ({found, found / 100} if unit == "%" else {found})


def _numbers(text: str) -> Iterator[Decimal]:
    """Every number of a source, however it is embedded, with and without its unit."""
    try:
        leaves = list(_leaves(json.loads(text), names=True))  # in JSON a comma parts numbers, in prose it groups their digits
    except (ValueError, RecursionError):
        leaves = [text]
    for leaf in leaves:
        for match in _FIGURE.finditer(_normal(leaf)):
            yield _decimal(match["number"])
            yield _read(match)[0]


def _read(match: re.Match[str]) -> tuple[Decimal, str]:
    unit = (match["unit"] or "").strip().lower()
    return _decimal(match["number"]) * _UNITS.get(unit, 1), unit


def _without_identifier(match: re.Match[str]) -> str:
    run = match[0]
    letters = any(not (character.isdigit() or character in "-/.,") for character in run)
    return " " if letters and not _ALONE.fullmatch(run) else run


def _leaves(value: Any, *, names: bool) -> Iterator[str]:
    """The leaves of a JSON value as text; with the names of its fields where they may carry numbers that were shown."""
    if isinstance(value, dict):
        if names:
            yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item, names=names)
    elif isinstance(value, str):
        yield value
    elif value is not None:
        yield json.dumps(value)


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", _HARD_SPACE.sub(",", text))


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))
