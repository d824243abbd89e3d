"""Messages, calls and tools from the shapes in which people store them; and the order that turns must keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from posttrain.data.fields import Trace, compact, fail, from_json_text, want_list, want_object, want_text
from posttrain.data.records import Message, Role, ToolCall, ToolSpec

_ROLES: dict[str, Role] = {**{role: role for role in get_args(Role)}, "developer": "system", "function": "tool"}
_SPEAKERS: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "function_response": "tool", "tool": "tool",
}  # fmt: skip
_MESSAGE = frozenset({"role", "content", "tool_calls", "tool_call_id", "weight"})
_CALL = frozenset({"id", "type", "function", "name", "arguments"})
_FUNCTION = frozenset({"name", "description", "parameters"})
_ORDER = "order turns as [system], user, assistant (calls), tool, assistant, ..."


def openai_messages(value: Any, where: str, trace: Trace) -> tuple[Message, ...]:
    """A list of `{"role", "content", "tool_calls", "tool_call_id", "weight"}`; arguments may be JSON text or an object."""
    calls = 0
    messages = []
    for index, item in enumerate(want_list(value, where)):
        place = f"{where}[{index}]"
        row = want_object(item, place)
        trace.drop(row, _MESSAGE, f"{where}[]")
        role = _role(_ROLES, row.get("role"), f"{place}.role")
        found = want_list(row.get("tool_calls") or [], f"{place}.tool_calls")
        made = tuple(_call(call, calls + offset, f"{place}.tool_calls[{offset}]", trace) for offset, call in enumerate(found))
        calls += len(made)
        content = row.get("content")
        messages.append(
            Message(
                role,
                "" if content is None and made else _content(content, place, where, trace),
                made,
                None if row.get("tool_call_id") is None else want_text(row["tool_call_id"], f"{place}.tool_call_id"),
                _weight(row.get("weight"), f"{place}.weight"),
            )
        )
    return tuple(messages)


def sharegpt_messages(value: Any, where: str, trace: Trace) -> tuple[Message, ...]:
    """A list of `{"from", "value"}`. A `function_call` holds one or more calls as JSON; observations answer them in order."""
    messages: list[Message] = []
    calls, answered = 0, 0
    for index, item in enumerate(want_list(value, where)):
        place = f"{where}[{index}]"
        row = want_object(item, place)
        trace.drop(row, frozenset({"from", "value"}), f"{where}[]")
        role = _role(_SPEAKERS, row.get("from"), f"{place}.from")
        text = want_text(row.get("value"), f"{place}.value")
        if row["from"] == "function_call":
            found = from_json_text(text, f"{place}.value")
            listed = found if isinstance(found, list) else [found]
            made = tuple(_call(call, calls + offset, f"{place}.value", trace) for offset, call in enumerate(listed))
            calls += len(made)
            messages.append(Message("assistant", "", made))
        elif role == "tool":
            messages.append(Message("tool", text, (), f"call_{answered}" if answered < calls else None))
            answered += 1
        else:
            messages.append(Message(role, text))
            answered = calls
    return tuple(messages)


def tool_specs(value: Any, where: str, trace: Trace) -> tuple[ToolSpec, ...]:
    """A list of tools, or JSON text of one: each `{"name", "description", "parameters"}`, bare or inside `{"function": ...}`."""
    if value is None or value == "":
        return ()
    specs = []
    for index, item in enumerate(want_list(from_json_text(value, where), where)):
        place = f"{where}[{index}]"
        row = want_object(item, place)
        if "function" in row:
            row, place = want_object(row["function"], f"{place}.function"), f"{place}.function"
        trace.drop(row, _FUNCTION | {"type"}, f"{where}[]")
        parameters = want_object(row.get("parameters") or {}, f"{place}.parameters")
        if parameters.get("type", "object") != "object":
            fail(
                "must be a JSON Schema of type object",
                f"{place}.parameters.type",
                value=parameters["type"],
                remedy='use "object"',
            )
        description = want_text(row.get("description") or "", f"{place}.description")
        specs.append(ToolSpec(_name(row.get("name"), f"{place}.name"), description, {"type": "object", **parameters}))
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        fail("two tools share a name", where, value=names, remedy="name every tool once")
    return tuple(specs)


def check_turns(messages: Sequence[Message], where: str) -> None:
    """Raise DataError for turns that no template can render honestly: empty, out of order, or a result without its call."""
    pending: list[str] | None = None  # ids of calls that may still be answered; None outside calls and results
    for index, message in enumerate(messages):
        place = f"{where}[{index}]"
        if message.role == "system" and index > 0:
            fail("a system message after the first turn", f"{place}.role", remedy="keep one system message, at the start")
        if message.tool_calls and message.role != "assistant":
            fail("only an assistant calls tools", f"{place}.tool_calls", value=message.role, remedy=_ORDER)
        if message.role == "tool":
            pending = _answered(message, pending, place)
        elif message.role == "assistant":
            if not message.content and not message.tool_calls:
                fail("an assistant turn without text and without calls", place, remedy="remove the turn, or give it content")
            pending = [call.id for call in message.tool_calls] or None
        else:
            pending = None


def check_offered(messages: Sequence[Message], tools: Sequence[ToolSpec], where: str) -> None:
    """Raise DataError for a call of a tool that the row does not offer. Rows without tools may show them as text: not checked."""
    offered = {tool.name for tool in tools}
    for index, message in enumerate(messages):
        for call in message.tool_calls:
            if tools and call.name not in offered:
                remedy = f"offered: {', '.join(sorted(offered))}"
                fail("calls a tool that is not offered", f"{where}[{index}].tool_calls", value=call.name, remedy=remedy)


def _answered(message: Message, pending: list[str] | None, place: str) -> list[str]:
    if pending is None:
        fail("a tool result that answers no call", place, remedy=_ORDER)
    if message.tool_call_id is not None and message.tool_call_id not in pending:
        fail(
            "answers a call that is not open",
            f"{place}.tool_call_id",
            value=message.tool_call_id,
            remedy=f"open calls: {pending}",
        )
    return [call for call in pending if call != message.tool_call_id]


def _role(known: dict[str, Role], value: Any, where: str) -> Role:
    if not isinstance(value, str) or value not in known:
        fail("is no known role", where, value=value, remedy=f"use one of {', '.join(known)}")
    return known[value]


def _name(value: Any, where: str) -> str:
    if not want_text(value, where):
        fail("is empty", where, remedy="name the tool")
    return str(value)


def _call(value: Any, number: int, where: str, trace: Trace) -> ToolCall:
    row = want_object(value, where)
    trace.drop(row, _CALL, "tool_calls[]")
    inner = want_object(row["function"], f"{where}.function") if "function" in row else row
    arguments = inner.get("arguments")
    trace.argument_objects = trace.argument_objects or isinstance(arguments, dict)
    parsed = from_json_text(arguments or {}, f"{where}.arguments")
    want_object(parsed, f"{where}.arguments")
    identity = f"call_{number}" if row.get("id") is None else want_text(row["id"], f"{where}.id")
    text = arguments if isinstance(arguments, str) and arguments else _json_text(parsed, f"{where}.arguments")
    return ToolCall(identity, _name(inner.get("name"), f"{where}.name"), text)


def _json_text(value: Any, where: str) -> str:
    try:
        return compact(value)
    except ValueError as error:
        fail(f"has no JSON form ({error})", where, remedy="use finite numbers")


def _content(value: Any, place: str, where: str, trace: Trace) -> str:
    """Text, or the text parts of a list of parts. Reasoning is left out and noted; pictures and sound are refused."""
    if not isinstance(value, list):
        return want_text(value, f"{place}.content")
    texts = []
    for index, item in enumerate(value):
        spot = f"{place}.content[{index}]"
        part = want_object(item, spot)
        kind = part.get("type")
        if kind in ("reasoning", "thinking"):
            trace.dropped.add(f"{where}[].content[{kind}]")
        elif kind in ("text", "input_text", "output_text", "refusal"):
            texts.append(want_text(part.get("text", part.get("refusal", part.get("value"))), f"{spot}.text"))
        else:
            fail(
                "a content part that is not text", f"{spot}.type", value=kind, remedy="this is a text model: keep text parts only"
            )
    return "\n".join(texts)


def _weight(value: Any, where: str) -> bool:
    if value not in (None, 0, 1):
        fail("must be 0 (read only) or 1 (learn)", where, value=value, remedy="write 0 or 1")
    return value is None or bool(value)
