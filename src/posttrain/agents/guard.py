"""Who may call what: Cedar policies, asked before every tool call. Whatever is unclear is denied.

Cedar skips a policy that fails to evaluate: a `forbid` that reads a missing attribute would silently not apply. Four things
close that door: policies are validated when they are loaded, those that could never apply are refused then, any error during
evaluation denies, and an attribute whose absence could help the caller must be present (see `polarity`). So taking an attribute
away never turns Deny into Allow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from posttrain.agents.polarity import Needs, must_be_present, needs_entities
from posttrain.agents.world import Environment, World
from posttrain.errors import PosttrainError

_INT64 = range(-(2**63), 2**63)
_DECIMALS = 10**15  # Cedar's decimals are smaller
_NAMED = re.compile(r"`(policy\d+)`")


class PolicyError(PosttrainError, ValueError):
    """Policies or their schema cannot be read, do not fit together, or hold what cannot be judged safely."""


class Ruling(StrEnum):
    """Why a call is allowed or denied."""

    PERMITTED = "permitted"  # a permit applies and no forbid does
    FORBIDDEN = "forbidden"  # a forbid applies
    NOT_PERMITTED = "not_permitted"  # no permit applies: everything that is not allowed is denied
    MISSING_CONTEXT = "missing_context"  # an attribute that a policy depends on is not there
    POLICY_ERROR = "policy_error"  # a policy or the request could not be evaluated


@dataclass(frozen=True, slots=True)
class Decision:
    """allowed only when PERMITTED. `reasons`: the `@id` of each policy that decided (its position where it has none), the
    missing attributes, or the policies that failed; `detail` says more for people."""

    allowed: bool
    ruling: Ruling
    reasons: tuple[str, ...] = ()
    detail: str = ""

    @property
    def reason(self) -> str:
        """One word for logs and for the model: the first deciding policy, or the ruling."""
        return self.reasons[0] if self.ruling is Ruling.FORBIDDEN and self.reasons else str(self.ruling)


@runtime_checkable
class SuppliesContext(Protocol):
    """A world that tells the guard the facts of a call, from its records and not from what the model claims."""

    def guard_context(self, name: str, arguments: Mapping[str, Any], environment: Environment) -> Mapping[str, Any]: ...


@runtime_checkable
class SuppliesSchema(Protocol):
    """A world whose permissions come with a Cedar schema."""

    def permissions_schema(self) -> str: ...


class Guard:
    """Cedar policies, parsed once. Principal `Tenant::"name"`, action `Action::"tool"`, resource `Tool::"tool"`."""

    def __init__(self, policies: str, schema: str | None = None) -> None:
        """`schema`: Cedar schema text; policies are validated against it now and every request's context later. Raises PolicyError."""
        self._cedar = _cedar()
        try:
            self._policies = self._cedar.PolicySet.from_str(policies)
            parsed = json.loads(self._cedar.policies_to_json_str(policies))
            tree = parsed["staticPolicies"]
            self._schema = None if schema is None else self._cedar.Schema.from_str(schema)
        except ValueError as error:
            raise PolicyError(f"cannot be read ({error})", where="permissions", remedy="correct the Cedar text") from error
        if parsed["templates"]:
            name = next(policy.get("annotations", {}).get("id") or key for key, policy in parsed["templates"].items())
            remedy = "write the policy out for each principal and resource"
            raise PolicyError("is a template, which nothing fills in", where="permissions", value=name, remedy=remedy)
        if schema is not None:
            self._validate(policies)
        self.ids: Mapping[str, str] = {key: policy.get("annotations", {}).get("id") or key for key, policy in tree.items()}
        for key, policy in tree.items():
            _check(policy, self.ids[key], groups=schema is not None)
        self._needs: tuple[Needs, ...] = tuple(must_be_present(policy, groups=schema is not None) for policy in tree.values())

    @classmethod
    def of(cls, world: World) -> Guard:
        """The guard of a world's permissions, with its schema where it has one."""
        return cls(world.permissions(), world.permissions_schema() if isinstance(world, SuppliesSchema) else None)

    def authorise(
        self, tenant: str | None, tool: str, arguments: Mapping[str, Any], context: Mapping[str, Any] | None = None
    ) -> Decision:
        """May this tenant make this call? `context` is what the policies read; without one they read the arguments.

        Never raises for a request: what cannot be asked is denied.
        """
        facts = arguments if context is None else context
        missing = sorted({".".join(path) for needs in self._needs for path in needs.of(tool) if not _present(facts, path)})
        if missing:
            return Decision(False, Ruling.MISSING_CONTEXT, tuple(missing), "attributes that a policy depends on are not there")
        try:
            _no_escape(facts)
            request = {
                "principal": {"type": "Anonymous", "id": ""} if tenant is None else {"type": "Tenant", "id": tenant},
                "action": {"type": "Action", "id": tool},
                "resource": {"type": "Tool", "id": tool},
                "context": {key: _cedar_value(value) for key, value in facts.items() if value is not None},
            }
            result = self._cedar.is_authorized(request, self._policies, [], schema=self._schema)
        except (ValueError, ArithmeticError, RecursionError) as error:  # half a surrogate pair in a text is a ValueError too
            return Decision(False, Ruling.POLICY_ERROR, (), str(error))
        return self._decide(result)

    def _decide(self, result: Any) -> Decision:
        errors = list(result.diagnostics.errors)
        if errors:
            failed = tuple(dict.fromkeys(self.ids.get(key, key) for error in errors for key in _NAMED.findall(error)))
            return Decision(False, Ruling.POLICY_ERROR, failed, "; ".join(errors))
        reasons = tuple(sorted(self.ids.get(key, key) for key in result.diagnostics.reasons))
        if result.allowed:
            return Decision(True, Ruling.PERMITTED, reasons)
        return Decision(False, Ruling.FORBIDDEN if reasons else Ruling.NOT_PERMITTED, reasons)

    def _validate(self, policies: str) -> None:
        result = self._cedar.validate_policies(policies, self._schema)
        if not result.validation_passed:
            first = "; ".join(str(error) for error in result.errors[:3])
            remedy = "correct the policies or the schema"
            raise PolicyError(f"do not fit their schema: {first}", where="permissions", remedy=remedy)


def _cedar() -> Any:
    try:
        import cedarpy
    except ImportError as error:
        remedy = "install posttrain[permissions]"
        raise PolicyError("the permission engine is not installed", where="permissions", remedy=remedy) from error
    return cedarpy


def _check(policy: Mapping[str, Any], name: str, *, groups: bool) -> None:
    """Raise PolicyError for a policy in Cedar's JSON form that cannot be judged safely."""
    if "Record" in _operators(policy["conditions"]):
        raise PolicyError(
            "compares with a whole record, which a missing attribute silently makes unequal",
            where="permissions",
            value=name,
            remedy="compare attribute by attribute",
        )
    asked = needs_entities(policy, groups=groups)
    if asked is not None:
        raise PolicyError(
            f"asks for {asked}, but a request brings no entity's groups, attributes or tags, so it would never apply",
            where="permissions",
            value=name,
            remedy="compare with ==, list the actions or give a schema with their groups, or read a fact from the context",
        )


def _cedar_value(value: Any) -> Any:
    """A JSON value as Cedar reads it: no nulls (an absent attribute says that), fractions as decimals. Raises ValueError."""
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        if value not in _INT64:
            raise ValueError(f"a number beyond 64 bits: {value}")
        return value
    if isinstance(value, float | Decimal):
        return {"__extn": {"fn": "decimal", "arg": _four_digits(value)}}
    if isinstance(value, Mapping):
        return {str(key): _cedar_value(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_cedar_value(item) for item in value]
    raise ValueError(f"a value that no policy can read: {type(value).__name__}")


def _four_digits(value: float | Decimal) -> str:
    number = Decimal(str(value))
    if not number.is_finite() or abs(number) >= _DECIMALS or number != round(number, 4):
        raise ValueError(f"a fraction of more than four digits, or beyond what Cedar reads: {value}")
    return f"{number:.4f}"


def _no_escape(value: Any) -> None:
    """Cedar reads `{"__entity": ...}` and `{"__extn": ...}` as more than data; a model must not be able to write them."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if str(key).startswith("__"):
                raise ValueError(f"a reserved name: {key}")
            _no_escape(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _no_escape(item)


def _present(facts: Any, path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(facts, Mapping) or facts.get(name) is None:
            return False
        facts = facts[name]
    return True


def _operators(expression: Any) -> set[str]:
    if isinstance(expression, Mapping):
        return set(expression) | {name for value in expression.values() for name in _operators(value)}
    return {name for item in expression for name in _operators(item)} if isinstance(expression, list) else set()
