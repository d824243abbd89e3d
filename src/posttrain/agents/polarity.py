"""Which attributes could let a call through by not being there?

Two ways lead from a missing attribute to Allow.

- `context has x` is false when x is missing. Where that makes a policy stricter it is safe: `permit when (context has approvals
  && ...)`. Where it can make it laxer it is not: `forbid when (context has amount && context.amount > 10)` does not apply to a call
  without an amount. A `has` is unsafe when its falsehood can move the decision towards Allow: read through `&&`, `||`, `!` and the
  branches of `if`; anywhere else it counts as unsafe, because what it does there is not followed.
- Reading a missing attribute is an error, which denies; but another missing attribute may keep that reading from being reached. So
  an attribute that is read without a `has` of its own before it must be there from the start.

A third way is closed when policies are loaded: groups, attributes and tags of entities are never there (see `needs_entities`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Path = tuple[str, ...]
_NONE: frozenset[Path] = frozenset()


@dataclass(frozen=True, slots=True)
class Needs:
    """Attributes of the context that one policy needs, and the actions it is about (None: every action)."""

    paths: frozenset[Path]
    actions: frozenset[str] | None

    def of(self, action: str) -> frozenset[Path]:
        return self.paths if self.actions is None or action in self.actions else _NONE


def must_be_present(policy: Mapping[str, Any], *, groups: bool) -> Needs:
    """Needs of a policy in Cedar's JSON form. `groups`: actions may belong to groups, so `in` may mean any action."""
    permit = policy["effect"] == "permit"
    paths: set[Path] = set()
    for condition in policy["conditions"]:
        towards_allow = permit == (condition["kind"] == "when")
        paths.update(_unsafe(condition["body"], towards_allow))
        paths.update(_unguarded(condition["body"], _NONE))
    return Needs(frozenset(paths), _actions(policy["action"], groups))


def needs_entities(policy: Mapping[str, Any], *, groups: bool) -> str | None:
    """What a policy in Cedar's JSON form asks of entities' data, or None. A request brings none, so it would be false for every call.

    `groups`: a schema says which groups an action belongs to.
    """
    for name in ("principal", "action", "resource"):
        scope = policy[name]
        listed = "entities" in scope or groups  # a list of actions names the actions themselves
        if "in" in scope or (scope["op"] == "in" and not (name == "action" and listed)):
            return f"`{name} in`"
    return next((asked for condition in policy["conditions"] for asked in _asked(condition["body"], groups)), None)


def _asked(expression: Any, groups: bool) -> Iterator[str]:
    for operator, operand in _nodes(expression):
        if operator in (".", "has") and _path(operand["left"]) is None:
            yield f"the attribute `{operand['attr']}` of something else than the context"
        elif operator in ("hasTag", "getTag"):
            yield f"`{operator}`"
        elif operator == "in" or (operator == "is" and "in" in operand):
            listed = groups or (operator == "in" and "Set" in operand["right"])
            if not (listed and operand["left"] == {"Var": "action"}):
                yield f"`{operator} ... in`" if operator == "is" else "`in`"
        for part in _parts(operand):
            yield from _asked(part, groups)


def _unsafe(expression: Any, towards_allow: bool | None) -> Iterator[Path]:
    """Paths of unsafe `has`; towards_allow: whether the truth of the expression helps the caller (None: not known)."""
    for operator, operand in _nodes(expression):
        if operator == "has":
            path = _tested(operand)
            if path is not None and not towards_allow:
                yield path
        elif operator in ("&&", "||"):
            yield from _unsafe(operand["left"], towards_allow)
            yield from _unsafe(operand["right"], towards_allow)
        elif operator == "!":
            yield from _unsafe(operand["arg"], None if towards_allow is None else not towards_allow)
        elif operator == "if-then-else":
            yield from _unsafe(operand["if"], None)
            yield from _unsafe(operand["then"], towards_allow)
            yield from _unsafe(operand["else"], towards_allow)
        else:
            for part in _parts(operand):
                yield from _unsafe(part, None)


def _unguarded(expression: Any, known: frozenset[Path]) -> Iterator[Path]:
    """Paths that are read where it is not `known` that they are there."""
    for operator, operand in _nodes(expression):
        if operator == ".":
            path = _path({operator: operand})
            if path is not None and path not in known:
                yield path
            yield from _unguarded(operand["left"], known)
        elif operator == "&&":
            yield from _unguarded(operand["left"], known)
            yield from _unguarded(operand["right"], known | _implied(operand["left"]))
        elif operator == "if-then-else":
            yield from _unguarded(operand["if"], known)
            yield from _unguarded(operand["then"], known | _implied(operand["if"]))
            yield from _unguarded(operand["else"], known)
        else:
            for part in _parts(operand):
                yield from _unguarded(part, known)


def _implied(expression: Any) -> frozenset[Path]:
    """Paths that are there whenever the expression is true."""
    found = _NONE
    for operator, operand in _nodes(expression):
        if operator == "has":
            path = _tested(operand)
            found = _NONE if path is None else frozenset({path})
        elif operator in ("&&", "||"):
            left, right = _implied(operand["left"]), _implied(operand["right"])
            found = left | right if operator == "&&" else left & right
    return found


def _nodes(expression: Any) -> list[tuple[str, Any]]:
    return list(expression.items()) if isinstance(expression, Mapping) else []


def _parts(operand: Any) -> list[Any]:
    """The sub-expressions of any other operator: its named operands, or a list of arguments."""
    if isinstance(operand, Mapping):
        return [part for value in operand.values() for part in (value if isinstance(value, list) else [value])]
    return operand if isinstance(operand, list) else []


def _tested(operand: Mapping[str, Any]) -> Path | None:
    """The path that a `has` asks about, or None when it does not start at the context."""
    start, names = _path(operand["left"]), operand["attr"]
    return None if start is None else (*start, *([names] if isinstance(names, str) else names))


def _path(expression: Any) -> Path | None:
    """('a', 'b') for `context.a.b`; None for what does not start at the context."""
    if expression == {"Var": "context"}:
        return ()
    if isinstance(expression, Mapping) and set(expression) == {"."}:
        start = _path(expression["."]["left"])
        return None if start is None else (*start, expression["."]["attr"])
    return None


def _actions(scope: Mapping[str, Any], groups: bool) -> frozenset[str] | None:
    if scope["op"] == "All" or (scope["op"] == "in" and groups):
        return None
    entities = scope.get("entities") or [scope["entity"]]
    return frozenset(entity["id"] for entity in entities)
