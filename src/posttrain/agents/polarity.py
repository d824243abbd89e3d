"""Which attributes could let a call through by not being there?

`context has x` is false when x is missing. Where that can only make a policy stricter it is safe: `permit when (context has
approvals && ...)`. Where it can make it laxer it is not: `forbid when (context has amount && context.amount > 10)` does not
apply to a call without an amount. A `has` counts as unsafe when its falsehood can move the decision towards Allow: read
through `&&`, `||`, `!` and the branches of `if`; anywhere else it counts as unsafe, because what it does there is not followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Needs:
    """Attributes of the context that one policy needs, and the actions it is about (None: every action)."""

    paths: frozenset[Path]
    actions: frozenset[str] | None

    def of(self, action: str) -> frozenset[Path]:
        return self.paths if self.actions is None or action in self.actions else frozenset()


def must_be_present(policy: Mapping[str, Any], *, groups: bool) -> Needs:
    """Needs of a policy in Cedar's JSON form. `groups`: actions may belong to groups, so `in` may mean any action."""
    permit = policy["effect"] == "permit"
    paths: set[Path] = set()
    for condition in policy["conditions"]:
        towards_allow = permit == (condition["kind"] == "when")
        paths.update(_unsafe(condition["body"], towards_allow))
    return Needs(frozenset(paths), _actions(policy["action"], groups))


def _unsafe(expression: Any, towards_allow: bool | None) -> Iterator[Path]:
    """Paths of unsafe `has`; towards_allow: whether the truth of the expression helps the caller (None: not known)."""
    if isinstance(expression, list):
        for item in expression:
            yield from _unsafe(item, None)
    if not isinstance(expression, Mapping):
        return
    for operator, operand in expression.items():
        if operator == "has":
            path = _path(operand["left"])
            if path is not None and not towards_allow:
                names = operand["attr"]
                yield (*path, *([names] if isinstance(names, str) else names))
            yield from _unsafe(operand["left"], None)
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
            values = operand.values() if isinstance(operand, Mapping) else [operand]
            for value in values:
                yield from _unsafe(value, None)


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
