"""What people hand in and what agents make: frozen, typed records that travel between rooms.

`Conversation`, `Preference` and `Task` are inputs; `Episode` is what an agent did on a `Task`. Shapes follow the OpenAI chat
format (`messages`, `tools`, `tool_calls`); tool-call arguments stay JSON text, because tables and Arrow files would merge
different argument objects into one null-padded struct.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


class Shape(StrEnum):
    """The four data shapes of supervised fine-tuning, plus plain text."""

    SINGLE_TURN = "single_turn"
    MULTI_TURN = "multi_turn"
    TOOL_TRAJECTORY = "tool_trajectory"
    SAFETY_STYLE = "safety_style"


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as the model sees it. `parameters` is a JSON Schema of type object."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call an assistant asked for. `arguments` is JSON text exactly as written, not yet trusted."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `learn=False` on an assistant turn keeps it in view but out of the loss."""

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    learn: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """A dialogue to learn from."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    tenant: str | None = None
    shape: Shape = Shape.SINGLE_TURN
    source: str = ""
    licence: str = ""
    split: str = "train"


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a better and a worse continuation (each one or more messages, starting with the assistant)."""

    id: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    tenant: str | None = None
    source: str = ""
    licence: str = ""
    split: str = "train"


@dataclass(frozen=True, slots=True)
class Task:
    """A request whose outcome can be checked.

    `environment` says where to act (`{"world": "finance_ops", "seed": 7}`); `verifier` names the judge and `arguments` are what
    it compares with: never shown to the model. `expected` of a plain task holds calls, answer fields, end state or refusal.
    `high_risk` marks requests that must be refused; the false-refusal rate is measured on the others
    that do not expect a refusal. `demonstration` solves it, from the assistant's first turn on: only a stage that learns from the
    task reads it.
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    tenant: str | None = None
    kind: str = "task"
    verifier: str = "expected"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    response_schema: Mapping[str, Any] | None = None
    high_risk: bool = False
    max_turns: int = 4
    split: str = "test"
    demonstration: tuple[Message, ...] = ()


class StopReason(StrEnum):
    """Why an episode or a generation ended."""

    END_OF_TURN = "end_of_turn"  # the model closed its turn
    LENGTH = "length"  # token budget spent: what was written is a prefix and is never executed
    CLOSED = "closed"  # token budget near its end: the grammar ended what was begun, whole in form only, and it is never executed
    MAX_TURNS = "max_turns"  # the agent's turn budget is spent
    MALFORMED_CALL = "malformed_call"  # the turn looks like a tool call but does not parse
    DENIED = "denied"  # a call was refused and the agent does not continue
    CANCELLED = "cancelled"  # the client went away

    @property
    def cut(self) -> bool:
        """The budget ended what was said, whether or not the grammar closed it."""
        return self in (StopReason.LENGTH, StopReason.CLOSED)


@dataclass(frozen=True, slots=True)
class Turn:
    """One model turn as sampled. `ids` and `logprobs` are the truth; `message` is what they parse to.

    `logprobs[i]` is log pi(ids[i] | everything before) under the untempered, unmasked distribution; `sampled_logprobs[i]` under
    the one sampled from (temperature, truncation, grammar). `forced[i]` marks tokens the grammar left no choice about, or
    closed the turn with.
    """

    prompt_length: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    sampled_logprobs: tuple[float, ...]
    forced: tuple[bool, ...]
    message: Message
    stop: StopReason


@dataclass(frozen=True, slots=True)
class ToolOutcome:
    """What became of one tool call: its result text, or why it was refused or failed."""

    call: ToolCall
    content: str
    ok: bool
    denied: str | None = None  # why it was refused: the guard's reason id, or that the user did not say what it holds


@dataclass(frozen=True, slots=True)
class Episode:
    """One trajectory: the whole conversation, the model's turns as tokens, the calls' outcomes, and what was spent."""

    task_id: str
    tenant: str | None
    kind: str
    messages: tuple[Message, ...]
    turns: tuple[Turn, ...]
    outcomes: tuple[ToolOutcome, ...]
    stop: StopReason
    ids: tuple[int, ...]  # the final context: prompt, model turns, tool results, as the model saw them
    seconds: float = 0.0

    @property
    def answer(self) -> str:
        """Text of the last assistant message without tool calls, or '' when the episode ended before one."""
        last = self.messages[-1] if self.messages else None
        return last.content if last is not None and last.role == "assistant" and not last.tool_calls else ""

    @property
    def sampled_tokens(self) -> int:
        return sum(len(turn.ids) for turn in self.turns)
