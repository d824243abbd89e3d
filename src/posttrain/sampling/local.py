"""The in-process engine: continuous batching over a key/value cache with a shared trunk.

What every prompt of a call starts with (tools and system text) is prefilled once and its attention is computed once for the
whole batch. Finished rows leave, waiting requests take their place. Under a grammar, runs of tokens that leave no choice are
appended without running the model for each. Inside a session an episode's next turn runs only what is new in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from posttrain.contract import Sequence as Rendered
from posttrain.errors import PosttrainError
from posttrain.grammar.matcher import GrammarEngine
from posttrain.policy.pack import Pack, fill_packs
from posttrain.policy.policy import Policy
from posttrain.sampling.cache import Cache, StepAttention, Trunk, trunk_of
from posttrain.sampling.prefixes import Prefixes, Strip
from posttrain.sampling.protocol import Sample, SampleRequest
from posttrain.sampling.rows import RowRun
from posttrain.sampling.run import Drawing, EngineOptions, Run

_MIN_TRUNK = 16


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
        drawing = Drawing(self.end_of_turn, self.grammar, self.options)
        by_adapter: dict[str | None, list[int]] = {}
        for index, request in enumerate(requests):
            if not request.prompt:
                raise PosttrainError(
                    "an empty prompt", where=f"requests[{index}]", remedy="render the conversation with Contract.prompt_ids"
                )
            by_adapter.setdefault(request.adapter, []).append(index)
        for adapter, indices in by_adapter.items():
            self.policy.use(adapter)
            if not self.policy.packs:
                results.update(RowRun(self.policy, drawing, requests, indices, progress).decode())
                continue
            prefixes = None if self._session is None else self._session.setdefault(adapter, Prefixes())
            results.update(TreeRun(self.policy, drawing, requests, indices, progress, prefixes).decode())
        return [results[index] for index in range(len(requests))]


class TreeRun(Run):
    """Rows in one cache, over the trunk that all their prompts share."""

    def __init__(
        self,
        policy: Policy,
        drawing: Drawing,
        requests: Sequence[SampleRequest],
        indices: list[int],
        progress: Callable[[int], None] | None,
        prefixes: Prefixes | None,
    ) -> None:
        # neighbours share the most
        super().__init__(drawing, requests, sorted(indices, key=lambda i: requests[i].prompt), progress)
        self.policy, self.prefixes = policy, prefixes
        prompts = [requests[i].prompt for i in self.waiting]
        self.trunk = (prefixes and prefixes.trunk_for(prompts)) or self._prefill_trunk()
        self.strips: dict[int, Strip | None] = {}
        if prefixes is not None:
            if prefixes.trunk is not self.trunk:
                prefixes.start(self.trunk, prompts[0][: self.trunk.length])
            self.strips = dict(zip(self.waiting, prefixes.claim(prompts), strict=True))
        room = max(len(requests[i].prompt) - self.trunk.length + requests[i].options.max_tokens for i in indices)
        self.cache = Cache(self.trunk, policy.config.num_hidden_layers, self.capacity, room + 1)

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

    def admit(self, indices: list[int]) -> None:
        """Give waiting requests a row. A remembered prefix is copied, and what follows it is left to the next step."""
        new = []
        for index in sorted(indices, key=self._length):  # neighbours of like length: their attention is padded to the longest
            strip = self.strips.pop(index, None)
            if strip is None:
                new.append(index)
                continue
            row = self.row(index)
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
            fresh = [self.row(indices[pack.members[place]]) for place in order]
            self.cache.fill(len(self.rows), [pack.sequence_rows(place)[self.trunk.length :] for place in order], sink)
            self.rows += fresh
            self.choose(logits, fresh)

    def _length(self, index: int) -> int:
        return len(self.requests[index].prompt)

    # -- decode --------------------------------------------------------------------------------------------------------

    def step(self) -> Tensor:
        """Run every row's pending tokens; logits [R, V] at each row's last one."""
        counts = [len(row.pending) for row in self.rows]
        attention = StepAttention(self.cache, counts)
        ids = torch.tensor([token for row in self.rows for token in row.pending])
        hidden = self.policy.forward(ids, attention.positions, attention)
        attention.commit(counts)
        for row in self.rows:
            row.pending.clear()
        return self.policy.head.logits(hidden[torch.cumsum(torch.tensor(counts), 0) - 1])

    def leave(self, place: int) -> None:
        row, last = self.rows[place], len(self.rows) - 1
        if self.prefixes is not None:
            whole = (*row.request.prompt, *row.ids)
            self.prefixes.keep(Strip(whole[: len(whole) - len(row.pending)], *self.cache.copy(place)))
        if place != last:
            self.cache.move(last, place)


def _prompt(ids: Sequence[int]) -> Rendered:
    array = np.asarray(ids, dtype=np.int32)
    return Rendered(array, np.zeros(len(array), np.float32), np.zeros(len(array), np.int16))
