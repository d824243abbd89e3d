"""Records as rows of our own JSON-lines shape: OpenAI's messages and tools with our fields beside them. Defaults are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.data.records import Conversation, Message, Preference, Task, ToolSpec


def to_row(record: Conversation | Preference | Task) -> dict[str, Any]:
    """The record as JSON values. The readers turn it back into an equal record."""
    if isinstance(record, Conversation):
        body: dict[str, Any] = {"shape": str(record.shape), "messages": _messages(record.messages)}
    elif isinstance(record, Preference):
        sides = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
        body = {key: _messages(messages) for key, messages in sides.items()}
    else:
        body = _task(record)
    row: dict[str, Any] = {"id": record.id, "tenant": record.tenant, **body, "tools": _tools(record.tools), "split": record.split}
    if not isinstance(record, Task):
        row |= {"source": record.source, "licence": record.licence}
    # an empty response schema means any JSON, which no schema does not: it stays
    return {
        key: value for key, value in row.items() if value not in (None, "", [], {}) or (key == "response_schema" and value == {})
    }


def _task(task: Task) -> dict[str, Any]:
    return {
        "kind": task.kind,
        "messages": _messages(task.messages),
        "verifier": task.verifier,
        "arguments": dict(task.arguments),
        "environment": dict(task.environment),
        "response_schema": None if task.response_schema is None else dict(task.response_schema),
        "high_risk": task.high_risk,
        "max_turns": task.max_turns,
        "demonstration": _messages(task.demonstration),
    }


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [_message(message) for message in messages]


def _message(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        row["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        row["tool_call_id"] = message.tool_call_id
    if not message.learn:
        row["weight"] = 0
    return row


def _tools(tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)},
        }
        for tool in tools
    ]
