"""The loop every run of requests goes through: admit, step, choose, retire. What a row's computed past is, its kinds decide."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from posttrain.data.records import StopReason
from posttrain.errors import PosttrainError
from posttrain.grammar.matcher import GrammarEngine, Matcher, allowed_counts
from posttrain.sampling.draw import draw, uniforms, unpack_mask
from posttrain.sampling.protocol import Sample, SampleRequest


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """max_rows: rows decoded together; refill: share of free rows at which waiting prompts are prefilled; prefill_tokens: pack size
    of a prefill; jump: append grammar-forced runs without sampling them."""

    max_rows: int = 64
    refill: float = 0.25
    prefill_tokens: int = 4096
    jump: bool = True


@dataclass(slots=True)
class Row:
    """A request being decoded. `pending` are tokens decided but not yet run through the model."""

    index: int
    request: SampleRequest
    u: NDArray[np.float64]
    matcher: Matcher | None
    ids: list[int] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)

    def add(self, token: int, full: float, drawn: float, forced: bool) -> None:
        self.ids.append(token)
        self.full.append(full)
        self.drawn.append(drawn)
        self.forced.append(forced)
        self.pending.append(token)

    def context(self) -> tuple[int, ...]:
        return (*self.request.prompt, *self.ids)

    def finish(self, stop: StopReason) -> Sample:
        return Sample(tuple(self.ids), tuple(self.full), tuple(self.drawn), tuple(self.forced), stop)


@dataclass(frozen=True, slots=True)
class Drawing:
    """What all runs of a sampler share: how to end a turn, and what compiles grammars."""

    end_of_turn: int
    grammar: GrammarEngine | None
    options: EngineOptions

    def matcher_for(self, request: SampleRequest) -> Matcher | None:
        if request.grammar is None:
            return None
        if self.grammar is None:
            raise PosttrainError(
                "a request names a grammar but the sampler has no grammar engine",
                where="sampler",
                remedy="pass a GrammarEngine",
            )
        return self.grammar.matcher(request.grammar)


class Run(ABC):
    """Requests of one call that decode together. `waiting` are indices of requests without a row yet."""

    def __init__(
        self,
        drawing: Drawing,
        requests: Sequence[SampleRequest],
        indices: Sequence[int],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.drawing, self.options, self.requests, self.progress = drawing, drawing.options, requests, progress
        self.waiting = list(indices)
        self.capacity = min(self.options.max_rows, len(indices))
        self.rows: list[Row] = []
        self.results: dict[int, Sample] = {}

    @abstractmethod
    def admit(self, indices: list[int]) -> None:
        """Give waiting requests a row: append to `rows`, and `choose` for those whose logits the prefill gave."""

    @abstractmethod
    def step(self) -> Tensor:
        """Run every row's pending tokens; logits [R, V] at each row's last one."""

    @abstractmethod
    def leave(self, place: int) -> None:
        """The row at `place` is finished and the last row takes its place."""

    def decode(self) -> dict[int, Sample]:
        """Samples by index of their request."""
        while self.waiting or self.rows:
            free = self.capacity - len(self.rows)
            if self.waiting and (free >= self.options.refill * self.capacity or not self.rows):
                self.admit([self.waiting.pop(0) for _ in range(min(free, len(self.waiting)))])
            if self.rows:
                self.choose(self.step())
        return self.results

    def row(self, index: int) -> Row:
        request = self.requests[index]
        return Row(index, request, uniforms(request.seed, request.options.max_tokens), self.drawing.matcher_for(request))

    def choose(self, logits: Tensor, rows: list[Row] | None = None) -> None:
        """Draw each row's next token, append what the grammar then forces, and retire what is finished."""
        rows = list(self.rows) if rows is None else rows
        matchers = [row.matcher for row in rows]
        allowed = counts = None
        if any(matcher is not None for matcher in matchers):
            assert self.drawing.grammar is not None
            bits = self.drawing.grammar.fill(matchers)
            allowed = unpack_mask(bits, logits.shape[1])
            counts = allowed_counts(bits).tolist()
        tokens, full, drawn = draw(
            logits,
            [row.request.options for row in rows],
            [float(row.u[min(len(row.ids), len(row.u) - 1)]) for row in rows],
            allowed,
            [row.context for row in rows],
        )
        drawn_tokens = 0
        for i, (row, token, logp, own) in enumerate(zip(rows, tokens.tolist(), full.tolist(), drawn.tolist(), strict=True)):
            before = len(row.ids)
            only = counts is not None and row.matcher is not None and counts[i] == 1
            self._append(row, token, logp, 0.0 if only else own, only)
            drawn_tokens += len(row.ids) - before
        if self.progress is not None:
            self.progress(drawn_tokens)
        self._retire()

    def _append(self, row: Row, token: int, full: float, drawn: float, forced: bool) -> None:
        row.add(token, full, drawn, forced)
        if row.matcher is None or token == self.drawing.end_of_turn:
            return
        row.matcher.consume(token)
        if self.options.jump:
            for extra in row.matcher.forced_run():
                if extra == self.drawing.end_of_turn or len(row.ids) >= row.request.options.max_tokens:
                    break
                row.matcher.consume(extra)
                row.add(extra, 0.0, 0.0, True)

    def _retire(self) -> None:
        for place in range(len(self.rows) - 1, -1, -1):
            row = self.rows[place]
            done = bool(row.ids) and row.ids[-1] == self.drawing.end_of_turn
            if not done and len(row.ids) < row.request.options.max_tokens:
                continue
            self.results[row.index] = row.finish(StopReason.END_OF_TURN if done else StopReason.LENGTH)
            self.leave(place)
            self.rows[place] = self.rows[-1]
            self.rows.pop()
