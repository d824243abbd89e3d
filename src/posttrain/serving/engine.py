"""From a chat request to an answer: render, sample under a grammar, parse. The same road evaluation takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

import jsonschema_rs

from posttrain.contract import CALL_OPEN, MalformedCall
from posttrain.data.records import Message, StopReason, ToolSpec
from posttrain.errors import ContractError, DataError, PosttrainError
from posttrain.grammar import Grammar, json_grammar, shown, text_grammar, turn_grammar
from posttrain.sampling.protocol import Sample, SampleOptions, SampleRequest, Stream, StreamSampler


class Finish(StrEnum):
    """Why an answer ended, in OpenAI's words."""

    STOP = "stop"  # the model closed its turn, or a stop text was reached
    LENGTH = "length"  # the budget was spent: the text is a prefix and none of its calls may be run
    TOOL_CALLS = "tool_calls"  # the turn asks for the calls it carries


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One answer to draw. `response_schema` None means free text; `stop` texts cut the content where they
    first occur; `max_calls` bounds the tool calls of the turn."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    response_schema: Mapping[str, Any] | None = None
    adapter: str | None = None
    options: SampleOptions = field(default_factory=SampleOptions)
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_calls: int = 2
    scope: str | None = None

    def on(self, adapter: str | None, scope: str | None = None) -> CompletionRequest:
        """The same request for one adapter (None: the dense weights themselves), of one scope (`SampleRequest.scope`)."""
        return replace(self, adapter=adapter, scope=scope)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request with what to draw for it."""

    request: CompletionRequest
    drawn: SampleRequest


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer. Tokens are counted as the model read and wrote them, the end-of-turn token included."""

    message: Message
    finish: Finish
    prompt_tokens: int
    completion_tokens: int


class Engine(Protocol):
    """What the server asks of a model."""

    def prepare(self, request: CompletionRequest) -> Prepared:
        """All that can be done for a request before the model is needed; raises what is wrong with it. Called by any thread: a long text
        takes a while, and the running batch must not wait for it."""
        ...

    def open(self, rows: int) -> Stream[Prepared, Completion]:
        """A stream that answers up to `rows` requests together; one that cannot be answered has its error as its result. Used by one
        thread."""
        ...


class Abandoned(PosttrainError):
    """The client went away."""


class InvalidAnswer(PosttrainError):
    """The model finished an answer or a call that its schema does not accept. `value` quotes it."""


class Turns(Protocol):
    """The part of a Contract an engine uses."""

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]: ...

    def parse(self, ids: Sequence[int]) -> Message: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ContractEngine:
    """Answers through a contract and a sampler. Every turn is constrained: valid calls, a valid answer, text, or a prefix of these."""

    def __init__(self, contract: Turns, sampler: StreamSampler, context: int) -> None:
        """`context` is the number of tokens the model can hold, prompt and answer together."""
        self.contract, self.sampler, self.context = contract, sampler, context

    def open(self, rows: int) -> ContractStream:
        """See `Engine.open`."""
        return ContractStream(self, self.sampler.open(rows))

    def prepare(self, request: CompletionRequest) -> Prepared:
        """See `Engine.prepare`. Raises DataError for messages that cannot be rendered or do not fit, GrammarError for a schema that cannot
        be enforced."""
        try:
            prompt = tuple(self.contract.prompt_ids(request.messages, request.tools))
        except ContractError as error:  # the request's fault, not the artifact's
            raise DataError(error.what, where="messages", value=error.value, remedy=error.remedy) from error
        if len(prompt) + request.options.max_tokens > self.context:
            raise DataError(
                f"the prompt has {len(prompt)} tokens and the answer may have {request.options.max_tokens}",
                where="messages",
                remedy=f"together they must fit into {self.context}: shorten the messages or lower max_tokens",
            )
        drawn = SampleRequest(prompt, request.seed, request.options, _grammar(request), request.adapter, request.scope)
        return Prepared(request, drawn)

    def answer(self, asked: Prepared, sample: Sample | Exception) -> Completion | Exception:
        """The completion that a sample holds, or what is wrong with it."""
        if isinstance(sample, Exception):
            return sample
        try:
            return self._read(asked.request, sample, (len(asked.drawn.prompt), len(sample.ids)))
        except Exception as error:  # even a fault of ours must not fail the requests that run beside this one
            return error

    def _read(self, request: CompletionRequest, sample: Sample, counts: tuple[int, int]) -> Completion:
        if sample.stop is not StopReason.END_OF_TURN:
            return self._prefix(request, sample, counts)
        message = _offered(self.contract.parse(sample.ids), request.tools)
        message, was_cut = _cut(message, request.stop)
        broken = None if was_cut else _broken_rule(message, request)
        if broken is not None:
            raise broken
        return Completion(message, Finish.TOOL_CALLS if message.tool_calls else Finish.STOP, *counts)

    def _prefix(self, request: CompletionRequest, sample: Sample, counts: tuple[int, int]) -> Completion:
        """An answer cut by its budget: its text as it stands and no calls, unless a stop text came first. One that its grammar closed is
        whole in form."""
        text = self.contract.decode(sample.ids[:-1] if sample.stop is StopReason.CLOSED else sample.ids)
        content, _, _ = text.partition(CALL_OPEN)
        message, was_cut = _cut(Message("assistant", content), request.stop)
        return (
            Completion(message, Finish.STOP, *counts)
            if was_cut
            else Completion(Message("assistant", text), Finish.LENGTH, *counts)
        )


class ContractStream:
    """Implements `Stream`: completions over a stream of samples, under its tickets."""

    def __init__(self, engine: ContractEngine, samples: Stream[SampleRequest, Sample]) -> None:
        self._engine, self._samples = engine, samples
        self._asked: dict[int, Prepared] = {}

    def admit(self, requests: Sequence[Prepared]) -> list[int]:
        """See `Stream.admit`."""
        tickets = self._samples.admit([asked.drawn for asked in requests])
        self._asked.update(zip(tickets, requests, strict=True))
        return tickets

    def step(self) -> dict[int, Completion | Exception]:
        """See `Stream.step`."""
        return {ticket: self._engine.answer(self._asked.pop(ticket), sample) for ticket, sample in self._samples.step().items()}

    def cancel(self, ticket: int) -> None:
        """See `Stream.cancel`."""
        if self._asked.pop(ticket, None) is not None:
            self._samples.cancel(ticket)


def _grammar(request: CompletionRequest) -> Grammar:
    evidence = shown(request.messages)
    if request.tools:
        return turn_grammar(request.tools, request.response_schema, max_calls=request.max_calls, evidence=evidence)
    return text_grammar() if request.response_schema is None else json_grammar(request.response_schema, evidence)


def _offered(message: Message, tools: Sequence[ToolSpec]) -> Message:
    """The message, or MalformedCall when it calls a tool the request did not offer, or says nothing at all."""
    names = {tool.name for tool in tools}
    for call in message.tool_calls:
        if call.name not in names:
            raise MalformedCall(
                "the model called a tool the request does not offer",
                where="assistant turn",
                value=call.name,
                remedy=f"offered: {', '.join(sorted(names)) or 'none'}; add it to `tools`, or train the model without it",
            )
    if not message.tool_calls and not message.content.strip():
        raise MalformedCall(
            "the model closed its turn without an answer",
            where="assistant turn",
            remedy="ask for a json_schema, or try another seed",
        )
    return message


def _broken_rule(message: Message, request: CompletionRequest) -> InvalidAnswer | None:
    """What decoding enforces as syntax only (the 29th of February of 2023 looks like a date) is checked on the parsed values."""
    schemas = {tool.name: tool.parameters for tool in request.tools}
    checks = [(call.name, call.arguments, schemas[call.name]) for call in message.tool_calls]
    if not checks and request.response_schema is not None:
        checks = [("answer", message.content, request.response_schema)]
    for where, text, schema in checks:
        try:
            jsonschema_rs.validator_for(dict(schema), validate_formats=True, offline=True).validate(json.loads(text))
        except jsonschema_rs.ValidationError as error:
            rule = "/".join(str(part) for part in error.schema_path)
            return _invalid(f"the model's answer breaks its schema at {rule}", where, error.message)
        except ValueError as error:  # JSONDecodeError
            return _invalid("the model's answer is not JSON", where, error)
    return None


def _invalid(what: str, where: str, value: object) -> InvalidAnswer:
    return InvalidAnswer(what, where=where, value=str(value).partition("\n")[0], remedy="try another seed, or relax the schema")


def _cut(message: Message, stop: Sequence[str]) -> tuple[Message, bool]:
    """Content up to the first stop text; calls come after the content, so a cut turn has none."""
    places = [place for place in (message.content.find(text) for text in stop) if place >= 0]
    if not places:
        return message, False
    return replace(message, content=message.content[: min(places)], tool_calls=()), True
