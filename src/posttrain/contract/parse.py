"""From the text of an assistant turn back to a Message. What looks like a call but is not one is an error, never prose."""

from __future__ import annotations

import json
from typing import Any

from posttrain.contract.template import CALL_CLOSE, CALL_OPEN, compact_json
from posttrain.data.records import Message, ToolCall
from posttrain.errors import ContractError


class MalformedCall(ContractError):
    """An assistant turn opens a tool call and does not complete a valid one."""


def parse_turn(text: str) -> Message:
    """Split `content<tool_call>{...}</tool_call>...`; call ids are positional (`call_0`, `call_1`).

    A call ends where its JSON ends, not at the next marker: an argument may quote `</tool_call>` without closing anything, and so may a
    string of a turn that is one JSON object or list.
    """
    if _is_document(text):
        return Message("assistant", text)
    head, opened, rest = text.partition(CALL_OPEN)
    if CALL_CLOSE in head:
        raise _malformed("a call is closed that was never opened", text)
    calls: list[ToolCall] = []
    while opened:
        call, rest = _call(rest, len(calls), text)
        calls.append(call)
        between, opened, rest = rest.partition(CALL_OPEN)
        if between.strip():
            raise _malformed(f"text follows call {len(calls) - 1}", text)
    return Message("assistant", head.strip() if calls else head, tuple(calls))


def _is_document(text: str) -> bool:
    if not text.startswith(("{", "[")) or not (CALL_OPEN in text or CALL_CLOSE in text):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _call(part: str, index: int, text: str) -> tuple[ToolCall, str]:
    """The call that `part` begins with, and the text after its closing marker."""
    body = part.lstrip()
    try:
        value, end = _DECODER.raw_decode(body)
        compact = compact_json(value)
        compact.encode("utf-8")  # an escaped half of a surrogate pair is legal JSON but no text
    except (ValueError, RecursionError) as error:
        raise _malformed(f"call {index} is not JSON ({error})", text) from error
    after = body[end:].lstrip()
    if not after.startswith(CALL_CLOSE):
        raise _malformed(f"call {index} is not closed with {CALL_CLOSE}", text)
    if not isinstance(value, dict) or set(value) != {"name", "arguments"}:
        raise _malformed(f"call {index} must hold exactly `name` and `arguments`", text)
    if not isinstance(value["name"], str) or not isinstance(value["arguments"], dict):
        raise _malformed(f"call {index} needs a text name and object arguments", text)
    return ToolCall(f"call_{index}", value["name"], compact_json(value["arguments"])), after[len(CALL_CLOSE) :]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key occurs twice")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates)


def _malformed(what: str, text: str) -> MalformedCall:
    return MalformedCall(
        what, where="assistant turn", value=text, remedy="constrain the turn with a grammar, or train on more tool trajectories"
    )
