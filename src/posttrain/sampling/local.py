"""The in-process engine: continuous batching over a key/value cache with a shared trunk.

What every prompt of a call starts with (tools and system text) is prefilled once and its attention is computed once for the
whole batch. Finished rows leave, waiting requests take their place. Under a grammar, runs of tokens that leave no choice are
appended without running the model for each. Inside a session an episode's next turn runs only what is new in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.contract import Sequence as Rendered
from posttrain.data.records import StopReason
from posttrain.errors import PosttrainError
from posttrain.grammar.matcher import GrammarEngine, Matcher
from posttrain.policy.pack import Pack, fill_packs
from posttrain.policy.policy import Policy
from posttrain.sampling.cache import Cache, StepAttention, Trunk, trunk_of
from posttrain.sampling.draw import draw, uniforms, unpack_mask
from posttrain.sampling.prefixes import Prefixes, Strip
from posttrain.sampling.protocol import Sample, SampleRequest

_MIN_TRUNK = 16


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """max_rows: rows decoded together; refill: share of free rows at which waiting prompts are prefilled; prefill_tokens: pack size
    of a prefill; jump: append grammar-forced runs without sampling them."""

    max_rows: int = 64
    refill: float = 0.25
    prefill_tokens: int = 4096
    jump: bool = True


@dataclass(slots=True)
class _Row:
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

    def finish(self, stop: StopReason) -> Sample:
        return Sample(tuple(self.ids), tuple(self.full), tuple(self.drawn), tuple(self.forced), stop)


class LocalSampler:
    """Samples from a policy in this process. Implements `Sampler`."""

    def __init__(
        self, policy: Policy, end_of_turn: int, grammar: GrammarEngine | None = None, options: EngineOptions | None = None
    ) -> None:
        self.policy, self.end_of_turn, self.grammar = policy, end_of_turn, grammar
        self.options = options or EngineOptions()
        self._session: dict[str | None, Prefixes] | None = None

    @contextmanager
    def session(self) -> Iterator[None]:
        """See `Sampler.session`."""
        before, self._session = self._session, {}
        try:
            yield
        finally:
            self._session = before

    @torch.inference_mode()
    def sample(self, requests: Sequence[SampleRequest], progress: Callable[[int], None] | None = None) -> list[Sample]:
        """One Sample per request, in order. `progress` is told the number of tokens drawn since its last call."""
        results: dict[int, Sample] = {}
        by_adapter: dict[str | None, list[int]] = {}
        for index, request in enumerate(requests):
            if not request.prompt:
                raise PosttrainError(
                    "an empty prompt", where=f"requests[{index}]", remedy="render the conversation with Contract.prompt_ids"
                )
            by_adapter.setdefault(request.adapter, []).append(index)
        for adapter, indices in by_adapter.items():
            self.policy.use(adapter)
            prefixes = None if self._session is None else self._session.setdefault(adapter, Prefixes())
            results.update(_Run(self, requests, indices, progress, prefixes).decode())
        return [results[index] for index in range(len(requests))]

    def matcher_for(self, request: SampleRequest) -> Matcher | None:
        if request.grammar is None:
            return None
        if self.grammar is None:
            raise PosttrainError(
                "a request names a grammar but the sampler has no grammar engine", where="sampler", remedy="pass a GrammarEngine"
            )
        return self.grammar.matcher(request.grammar)


class _Run:
    """One call's requests for one adapter."""

    def __init__(
        self,
        sampler: LocalSampler,
        requests: Sequence[SampleRequest],
        indices: list[int],
        progress: Callable[[int], None] | None,
        prefixes: Prefixes | None,
    ) -> None:
        self.sampler, self.options, self.policy = sampler, sampler.options, sampler.policy
        self.requests, self.progress, self.prefixes = requests, progress, prefixes
        self.waiting = sorted(indices, key=lambda i: requests[i].prompt)  # neighbours share the most
        prompts = [requests[i].prompt for i in self.waiting]
        self.trunk = (prefixes and prefixes.trunk_for(prompts)) or self._prefill_trunk()
        self.strips: dict[int, Strip | None] = {}
        if prefixes is not None:
            if prefixes.trunk is not self.trunk:
                prefixes.start(self.trunk, prompts[0][: self.trunk.length])
            self.strips = dict(zip(self.waiting, prefixes.claim(prompts), strict=True))
        room = max(len(requests[i].prompt) - self.trunk.length + requests[i].options.max_tokens for i in indices)
        rows = min(self.options.max_rows, len(indices))
        self.cache = Cache(self.trunk, self.policy.config.num_hidden_layers, rows, room + 1)
        self.rows: list[_Row] = []
        self.results: dict[int, Sample] = {}

    def decode(self) -> dict[int, Sample]:
        capacity = len(self.cache.lengths)
        while self.waiting or self.rows:
            free = capacity - len(self.rows)
            if self.waiting and (free >= self.options.refill * capacity or not self.rows):
                self._admit([self.waiting.pop(0) for _ in range(min(free, len(self.waiting)))])
            if self.rows:
                self._choose(self._step())
        return self.results

    # -- prefill -------------------------------------------------------------------------------------------------------

    def _prefill_trunk(self) -> Trunk:
        """Longest prefix shared by all prompts, shorter by at least one token than each (a prompt must have a last token to run)."""
        first, last = (self.requests[i].prompt for i in (self.waiting[0], self.waiting[-1]))
        length = len(os.path.commonprefix([first, last]))
        length = min(length, min(len(self.requests[i].prompt) for i in self.waiting) - 1)
        if len(self.waiting) < 2 or length < _MIN_TRUNK:
            length = 0
        sink: dict[int, tuple[Tensor, Tensor]] = {}
        pack = Pack.of([_prompt(first[: max(length, 1)])])
        self.policy.hidden(pack, sink)
        return trunk_of(length, pack, sink)

    def _admit(self, indices: list[int]) -> None:
        """Give waiting requests a row. A remembered prefix is copied, and what follows it is left to the next step."""
        new = []
        for index in sorted(indices, key=self._length):  # neighbours of like length: their attention is padded to the longest
            strip = self.strips.pop(index, None)
            if strip is None:
                new.append(index)
                continue
            row = self._row(index)
            row.pending = list(row.request.prompt[len(strip.ids) :])
            self.cache.restore(len(self.rows), strip.keys, strip.values)
            self.rows.append(row)
        if new:
            self._prefill(new)

    def _prefill(self, indices: list[int]) -> None:
        prompts = [_prompt(self.requests[i].prompt) for i in indices]
        for pack in fill_packs(prompts, self.options.prefill_tokens):
            sink: dict[int, tuple[Tensor, Tensor]] = {}
            hidden = self.policy.hidden(pack, sink)
            order = sorted(range(len(pack.members)), key=lambda place: self._length(indices[pack.members[place]]))
            logits = self.policy.head.logits(hidden[[pack.ends[place] for place in order]])
            fresh = [self._row(indices[pack.members[place]]) for place in order]
            self.cache.fill(len(self.rows), [pack.sequence_rows(place)[self.trunk.length :] for place in order], sink)
            self.rows += fresh
            self._choose(logits, fresh)

    def _length(self, index: int) -> int:
        return len(self.requests[index].prompt)

    def _row(self, index: int) -> _Row:
        request = self.requests[index]
        return _Row(index, request, uniforms(request.seed, request.options.max_tokens), self.sampler.matcher_for(request))

    # -- decode --------------------------------------------------------------------------------------------------------

    def _step(self) -> Tensor:
        """Run every row's pending tokens; logits [R, V] at each row's last one."""
        counts = [len(row.pending) for row in self.rows]
        attention = StepAttention(self.cache, counts)
        ids = torch.tensor([token for row in self.rows for token in row.pending])
        hidden = self.policy.forward(ids, attention.positions, attention)
        attention.commit(counts)
        for row in self.rows:
            row.pending.clear()
        return self.policy.head.logits(hidden[torch.cumsum(torch.tensor(counts), 0) - 1])

    def _choose(self, logits: Tensor, rows: list[_Row] | None = None) -> None:
        """Draw each row's next token, append what the grammar then forces, and retire what is finished."""
        rows = list(self.rows) if rows is None else rows
        matchers = [row.matcher for row in rows]
        allowed = counts = None
        if any(matcher is not None for matcher in matchers):
            assert self.sampler.grammar is not None
            bits = self.sampler.grammar.fill(matchers)
            allowed = unpack_mask(bits, logits.shape[1])
            counts = allowed.sum(dim=1).tolist()
        tokens, full, drawn = draw(
            logits,
            [row.request.options for row in rows],
            [float(row.u[min(len(row.ids), len(row.u) - 1)]) for row in rows],
            allowed,
        )
        drawn_tokens = 0
        for i, row in enumerate(rows):
            before = len(row.ids)
            only = counts is not None and row.matcher is not None and counts[i] == 1
            self._append(row, int(tokens[i]), float(full[i]), 0.0 if only else float(drawn[i]), only)
            drawn_tokens += len(row.ids) - before
        if self.progress is not None:
            self.progress(drawn_tokens)
        self._retire()

    def _append(self, row: _Row, token: int, full: float, drawn: float, forced: bool) -> None:
        row.add(token, full, drawn, forced)
        if row.matcher is None or token == self.sampler.end_of_turn:
            return
        row.matcher.consume(token)
        if self.options.jump:
            for extra in row.matcher.forced_run():
                if extra == self.sampler.end_of_turn or len(row.ids) >= row.request.options.max_tokens:
                    break
                row.matcher.consume(extra)
                row.add(extra, 0.0, 0.0, True)

    def _retire(self) -> None:
        for place in range(len(self.rows) - 1, -1, -1):
            row = self.rows[place]
            done = bool(row.ids) and row.ids[-1] == self.sampler.end_of_turn
            if not done and len(row.ids) < row.request.options.max_tokens:
                continue
            if self.prefixes is not None:
                whole = (*row.request.prompt, *row.ids)
                self.prefixes.keep(Strip(whole[: len(whole) - len(row.pending)], *self.cache.copy(place)))
            self.results[row.index] = row.finish(StopReason.END_OF_TURN if done else StopReason.LENGTH)
            last = len(self.rows) - 1
            if place != last:
                self.cache.move(last, place)
                self.rows[place] = self.rows[last]
            self.rows.pop()


def _prompt(ids: Sequence[int]) -> Rendered:
    array = np.asarray(ids, dtype=np.int32)
    return Rendered(array, np.zeros(len(array), np.float32), np.zeros(len(array), np.int16))
