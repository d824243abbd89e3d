"""A contract of one character per token, a sampler that reads from a script, and a world of one counter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.agents import ToolResult
from posttrain.contract import MalformedCall, parse_turn
from posttrain.contract.template import assistant_text
from posttrain.data import Message, StopReason, Task, ToolSpec
from posttrain.sampling.protocol import Sample, SampleRequest, Then
from posttrain.verifying import Judgement

END = 0
AMOUNT = {"type": "string", "pattern": r"^[0-9]+\.[0-9]{2}$"}
ADD = ToolSpec(
    "add", "", {"type": "object", "properties": {"by": {"type": "integer"}}, "required": ["by"], "additionalProperties": False}
)
PAY = ToolSpec(
    "pay", "", {"type": "object", "properties": {"amount": AMOUNT}, "required": ["amount"], "additionalProperties": False}
)
READ = ToolSpec("read", "", {"type": "object"})
POLICIES = """
@id("anyone-counts")
permit (principal, action in [Action::"add", Action::"read"], resource);
@id("small-payments")
permit (principal == Tenant::"retail_B", action == Action::"pay", resource) when { context.amount < 100 };
@id("frozen")
forbid (principal, action == Action::"pay", resource) when { context.frozen };
"""


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(token) for token in ids if token != END)


class FakeContract:
    """Records what it was asked to tokenise, so that a test can see that samples never come back to it."""

    def __init__(self) -> None:
        self.tokenised: list[Message] = []

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
        self.tokenised += messages
        return encode("".join(f"<{message.role}>{message.content}" for message in messages) + "<assistant>")

    def continuation_ids(self, messages: Sequence[Message]) -> list[int]:
        self.tokenised += messages
        return encode("".join(f"<{message.role}>{message.content}" for message in messages) + "<assistant>")

    def parse(self, ids: Sequence[int]) -> Message:
        return parse_turn(decode(ids))

    def turn_ids(self, message: Message) -> tuple[int, ...]:
        return (*encode(assistant_text(message)), END)


def in_rounds(sample: Callable[[list[SampleRequest]], list[Sample]], requests: Sequence[SampleRequest], then: Then) -> None:
    """`Sampler.converse`, everyone's turn in one call."""
    asked: dict[int, SampleRequest] = dict(enumerate(requests))
    while asked:
        drawn = zip(asked, sample(list(asked.values())), strict=True)
        asked = {index: request for index, found in drawn if (request := then(index, found)) is not None}


class ScriptSampler:
    """`script(prompt text, turn of this call, request)` -> the text to say, or a Sample."""

    def __init__(self, script: Callable[[str, SampleRequest], str | Sample]) -> None:
        self.script, self.calls = script, []  # type: ignore[var-annotated]

    def converse(self, requests: Sequence[SampleRequest], then: Then) -> None:
        in_rounds(self.sample, requests, then)

    def sample(self, requests: Sequence[SampleRequest], progress: Any = None) -> list[Sample]:
        self.calls.append(list(requests))
        return [self._one(request) for request in requests]

    def _one(self, request: SampleRequest) -> Sample:
        said = self.script(decode(request.prompt), request)
        return said if isinstance(said, Sample) else sampled([*encode(said), END])


def sampled(ids: list[int], stop: StopReason = StopReason.END_OF_TURN) -> Sample:
    logs = tuple(-0.5 for _ in ids)
    return Sample(tuple(ids), logs, logs, tuple(False for _ in ids), stop)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments}, separators=(',', ':'))}</tool_call>"


class FakeEnvironment:
    def __init__(self, world: FakeWorld, reference: Mapping[str, Any], tenant: str | None) -> None:
        self.world, self.tenant, self.count, self.closed = world, tenant, int(reference.get("start", 0)), 0
        self.paid: list[str] = []

    def call(self, name: str, arguments: Mapping[str, Any], *, tenant: str | None) -> ToolResult:
        assert not self.closed
        self.world.executed.append((name, dict(arguments), tenant))
        if name == "pay":
            self.paid.append(arguments["amount"])
            return ToolResult('{"paid":true}')
        if name == "read" and arguments.get("what") == "explode":
            raise ZeroDivisionError("secret detail")
        if name == "read" and arguments.get("what") == "nothing":
            return ToolResult('{"error":"not_found"}', ok=False)
        self.count += arguments.get("by", 0)
        return ToolResult(json.dumps({"count": self.count}))

    def query(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        assert not self.closed
        return [(self.count,)]

    def close(self) -> None:
        self.closed += 1


class FakeWorld:
    """A counter and payments. `guard_context` reads the amount from the call and whether payments are frozen from the task."""

    name, tenants = "fake", ("retail_B", "bank_A")

    def __init__(self, frozen: bool | None = False) -> None:
        self.environments: list[FakeEnvironment] = []
        self.executed: list[tuple[str, dict[str, Any], str | None]] = []
        self.frozen = frozen

    def environment(self, reference: Mapping[str, Any], *, tenant: str | None = None) -> FakeEnvironment:
        self.environments.append(FakeEnvironment(self, reference, tenant))
        return self.environments[-1]

    def permissions(self) -> str:
        return POLICIES

    def guard_context(self, name: str, arguments: Mapping[str, Any], environment: Any) -> dict[str, Any]:
        assert isinstance(environment, FakeEnvironment)
        if name != "pay":
            return {}
        context: dict[str, Any] = {"amount": int(arguments["amount"].split(".")[0])}
        return context if self.frozen is None else {**context, "frozen": self.frozen}

    def verifiers(self) -> dict[str, Any]:
        def counted(task: Task, episode: Any, environment: Any) -> Judgement:
            return Judgement(environment.query("") == [(task.arguments["count"],)], 1.0)

        return {"counted": counted}


def ask(identity: str = "t", content: str = "go", **fields: Any) -> Task:
    given = {"tools": (ADD, PAY, READ), "tenant": "retail_B", "environment": {"start": 0}, **fields}
    return Task(identity, (Message("user", content),), **given)


__all__ = ["ADD", "END", "PAY", "POLICIES", "READ", "FakeContract", "FakeWorld", "MalformedCall", "ScriptSampler", "ask", "call",
           "decode", "encode", "sampled"]  # fmt: skip
