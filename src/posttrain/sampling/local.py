"""The in-process engine: continuous batching over a key/value cache with shared trunks.

What an adapter's prompts all start with (tools and system text) is prefilled once and its attention is computed once for all of them;
so is the whole prompt of a group of samples. Finished rows leave, waiting requests take their place, and rows of several adapters
decode together. Under a grammar, runs of tokens that leave no choice are appended without running the model for each. Inside a session
an episode's next turn runs only what is new in it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from posttrain.contract import Sequence as Rendered
from posttrain.errors import PosttrainError
from posttrain.grammar.matcher import GrammarEngine
from posttrain.policy.attention import TreeAttention
from posttrain.policy.pack import fill_packs
from posttrain.policy.policy import Policy
from posttrain.sampling.cache import Cache, StepAttention, trunk_of
from posttrain.sampling.decoder import Decoder
from posttrain.sampling.prefixes import Prefixes, Strip
from posttrain.sampling.protocol import Sample, SampleRequest
from posttrain.sampling.rows import RowRun
from posttrain.sampling.run import Drawing, EngineOptions, Run

_MIN_TRUNK = 16
_GROUP = 4  # samples of one prompt from which it is a trunk of its own


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
        together = self.policy.packs and len(by_adapter) > 1 and all(self.policy.mixes(adapter) for adapter in by_adapter)
        for indices in [list(range(len(requests)))] if together else by_adapter.values():
            if self.policy.packs:
                run: Run = TreeRun(self.policy, drawing, requests, indices, progress, self._session)
            else:
                self.policy.use(requests[indices[0]].adapter)
                run = RowRun(self.policy, drawing, requests, indices, progress)
            results.update(run.decode())
        return [results[index] for index in range(len(requests))]


@dataclass(slots=True)
class _Family:
    """Requests of one adapter whose prompts start with the same `ids`: their trunk, `number` in the cache once it is computed.
    `prefixes`: what the session remembers for the adapter."""

    adapter: str | None
    ids: tuple[int, ...]
    prefixes: Prefixes | None
    number: int | None = None


class TreeRun(Run):
    """Rows in one cache, each family's over the trunk that its prompts share."""

    def __init__(
        self,
        policy: Policy,
        drawing: Drawing,
        requests: Sequence[SampleRequest],
        indices: Sequence[int],
        progress: Callable[[int], None] | None,
        session: dict[str | None, Prefixes] | None,
    ) -> None:
        # neighbours share the most
        super().__init__(
            drawing, requests, sorted(indices, key=lambda i: (requests[i].adapter or "", requests[i].prompt)), progress
        )
        self.family: dict[int, _Family] = {}
        self.strips: dict[int, Strip | None] = {}
        groups = itertools.groupby(self.waiting, key=lambda i: requests[i].adapter)
        by_adapter = [(adapter, list(own)) for adapter, own in groups]
        self.decoder = Decoder(policy, [adapter for adapter, _ in by_adapter])
        for adapter, own in by_adapter:
            self._settle(adapter, own, None if session is None else session.setdefault(adapter, Prefixes()))
        room = max(len(requests[i].prompt) - len(self.family[i].ids) + requests[i].options.max_tokens for i in indices)
        self.cache = Cache(self.capacity, room + 1)
        for family in {id(family): family for family in self.family.values()}.values():
            if family.prefixes is not None and family.prefixes.trunk is not None:
                family.number = self.cache.add(family.prefixes.trunk)

    def _settle(self, adapter: str | None, indices: list[int], prefixes: Prefixes | None) -> None:
        """Find the families of an adapter's requests (sorted by prompt), and the strips a session remembers for them."""
        prompts = [self.requests[i].prompt for i in indices]
        if prefixes is not None:
            if prefixes.trunk_for(prompts) is None:
                prefixes.forget()
            else:
                self.strips.update(zip(indices, prefixes.claim(prompts), strict=True))
            family = _Family(adapter, prefixes.trunk_ids if prefixes.trunk else _common(prompts), prefixes)
            self.family.update(dict.fromkeys(indices, family))
            return
        rest = []
        for prompt, same in itertools.groupby(indices, key=lambda i: self.requests[i].prompt):
            group = list(same)
            if len(group) < _GROUP or len(prompt) <= _MIN_TRUNK:
                rest += group
            else:
                self.family.update(dict.fromkeys(group, _Family(adapter, prompt[:-1], None)))
        if rest:
            self.family.update(dict.fromkeys(rest, _Family(adapter, _common([self.requests[i].prompt for i in rest]), None)))

    # -- prefill -------------------------------------------------------------------------------------------------------

    def admit(self, indices: list[int]) -> None:
        """Give waiting requests a row. A remembered prefix is copied, and what follows it is left to the next step."""
        new: dict[str | None, list[int]] = {}
        for index in sorted(indices, key=self._length):  # neighbours of like length: their attention is padded to the longest
            strip, family = self.strips.pop(index, None), self.family[index]
            if strip is None:
                new.setdefault(family.adapter, []).append(index)
                continue
            assert family.number is not None, "a strip hangs on a remembered trunk"
            row = self.row(index)
            row.pending = list(row.request.prompt[len(strip.ids) :])
            self.cache.restore(len(self.rows), strip.keys, strip.values, family.number)
            self.rows.append(row)
        for adapter, own in new.items():
            self._prefill(adapter, own)

    def _prefill(self, adapter: str | None, indices: list[int]) -> None:
        prompts = [_prompt(self.requests[i].prompt) for i in indices]
        for pack in fill_packs(prompts, self.options.prefill_tokens):
            sink: dict[int, tuple[Tensor, Tensor]] = {}
            hidden = self.decoder.infer(pack.ids, pack.positions, TreeAttention(pack, sink), [(adapter, None)])
            order = sorted(range(len(pack.members)), key=lambda place: self._length(indices[pack.members[place]]))
            logits = self.decoder.logits(hidden[[pack.ends[place] for place in order]])
            owners = [indices[pack.members[place]] for place in order]
            trunks = [self._trunk(self.family[i], pack.sequence_rows(p), sink) for i, p in zip(owners, order, strict=True)]
            own = [pack.sequence_rows(p)[len(self.family[i].ids) :] for i, p in zip(owners, order, strict=True)]
            fresh = [self.row(index) for index in owners]
            self.cache.fill(len(self.rows), own, trunks, sink)
            self.rows += fresh
            self.choose(logits, fresh)

    def _trunk(self, family: _Family, rows: Tensor, sink: dict[int, tuple[Tensor, Tensor]]) -> int:
        """The number of the family's trunk; its first prefilled prompt, at these rows of the pack, gives it."""
        if family.number is None:
            trunk = trunk_of(rows[: len(family.ids)], sink)
            family.number = self.cache.add(trunk)
            if family.prefixes is not None:
                family.prefixes.start(trunk, family.ids)
        return family.number

    def _length(self, index: int) -> int:
        return len(self.requests[index].prompt)

    # -- decode --------------------------------------------------------------------------------------------------------

    def step(self) -> Tensor:
        """Run every row's pending tokens; logits [R, V] at each row's last one."""
        counts = [len(row.pending) for row in self.rows]
        attention = StepAttention(self.cache, counts)
        ids = torch.tensor([token for row in self.rows for token in row.pending])
        hidden = self.decoder.infer(ids, attention.positions, attention, self._shares(counts))
        attention.commit(counts)
        for row in self.rows:
            row.pending.clear()
        return self.decoder.logits(hidden[torch.cumsum(torch.tensor(counts), 0) - 1])

    def _shares(self, counts: list[int]) -> list[tuple[str | None, Tensor | None]]:
        """Each adapter with the flat indices of its tokens."""
        tokens: dict[str | None, list[int]] = {}
        start = 0
        for row, count in zip(self.rows, counts, strict=True):
            tokens.setdefault(row.request.adapter, []).extend(range(start, start + count))
            start += count
        return [(adapter, None if len(own) == start else torch.tensor(own)) for adapter, own in tokens.items()]

    def leave(self, place: int) -> None:
        row, last = self.rows[place], len(self.rows) - 1
        prefixes = self.family[row.index].prefixes
        if prefixes is not None:
            whole = (*row.request.prompt, *row.ids)
            prefixes.keep(Strip(whole[: len(whole) - len(row.pending)], *self.cache.copy(place)))
        if place != last:
            self.cache.move(last, place)


def _common(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest prefix shared by all prompts (sorted), shorter by at least one token than each: a prompt must have a last token
    to run. Empty where sharing would not pay."""
    length = min(len(os.path.commonprefix([prompts[0], prompts[-1]])), min(map(len, prompts)) - 1)
    return prompts[0][:length] if len(prompts) > 1 and length >= _MIN_TRUNK else ()


def _prompt(ids: Sequence[int]) -> Rendered:
    array = np.asarray(ids, dtype=np.int32)
    return Rendered(array, np.zeros(len(array), np.float32), np.zeros(len(array), np.int16))
