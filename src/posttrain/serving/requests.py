"""The OpenAI chat request as it arrives, checked part by part. What would be ignored without a word is refused instead."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain.data.fields import Trace, strict_json
from posttrain.data.messages import check_offered, check_turns, openai_messages, tool_specs
from posttrain.data.records import Message, ToolSpec
from posttrain.errors import DataError, nearest
from posttrain.sampling.protocol import SampleOptions
from posttrain.serving.engine import CompletionRequest

# Parameters whose only accepted value is the one that asks for nothing; parameters that never change an answer.
_NEUTRAL = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "logit_bias": ({},), "store": (False,), "functions": (), "function_call": (),
}  # fmt: skip
_INERT = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")
_MOST_STOPS, _DEEPEST = 4, 64
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class BadRequest(DataError):
    """The request cannot be answered as it stands. `param` names the part, as OpenAI's errors do."""

    def __init__(
        self, what: str, *, param: str | None, value: object = None, remedy: str | None = None, status: int = 400
    ) -> None:
        super().__init__(what, where=param, value=value, remedy=remedy)
        self.param, self.status = param, status


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for, and how requests are put together.

    body: bytes of a request; max_tokens: most tokens of an answer; default_tokens, temperature: what a request that does not say
    gets (greedy, as the release was measured); waiting: requests queued at once; batch: requests run together; window: seconds
    the first of an idle server waits for others.
    """

    body: int = 1 << 20
    max_tokens: int = 1024
    default_tokens: int = 256
    temperature: float = 0.0
    waiting: int = 64
    batch: int = 16
    window: float = 0.005


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked request: what to draw (adapter not yet known), for which model name, and how to send it."""

    model: str
    completion: CompletionRequest
    stream: bool
    include_usage: bool


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Schema(_Part):
    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class _Format(_Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None


class _StreamOptions(_Part):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Body(_Part):
    model: str
    messages: list[Any]
    tools: list[Any] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: _Format | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    parallel_tool_calls: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


def parse_chat(data: bytes, limits: Limits) -> ChatRequest:
    """A request body as a ChatRequest. Raises DataError (BadRequest among them) naming the part, what was found and what to do."""
    body = _validated(_known_fields(_json(data)))
    offered = tool_specs(body.tools, "tools", Trace())
    tools = () if body.tool_choice == "none" else offered
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > _MOST_STOPS:
        raise BadRequest("too many stop texts", param="stop", value=len(stop), remedy=f"at most {_MOST_STOPS}")
    if "" in stop:
        raise BadRequest("an empty stop text would cut every answer", param="stop", remedy="remove it")
    options = SampleOptions(
        _budget(body, limits),
        limits.temperature if body.temperature is None else body.temperature,
        1.0 if body.top_p is None else body.top_p,
    )
    seed = secrets.randbits(31) if body.seed is None else body.seed % 2**63
    completion = CompletionRequest(
        _messages(body.messages, offered), tools, _schema(body.response_format), None, options, seed, tuple(stop)
    )
    if body.parallel_tool_calls is False:
        completion = replace(completion, max_calls=1)
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    return ChatRequest(body.model, completion, bool(body.stream), include_usage)


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = strict_json(data.decode())
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON ({error})", param=None, remedy="send one JSON object in UTF-8") from error
    if not isinstance(value, dict):
        raise BadRequest("the body is not a JSON object", param=None, remedy="send one JSON object")
    _check_tree(value, 0)
    return value


def _check_tree(value: Any, depth: int) -> None:
    """Refuse here what would fail deep inside, where it would take the whole batch with it: half characters, endless nesting."""
    if depth > _DEEPEST:
        raise BadRequest(
            "the body is nested too deeply", param=None, value=f"more than {_DEEPEST} levels", remedy="flatten the schema"
        )
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRequest("a text holds half of a surrogate pair", param=None, remedy="send whole characters") from error
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_tree(key, depth)
            _check_tree(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_tree(item, depth + 1)


def _known_fields(value: dict[str, Any]) -> dict[str, Any]:
    """The fields that matter. A field that asks for what is not done here is refused; so is one nobody knows."""
    kept = {}
    for name, item in value.items():
        if item is None or name in _INERT:
            continue
        if name in _NEUTRAL:
            if item not in _NEUTRAL[name]:
                raise BadRequest("not supported here", param=name, value=item, remedy="leave it out")
        elif name not in _Body.model_fields:
            raise BadRequest("unknown parameter", param=name, remedy=nearest(name, _Body.model_fields) or "leave it out")
        else:
            kept[name] = item
    return kept


def _validated(value: dict[str, Any]) -> _Body:
    try:
        return _Body.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # a union's branch ("str", "list[...]") is not a part of the request
        param = ".".join(str(part) for part in first["loc"] if part != "str" and "[" not in str(part))
        found = None if isinstance(first["input"], dict | list) else first["input"]
        raise BadRequest(first["msg"], param=param, value=found, remedy="see OpenAI's chat completions request") from error


def _budget(body: _Body, limits: Limits) -> int:
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if asked is not None and asked > limits.max_tokens:
        raise BadRequest(
            "more tokens than this server gives", param=name, value=asked, remedy=f"ask for at most {limits.max_tokens}"
        )
    return min(limits.default_tokens, limits.max_tokens) if asked is None else asked


def _schema(response_format: _Format | None) -> Mapping[str, Any] | None:
    """json_schema is always enforced, whatever `strict` says: a schema that is only hoped for helps nobody."""
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return _ANY_OBJECT
    if response_format.json_schema is None:
        raise BadRequest("json_schema is missing", param="response_format.json_schema", remedy="give {name, schema, strict}")
    return response_format.json_schema.schema_


def _messages(value: list[Any], tools: tuple[ToolSpec, ...]) -> tuple[Message, ...]:
    """The messages as records are read, so that a prompt is what training saw. Unknown fields are clients' echoes of earlier
    answers (refusal, annotations, ...) and say nothing. Raises DataError."""
    messages = openai_messages(value, "messages", Trace())
    check_turns(messages, "messages")
    check_offered(messages, tools, "messages")
    if not messages or messages[-1].role not in ("user", "tool"):
        raise BadRequest("there is nothing to answer", param="messages", remedy="end with a user message or a tool result")
    return messages
