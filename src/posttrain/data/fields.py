"""Small typed looks into a row of foreign JSON. What is wrong is raised as a DataError whose place is the field's path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from posttrain.errors import DataError


@dataclass(slots=True)
class Trace:
    """What the conversion of one row noticed: fields it left out, and whether call arguments came as objects."""

    dropped: set[str] = field(default_factory=set)
    argument_objects: bool = False

    def drop(self, row: Mapping[str, Any], known: frozenset[str], where: str = "") -> None:
        """Note every field of `row` that is not in `known`; a null says nothing, so leaving it out loses nothing."""
        prefix = f"{where}." if where else ""
        self.dropped.update(f"{prefix}{key}" for key, value in row.items() if key not in known and value is not None)


def fail(what: str, where: str, *, value: object = None, remedy: str) -> NoReturn:
    raise DataError(what, where=where, value=value, remedy=remedy)


def want_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        fail("must be text", where, value=value, remedy="write it as a JSON string")
    return value


def want_flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        fail("must be true or false", where, value=value, remedy="write it without quotes")
    return value


def want_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        fail("must be an object", where, value=value, remedy='write it as {"key": value}')
    return value


def want_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        fail("must be a list", where, value=value, remedy="write it as [item, ...]")
    return value


def strict_json(text: str) -> Any:
    """`json.loads` that refuses NaN and infinity, which are not JSON. Raises ValueError."""
    return json.loads(text, parse_constant=_not_json)


def from_json_text(value: Any, where: str) -> Any:
    """The value itself, or what it holds when it is JSON written into a string (tables keep objects so)."""
    if not isinstance(value, str):
        return value
    try:
        return strict_json(value)
    except (ValueError, RecursionError) as error:
        fail(f"is text that is not JSON ({error})", where, value=value, remedy="correct the JSON inside the string")


def compact(value: Any) -> str:
    """JSON without free white space, characters as they are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
