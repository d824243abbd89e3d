"""Where a scenario is built: a random stream, one live company, a tenant, the split's wording, and the means to act and answer."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.records import Message, Shape, ToolCall
from posttrain.worlds.finance_ops.books import Books, books
from posttrain.worlds.finance_ops.environment import WORLD, FinanceEnvironment, compact
from posttrain.worlds.finance_ops.styles import Reply, dress
from posttrain.worlds.finance_ops.wording import Utterance, Wording, speak, wording


@dataclass(frozen=True, slots=True)
class Scenario:
    """A request with its gold continuation. `prompt` ends with a user turn; `gold` starts with the assistant's and may call tools.

    A conversation to learn from is prompt + gold; a task is the prompt with the verifier's arguments. Both come from here, so the gold
    of every task is known to pass its own verifier.
    """

    kind: str
    shape: Shape
    tenant: str
    prompt: tuple[Message, ...]
    gold: tuple[Message, ...]
    arguments: Mapping[str, Any]
    environment: Mapping[str, Any]
    verifier: str = ""
    high_risk: bool = False
    max_turns: int = 3


@dataclass(slots=True)
class Bench:
    """One scenario in the making. `style` is the tenant whose answer style is written, None for the house style."""

    split: str
    seed: int
    tenant: str
    style: str | None
    rng: random.Random
    live: FinanceEnvironment = field(init=False)
    book: Wording = field(init=False)

    def __post_init__(self) -> None:
        self.live = FinanceEnvironment(self.split, self.seed, tenant=self.tenant)
        self.book = wording(self.split)

    @property
    def facts(self) -> Books:
        """The generated books with the truth about planted differences; only generators may look."""
        return books(self.split, self.seed)

    @property
    def reference(self) -> dict[str, Any]:
        return {"world": WORLD, "split": self.split, "seed": self.seed}

    def pick(self, sql: str, parameters: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        """A random row of the company's database."""
        return self.rng.choice(self.live.query(sql, parameters))

    def say(self, name: str, *, plain: bool = False, **slots: str) -> Utterance:
        """A set expanded and dressed in a register, the slots filled."""
        return speak(self.book, name, self.rng, slots, plain=plain)

    def phrase(self, name: str, **slots: str) -> str:
        """A bare expansion without opener, closer or register."""
        return self.book.expand(name, self.rng).format_map(slots)

    def act(self, name: str, arguments: Mapping[str, Any], *, index: int = 0) -> tuple[Message, Message, dict[str, Any]]:
        """Call a tool on the live company: the assistant's turn, the tool's turn, and the result."""
        call = ToolCall(f"call_{index}", name, compact(dict(arguments)))
        result = self.live.call(name, arguments, tenant=self.tenant)
        return (
            Message("assistant", "", (call,)),
            Message("tool", result.content, tool_call_id=call.id),
            json.loads(result.content),
        )

    def answer(self, reply: Reply) -> Message:
        return Message("assistant", dress(reply, self.style, self.tenant).json())


def user(utterance: Utterance | str) -> Message:
    return Message("user", utterance if isinstance(utterance, str) else utterance.text)


def expectation(call: str, arguments: Mapping[str, Any], figures: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """Verifier arguments of a task that is solved by one tool call and a grounded answer."""
    return {"call": {"name": call, "arguments": dict(arguments)}, "figures": list(figures), **more}
