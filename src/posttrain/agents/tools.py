"""One tool call, from the model's text to its outcome: offered, parsed, valid, asked for, permitted, then executed. Every other way
ends in a refusal that the model can read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jsonschema_rs

from posttrain.agents.guard import Guard, SuppliesContext
from posttrain.agents.world import Environment, World
from posttrain.data.records import Message, ToolCall, ToolOutcome, ToolSpec
from posttrain.errors import DataError, GrammarError
from posttrain.grammar import needs_user, only_said

_log = logging.getLogger(__name__)


class Toolbox:
    """The tools offered to one tenant in one episode, with the guard before them. `environment` opens the world when first needed."""

    def __init__(
        self, tools: Sequence[ToolSpec], tenant: str | None, world: World, guard: Guard, environment: Callable[[], Environment]
    ) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._tenant, self._world, self._guard, self._environment = tenant, world, guard, environment

    def run(self, call: ToolCall, messages: Sequence[Message]) -> ToolOutcome:
        """Execute the call if it is offered, well-formed and permitted, and the user said what `x-grounded: user` asks of them in
        `messages`, the conversation before it. Never raises: an outcome says what went wrong."""
        if call.name not in self._tools:
            return _failed(call, "unknown_tool", f"offered: {', '.join(self._tools) or 'none'}")
        arguments = _parse(call.arguments)
        if arguments is None:
            return _failed(call, "invalid_arguments", "the arguments must be one JSON object")
        problem = _problem(validator_of(self._tools[call.name]), arguments)
        if problem is not None:
            return _failed(call, "invalid_arguments", problem[:300])
        denied = _unsaid(self._tools[call.name], arguments, messages) or self._denied(call.name, arguments)
        if denied is not None:
            return ToolOutcome(call, _error("denied", denied), False, denied)
        return self._execute(call, arguments)

    def _denied(self, name: str, arguments: Mapping[str, Any]) -> str | None:
        """The guard's reason to refuse, or None."""
        context: Mapping[str, Any] | None = None
        if isinstance(self._world, SuppliesContext):
            try:
                context = self._world.guard_context(name, arguments, self._environment())
            except Exception:  # facts that cannot be had are no reason to go on
                _log.exception("no guard context for %s", name)
                return "no_context"
        decision = self._guard.authorise(self._tenant, name, arguments, context)
        return None if decision.allowed else decision.reason

    def _execute(self, call: ToolCall, arguments: Mapping[str, Any]) -> ToolOutcome:
        try:
            result = self._environment().call(call.name, arguments, tenant=self._tenant)
        except Exception as error:  # arguments are the model's: a tool that chokes on them must not end the other episodes
            _log.warning("tool %s failed", call.name, exc_info=True)
            return _failed(call, "tool_failed", type(error).__name__)
        return ToolOutcome(call, result.content, result.ok)


def _unsaid(tool: ToolSpec, arguments: Mapping[str, Any], messages: Sequence[Message]) -> str | None:
    """Why a call is denied that holds a value which only the user may give, and did not; None when it holds none."""
    if not needs_user(tool.parameters):
        return None
    try:
        parameters = only_said(tool, messages)
    except GrammarError:  # what cannot be searched for was not found
        _log.warning("the values of %s cannot be looked for", tool.name, exc_info=True)
        return "not_said_by_user"
    said = parameters is not None and jsonschema_rs.validator_for(dict(parameters), offline=True).is_valid(arguments)
    return None if said else "not_said_by_user"


_VALIDATORS: dict[str, Any] = {}


def validator_of(tool: ToolSpec) -> Any:
    """A compiled validator of the tool's arguments. Raises DataError when its parameters are no JSON Schema."""
    text = json.dumps({**tool.parameters, "type": "object"}, sort_keys=True)
    if text not in _VALIDATORS:
        try:
            _VALIDATORS[text] = jsonschema_rs.validator_for(json.loads(text), offline=True)
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise DataError(
                f"its parameters are no JSON Schema: {reason}", where=f"tool {tool.name}", remedy="correct them"
            ) from error
    return _VALIDATORS[text]


def _problem(validator: Any, arguments: Mapping[str, Any]) -> str | None:
    """The first rule that the arguments break, or None."""
    try:
        first = next(iter(validator.iter_errors(arguments)), None)
    except ValueError as error:  # nested too deeply, or half of a surrogate pair
        return f"cannot be read: {error}"
    if first is None:
        return None
    path = "/".join(str(part) for part in first.instance_path)
    return f"{path + ': ' if path else ''}{first.message}"


def _parse(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _failed(call: ToolCall, code: str, detail: str) -> ToolOutcome:
    return ToolOutcome(call, _error(code, detail), False)


def _error(code: str, detail: str) -> str:
    return json.dumps({"error": code, "detail": detail}, ensure_ascii=False, separators=(",", ":"))
