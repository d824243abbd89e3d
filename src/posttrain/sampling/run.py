"""The loop every run of requests goes through, turn by turn: admit, step, choose, retire. What a row's computed past is, its kinds
decide."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from posttrain.data.records import StopReason
from posttrain.errors import GrammarError, PosttrainError
from posttrain.grammar.matcher import GrammarEngine, Matcher, allowed_counts
from posttrain.sampling.draw import Allowed, draw, uniforms
from posttrain.sampling.protocol import Sample, SampleRequest

_LATE = 64  # tokens before a request's end from which it is watched whether a row under a grammar can still end


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
    look: int = _LATE  # tokens left at which it is next asked how the turn could still end
    closed: bool = False  # the grammar ended the turn, not the model

    @property
    def left(self) -> int:
        """Tokens that the request still allows."""
        return self.request.options.max_tokens - len(self.ids)

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


def check_prompt(request: SampleRequest, where: str, steady: int | None = None) -> None:
    """PosttrainError for an empty prompt: there would be nothing to draw from; and for one whose answer may become longer than `steady`
    (see `Policy.steady`; None: any length)."""
    if not request.prompt:
        raise PosttrainError("an empty prompt", where=where, remedy="render the conversation with Contract.prompt_ids")
    if steady is not None and len(request.prompt) + request.options.max_tokens > steady:
        raise PosttrainError(
            "prompt and answer may be longer than the model encodes positions without regard to its neighbours",
            where=where,
            value=len(request.prompt) + request.options.max_tokens,
            remedy=f"keep both to {steady} tokens: lower max_tokens, or shorten the messages",
        )


def computed(row: Row) -> tuple[int, ...]:
    """The tokens of a row that the model has run, its trunk's included."""
    whole = row.context()
    return whole[: len(whole) - len(row.pending)]


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
    """Requests that decode together, each under a number that its caller chose. `waiting` are the numbers of those without a row yet;
    `results` what is finished and not handed out."""

    def __init__(self, drawing: Drawing, capacity: int, refill: float, progress: Callable[[int], None] | None = None) -> None:
        """`capacity`: rows at once; `refill`: the share of them that must be free before waiting requests get theirs."""
        self.drawing, self.options, self.progress = drawing, drawing.options, progress
        self.capacity, self.refill = capacity, refill
        self.requests: dict[int, SampleRequest] = {}
        self.waiting: list[int] = []
        self.rows: list[Row] = []
        self.results: dict[int, Sample | PosttrainError] = {}

    @abstractmethod
    def admit(self, rows: list[Row]) -> None:
        """Start these rows: append them to `rows`, and `choose` for those whose logits the prefill gave."""

    @abstractmethod
    def step(self) -> Tensor:
        """Run every row's pending tokens; logits [R, V] at each row's last one."""

    @abstractmethod
    def leave(self, place: int) -> None:
        """The row at `place` is finished and the last row takes its place."""

    def expect(self, requests: Mapping[int, SampleRequest]) -> None:
        """Take requests in, by number; each gets a row when there is room."""
        self.requests.update(requests)
        self.waiting += requests

    def forget(self, index: int) -> None:
        """A request is answered or cancelled."""
        del self.requests[index]

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.rows or self.results)

    def turn(self) -> dict[int, Sample | PosttrainError]:
        """Start what there is room for, run one step, and hand out what is finished."""
        free = self.capacity - len(self.rows)
        if self.waiting and free and (free >= self.refill * self.capacity or not self.rows):
            fresh = [row for row in map(self._row, self.take(free)) if row is not None]
            if fresh:
                self.admit(fresh)
        if self.rows:
            self.choose(self.step())
        done, self.results = self.results, {}
        for index in done:
            self.forget(index)
        return done

    def decode(self) -> dict[int, Sample]:
        """Samples by number, once all are drawn. Raises the first error of any of them."""
        samples = {}
        while self.busy:
            for index, found in self.turn().items():
                if isinstance(found, PosttrainError):
                    raise found
                samples[index] = found
        return samples

    def cancel(self, index: int) -> None:
        """Nobody waits for this request any more: it leaves, its row is free."""
        self.results.pop(index, None)
        if index in self.waiting:
            self.waiting.remove(index)
        for place, row in enumerate(self.rows):
            if row.index == index:
                self._remove(place)
                break
        self.forget(index)

    def take(self, free: int) -> list[int]:
        """The waiting requests that get a row now, at most `free`."""
        taken, self.waiting = self.waiting[:free], self.waiting[free:]
        return taken

    def _row(self, index: int) -> Row | None:
        """A fresh row; None where the request's grammar cannot be had, which is then its result."""
        request = self.requests[index]
        try:
            matcher = self.drawing.matcher_for(request)
        except PosttrainError as error:
            self.results[index] = error
            return None
        return Row(index, request, uniforms(request.seed, request.options.max_tokens), matcher)

    def choose(self, logits: Tensor, rows: list[Row] | None = None) -> None:
        """Draw each row's next token from logits [R, V], append what the grammar then forces, and retire what is finished. A row whose
        grammar fails leaves with its error."""
        logits = logits.cpu()  # tokens are drawn there, on whatever device the model computes
        rows = list(self.rows) if rows is None else rows
        allowed, only, broken = self._allowed(rows, logits.shape[1])
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
            try:
                if i in broken:
                    raise broken[i]
                self._append(row, token, logp, 0.0 if i in only else own, i in only)
            except GrammarError as error:
                self.results[row.index] = error
            drawn_tokens += len(row.ids) - before
        if self.progress is not None:
            self.progress(drawn_tokens)
        self._retire()

    def _allowed(self, rows: Sequence[Row], vocabulary: int) -> tuple[Allowed | None, set[int], dict[int, GrammarError]]:
        """The masks (None: no row has a grammar), which rows it leaves no choice, and what is wrong with rows that have no mask."""
        matchers = [row.matcher for row in rows]
        if all(matcher is None for matcher in matchers):
            return None, set(), {}
        assert self.drawing.grammar is not None
        bits, broken = self.drawing.grammar.masks(matchers)
        counts = allowed_counts(bits).tolist()
        return Allowed(bits, vocabulary), {i for i, m in enumerate(matchers) if m is not None and counts[i] == 1}, broken

    def _append(self, row: Row, token: int, full: float, drawn: float, forced: bool) -> None:
        """Add a drawn token and what the grammar then forces. Near the request's end, where no whole sentence could follow it any more, the
        shortest way to one takes its place."""
        if row.matcher is None or token == self.drawing.end_of_turn:
            row.add(token, full, drawn, forced)
            return
        before = row.matcher.copy() if row.left <= _LATE else None
        run = self._advance(row.matcher, token, row.left)
        if before is not None and (way := self._way_instead(row, before, row.left - len(run), len(run) > 1)):
            row.matcher, row.closed = before, True
            for extra in (*way, self.drawing.end_of_turn):
                row.add(extra, 0.0, 0.0, True)
            return
        row.add(token, full, drawn, forced)
        for extra in run[1:]:
            row.add(extra, 0.0, 0.0, True)

    def _advance(self, matcher: Matcher, token: int, left: int) -> list[int]:
        """The token and what is forced after it, at most `left` in all, consumed."""
        run = [token]
        matcher.consume(token)
        if self.options.jump:
            for extra in matcher.forced_run():
                if extra == self.drawing.end_of_turn or len(run) >= left:
                    break
                matcher.consume(extra)
                run.append(extra)
        return run

    def _way_instead(self, row: Row, before: Matcher, left: int, turned: bool) -> list[int]:
        """The tokens to close with from `before` when, after what the row's matcher consumed since, `left` tokens hold no way out and its
        end any more; else none: also where closing would have to say what the model has not. To find a way costs as much as choosing
        several tokens: a row is looked at where something was opened or closed (`turned`), and else when half of what its way left over is
        spent."""
        assert row.matcher is not None and self.drawing.grammar is not None
        if not (turned or left <= row.look or not self.options.jump):
            return []
        closers = self.drawing.grammar.closers
        # a value that is missing the model may still say, if there is room
        way = row.matcher.way_out(closers, left - 1, guess=True)
        row.look = left // 2 if way is None else left - (left - 1 - len(way)) // 2
        return [] if way is not None else before.way_out(closers, row.left - 1) or []

    def _retire(self) -> None:
        for place in range(len(self.rows) - 1, -1, -1):
            row = self.rows[place]
            if row.index not in self.results:
                done = bool(row.ids) and row.ids[-1] == self.drawing.end_of_turn
                if not done and len(row.ids) < row.request.options.max_tokens:
                    continue
                ended = StopReason.CLOSED if row.closed else StopReason.END_OF_TURN
                self.results[row.index] = row.finish(ended if done else StopReason.LENGTH)
            self._remove(place)

    def _remove(self, place: int) -> None:
        self.leave(place)
        self.rows[place] = self.rows[-1]
        self.rows.pop()
