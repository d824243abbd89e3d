"""Answers and errors in OpenAI's shapes.

The answer is drawn and checked whole, then sent; a stream is the finished answer in pieces. So nothing unchecked ever leaves, and
a stream costs the wait for its last token before its first.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from posttrain.contract import MalformedCall
from posttrain.errors import (
    BindingError,
    ContractError,
    DataError,
    GateError,
    GrammarError,
    IntegrityError,
    PosttrainError,
    RegistryError,
    StorageError,
)
from posttrain.serving.batcher import Overloaded
from posttrain.serving.engine import Abandoned, Completion, InvalidAnswer
from posttrain.serving.requests import BadRequest
from posttrain.serving.router import Refused

_PIECE = 24  # characters of content or arguments per streamed chunk
CLIENT_GONE = 499  # nginx's number for a client that did not wait; nobody receives it, the audit log keeps it


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer under its identity: id and time are the same in every chunk."""

    id: str
    created: int
    model: str
    message: dict[str, Any]
    finish: str
    usage: dict[str, int]

    @classmethod
    def of(cls, completion: Completion, model: str) -> Reply:
        calls = [
            {
                "id": f"call_{uuid.uuid4().hex[:20]}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in completion.message.tool_calls
        ]
        content = completion.message.content
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        used = {"prompt_tokens": completion.prompt_tokens, "completion_tokens": completion.completion_tokens}
        usage = {**used, "total_tokens": sum(used.values())}
        return cls(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model, message, completion.finish.value, usage)

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choice = {"index": 0, "message": self.message, "logprobs": None, "finish_reason": self.finish}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage}

    def events(self, include_usage: bool) -> Iterator[bytes]:
        """The answer as server-sent events, ending with `[DONE]`."""
        for delta in self._deltas():
            yield self._event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])
        yield self._event([{"index": 0, "delta": {}, "logprobs": None, "finish_reason": self.finish}])
        if include_usage:
            yield self._event([], self.usage)
        yield b"data: [DONE]\n\n"

    def _deltas(self) -> Iterator[dict[str, Any]]:
        yield {"role": "assistant", "content": ""}
        for piece in _pieces(self.message["content"] or ""):
            yield {"content": piece}
        for index, call in enumerate(self.message.get("tool_calls", ())):
            yield {"tool_calls": [{**call, "index": index, "function": {"name": call["function"]["name"], "arguments": ""}}]}
            for piece in _pieces(call["function"]["arguments"]):
                yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        body = {**self._head("chat.completion.chunk"), "choices": choices, "usage": usage}
        return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as the client sees it. `retry` tells OpenAI's clients whether the same request may fare better."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    retry: bool = False

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Which status, type and code an error has. Errors about our own files keep their paths out of the message."""
        match error:
            case Refused():
                return cls(error.status, error.type, error.reason.value, str(error))
            case BadRequest():
                code = "request_too_large" if error.status == 413 else "invalid_request"
                return cls(error.status, "invalid_request_error", code, str(error), error.param)
            case MalformedCall():
                return cls(502, "model_error", "malformed_tool_call", f"{error.what}; nothing was called")
            case InvalidAnswer():
                return cls(502, "model_error", "invalid_answer", str(error))
            case GrammarError():
                return cls(400, "invalid_request_error", "unsupported_schema", str(error), "response_format or tools")
            case DataError():
                return cls(400, "invalid_request_error", "invalid_request", str(error), error.where)
            case Overloaded():
                return cls(503, "server_error", "overloaded", str(error), retry=True)
            case Abandoned():
                return cls(CLIENT_GONE, "client_error", "client_closed_request", error.what)
            case BindingError() | ContractError() | GateError() | IntegrityError() | RegistryError() | StorageError():
                return cls(503, "server_error", "not_servable", f"{error.what}; the operator finds the details in the audit log")
            case PosttrainError():
                return cls(500, "server_error", "internal_error", error.what)
        return cls(500, "server_error", "internal_error", "the server failed; the operator finds the details in its log")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {"x-should-retry": "true" if self.retry else "false"}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers | ({"retry-after": "1"} if self.retry else {})


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), _PIECE):
        yield text[start : start + _PIECE]
