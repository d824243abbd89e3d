"""Conformance: run a file of cases with known numbers against the functions of this room.

A case file is JSON: {"format": 1, "cases": [{"id", "objective", "inputs", "params", "expected", "atol", "rtol"}, ...]}. A case
passes if every number under `expected` is met to atol + rtol |expected|; "inf" and "-inf" stand for infinities, null for absent.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from posttrain.errors import DataError
from posttrain.objectives.cases import ADAPTERS

FORMAT = 1
_TOLERANCE = 1e-6
_MESSAGES_PER_CASE = 5
_INFINITIES = {"inf": math.inf, "+inf": math.inf, "-inf": -math.inf}
_NEEDED = {"id": str, "objective": str, "inputs": dict, "expected": dict}


@dataclass(frozen=True, slots=True)
class Case:
    """One case as read from its file."""

    id: str
    objective: str
    inputs: Mapping[str, Any]
    params: Mapping[str, Any]
    expected: Mapping[str, Any]
    atol: float = _TOLERANCE
    rtol: float = _TOLERANCE


@dataclass(frozen=True, slots=True)
class Failure:
    """A case that did not pass, and what did not fit: which number, got, expected."""

    case: str
    messages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conformance:
    """Outcome of a case file: ids that passed, failures, and skipped cases as (id, objective that is not implemented)."""

    path: str
    passed: tuple[str, ...]
    failed: tuple[Failure, ...]
    skipped: tuple[tuple[str, str], ...]

    @property
    def ok(self) -> bool:
        return not self.failed


def run(path: Path | str) -> Conformance:
    """Run every case of a file. Raises DataError naming file and case if it is not a case file."""
    passed: list[str] = []
    failed: list[Failure] = []
    skipped: list[tuple[str, str]] = []
    for case in read_cases(Path(path)):
        if case.objective not in ADAPTERS:
            skipped.append((case.id, case.objective))
            continue
        messages = check(case)
        if messages:
            failed.append(Failure(case.id, tuple(messages)))
        else:
            passed.append(case.id)
    return Conformance(str(path), tuple(passed), tuple(failed), tuple(skipped))


def report_lines(result: Conformance) -> list[str]:
    """What the command prints: every failure, what was skipped by name, and last `N passed, N failed, N skipped`."""
    lines: list[str] = []
    for failure in result.failed:
        lines.append(f"FAILED {failure.case}: {failure.messages[0]}")
        lines += [f"    {message}" for message in failure.messages[1:_MESSAGES_PER_CASE]]
        if len(failure.messages) > _MESSAGES_PER_CASE:
            lines.append(f"    and {len(failure.messages) - _MESSAGES_PER_CASE} more")
    if result.skipped:
        counts = Counter(objective for _, objective in result.skipped)
        lines.append("not implemented: " + ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())))
    lines.append(f"{len(result.passed)} passed, {len(result.failed)} failed, {len(result.skipped)} skipped")
    return lines


def check(case: Case) -> list[str]:
    """Messages about everything that differs; empty if the case passes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # groups of one are legal cases
            got = ADAPTERS[case.objective](case.inputs, case.params)
    except KeyError as error:
        return [f"an input or parameter is missing: {error.args[0]}"]
    except Exception as error:  # a case that cannot be computed is a failed case, and the others still run
        return [f"raised {type(error).__name__}: {error}"]
    return list(_differences(case.expected, _plain(got), "", case))


def read_cases(path: Path) -> list[Case]:
    """The cases of a file. Raises DataError naming the file, the line or the case, and the remedy."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=str(path), remedy="give the path of a case file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"is not JSON ({error})", where=str(path), remedy="give a case file") from error
    if not isinstance(content, dict) or not isinstance(content.get("cases"), list):
        raise DataError('has no list "cases"', where=str(path), remedy='a case file is {"format": 1, "cases": [...]}')
    if content.get("format", FORMAT) != FORMAT:
        raise DataError(
            "has an unknown format", where=str(path), value=content["format"], remedy=f"this version reads format {FORMAT}"
        )
    return [_read_case(entry, path, number) for number, entry in enumerate(content["cases"], start=1)]


def _read_case(entry: Any, path: Path, number: int) -> Case:
    name = entry.get("id") if isinstance(entry, dict) else None
    where = f"{path}: case {name if isinstance(name, str) else number}"
    if not isinstance(entry, dict):
        raise DataError("is not an object", where=where, value=entry, remedy=f"a case has {', '.join(_NEEDED)}")
    for key, kind in _NEEDED.items():
        if not isinstance(entry.get(key), kind):
            raise DataError(f'"{key}" must be a {kind.__name__}', where=where, value=entry.get(key), remedy="correct this case")
    tolerances = [entry.get(key, _TOLERANCE) for key in ("atol", "rtol")]
    params = entry.get("params") or {}
    if not isinstance(params, dict) or any(isinstance(t, bool) or not isinstance(t, int | float) for t in tolerances):
        raise DataError('"params" must be a dict, "atol" and "rtol" numbers', where=where, remedy="correct this case")
    return Case(entry["id"], entry["objective"], entry["inputs"], params, entry["expected"], *tolerances)


def _plain(value: Any) -> Any:
    """Tensors to nested lists and numbers, all the way down."""
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _differences(expected: Any, got: Any, place: str, case: Case) -> Iterator[str]:
    here = place or "result"
    if isinstance(expected, dict):
        if not isinstance(got, dict):
            yield f"{here}: got {got!r}, expected {expected!r}"
            return
        for key, item in expected.items():
            name = f"{place}.{key}" if place else key
            if key in got:
                yield from _differences(item, got[key], name, case)
            else:
                yield f"{name}: is not computed, expected {_short(item)}"
    elif isinstance(expected, list):
        if not isinstance(got, list) or len(got) != len(expected):
            yield f"{here}: got {_short(got)}, expected {_short(expected)}"
            return
        for index, (item, other) in enumerate(zip(expected, got, strict=True)):
            yield from _differences(item, other, f"{here}[{index}]", case)
    elif not _equal(expected, got, case):
        yield f"{here}: got {_short(got)}, expected {_short(expected)}"


def _equal(expected: Any, got: Any, case: Case) -> bool:
    if isinstance(got, int | float) and isinstance(expected, str):
        return _INFINITIES.get(expected) == got
    if isinstance(expected, int | float) and isinstance(got, int | float):
        return expected == got or abs(got - expected) <= case.atol + case.rtol * abs(expected)
    return bool(expected == got)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 120 else shown[:117] + "..."
