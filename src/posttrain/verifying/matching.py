"""Does what was said equal what was expected? Values as JSON, amounts as decimals, calls by name and arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from posttrain.errors import VerifierError, nearest_of

AMOUNT = re.compile(r"[+-]?\d+\.\d+")  # "1234.50"; without a point it is a code: account 0100 is not 100
_DECIMAL = re.compile(r"[+-]?\d+(?:\.\d+)?")
# how to compare -> what with
_OPERANDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "$any": ("true", lambda operand: operand is True),
    "$in": ("a list", lambda operand: isinstance(operand, list | tuple)),
    "$contains": ("text", lambda operand: isinstance(operand, str)),
}


def same(expected: Any, actual: Any) -> bool:
    """Equality of JSON values.

    Numbers are compared as decimals (12.50 == 12.5), never with booleans or texts. An expected text with a decimal point is an
    amount: "12.50" equals "12.5" and "12.500". Every other text must be equal letter by letter. Lists keep their order. An
    expected value may be `{"$any": true}`, `{"$in": [values]}` or `{"$contains": text}` (letter case ignored).
    """
    if isinstance(expected, Mapping):
        operator = _operator(expected)
        if operator is not None:
            return _holds(operator, expected[operator], actual)
        return (
            isinstance(actual, Mapping)
            and expected.keys() == actual.keys()
            and all(same(value, actual[key]) for key, value in expected.items())
        )
    if isinstance(expected, list | tuple):
        return isinstance(actual, list | tuple) and len(expected) == len(actual) and all(map(same, expected, actual))
    if isinstance(expected, bool) or expected is None:
        return expected is actual
    if isinstance(expected, int | float | Decimal):
        return (
            isinstance(actual, int | float | Decimal) and not isinstance(actual, bool) and _decimal(expected) == _decimal(actual)
        )
    if isinstance(actual, str) and AMOUNT.fullmatch(str(expected)) and _DECIMAL.fullmatch(actual):
        return Decimal(str(expected)) == Decimal(actual)
    return bool(expected == actual)


def contains(expected: Any, actual: Any) -> bool:
    """Partial equality: an object may hold more fields, a list more elements in any order; leaves as in `same`."""
    if isinstance(expected, Mapping) and _operator(expected) is None:
        return isinstance(actual, Mapping) and all(
            key in actual and contains(value, actual[key]) for key, value in expected.items()
        )
    if isinstance(expected, list | tuple):
        if not isinstance(actual, list | tuple):
            return False
        fits = [[contains(wanted, found) for found in actual] for wanted in expected]
        return assign(fits) is not None
    return same(expected, actual)


def same_call(name: str, arguments: Mapping[str, Any], actual_name: str, actual_text: str, *, extra: bool) -> bool:
    """One call equals another by name and arguments; `extra` forgives arguments that were not expected."""
    if name != actual_name:
        return False
    try:
        actual = json.loads(actual_text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(actual, dict) or not arguments.keys() <= actual.keys():
        return False
    return (extra or actual.keys() == arguments.keys()) and all(same(value, actual[key]) for key, value in arguments.items())


def assign(fits: Sequence[Sequence[bool]]) -> list[int] | None:
    """A partner of its own for every row of a table of who fits whom, or None (augmenting paths: no order can trick it)."""
    columns = len(fits[0]) if fits else 0
    owner: list[int | None] = [None] * columns

    def place(row: int, tried: set[int]) -> bool:
        for column in range(columns):
            if fits[row][column] and column not in tried:
                tried.add(column)
                held_by = owner[column]
                if held_by is None or place(held_by, tried):
                    owner[column] = row
                    return True
        return False

    if not all(place(row, set()) for row in range(len(fits))):
        return None
    return [owner.index(row) for row in range(len(fits))]


def check_operators(expected: Any, where: str) -> None:
    """Raise VerifierError for an expected value that holds an unknown way to compare, or one without what it compares with."""
    if isinstance(expected, Mapping):
        operator = _operator(expected, where)
        if operator is not None and not _OPERANDS[operator][1](expected[operator]):
            remedy = f"give {operator} {_OPERANDS[operator][0]}"
            raise VerifierError("nothing to compare with", where=f"{where}.{operator}", value=expected[operator], remedy=remedy)
        for key, value in expected.items():
            check_operators(value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        for index, value in enumerate(expected):
            check_operators(value, f"{where}[{index}]")


def _operator(expected: Mapping[str, Any], where: str = "expected") -> str | None:
    found = [key for key in expected if isinstance(key, str) and key.startswith("$")]
    if not found:
        return None
    if len(expected) != 1 or found[0] not in _OPERANDS:
        remedy = nearest_of(found[0], tuple(_OPERANDS)) + ", alone in their object"
        raise VerifierError("unknown way to compare", where=where, value=dict(expected), remedy=remedy)
    return found[0]


def _holds(operator: str, operand: Any, actual: Any) -> bool:
    if operator == "$any":
        return True
    if operator == "$in":
        return any(same(value, actual) for value in operand)
    return isinstance(actual, str) and str(operand).casefold() in actual.casefold()


def _decimal(value: int | float | Decimal) -> Decimal:
    return value if isinstance(value, Decimal) else Decimal(str(value))
