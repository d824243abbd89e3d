"""The sampler protocol: tokens in, tokens out. Local, server and cluster engines answer the same two calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from posttrain.data.records import StopReason
from posttrain.grammar.matcher import Grammar

Sharing = tuple[str | None, str | None]  # adapter and scope
Asked = TypeVar("Asked", contravariant=True)
Answer = TypeVar("Answer", covariant=True)


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """How to draw. temperature 0 is greedy. After the grammar mask, the repetition penalty (1: none; over prompt and answer so far) and
    the temperature come top-k (0: all), top-p and min-p (share of the best token's probability; 0: all)."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken: at temperature 0, and where scores divided by it would leave float32."""
        return self.temperature < _COLDEST


_COLDEST = 1e-6  # colder, and one token is a certainty already where scores differ by a thousandth


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One continuation to draw. The same request and seed give the same tokens whatever else shares the batch,
    up to the rounding of differently shaped matrix products (docs/architecture.md says what holds where)."""

    prompt: tuple[int, ...]
    seed: int
    options: SampleOptions = SampleOptions()
    grammar: Grammar | None = None
    adapter: str | None = None  # a name the policy knows; None = base
    scope: str | None = (
        None  # whose request it is: only requests of one scope use what was computed for each other (None: one of them)
    )

    @property
    def sharing(self) -> Sharing:
        """Who may share computed prefixes with this request: how long an answer takes would tell others what was asked before."""
        return self.adapter, self.scope


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation. `ids` includes the end-of-turn token when `stop` is END_OF_TURN. Logs are natural, float32."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # under the full, untempered distribution
    sampled_logprobs: tuple[float, ...]  # under the distribution drawn from
    forced: tuple[bool, ...]  # the grammar allowed exactly one token here, or closed the turn with it
    stop: StopReason


Then = Callable[[int, Sample], SampleRequest | None]


class Converses(Protocol):
    def converse(self, requests: Sequence[SampleRequest], then: Then) -> None:
        """Conversations side by side, each from its first request on: `then` is told which one and what was drawn, as soon as it is drawn,
        and gives what it asks next (None: it is over). Nobody waits for another's turn, and an engine may go on from what it computed for
        a conversation's last turn. Weights must not change meanwhile. Raises what `sample` raises, and what `then` does."""
        ...


class Sampler(Converses, Protocol):
    def sample(self, requests: Sequence[SampleRequest], progress: Callable[[int], None] | None = None) -> list[Sample]:
        """One continuation per request, in order. `progress` is told the number of tokens drawn since its last call."""
        ...


class Stream(Protocol[Asked, Answer]):
    """Requests that are answered together and come and go between steps. Used by one thread at a time; while a request is in it, weights
    and adapters stay as they are. A stream that raises is of no further use."""

    def admit(self, requests: Sequence[Asked]) -> list[int]:
        """Take requests in; a ticket for each, never given twice. What is wrong with one of them is its result."""
        ...

    def step(self) -> Mapping[int, Answer | Exception]:
        """Go on by a token or more for each; by ticket the answers, or errors, of those that are finished. Empty when nothing is in it."""
        ...

    def cancel(self, ticket: int) -> None:
        """Nobody waits for this one any more. Nothing happens when it is finished."""
        ...


class StreamSampler(Protocol):
    def open(self, rows: int) -> Stream[SampleRequest, Sample]:
        """A stream that decodes up to `rows` requests together and remembers prefixes of earlier ones as long as it is used."""
        ...
