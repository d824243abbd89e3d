"""Rows in one cache: prompts that start alike share a trunk, rows of several adapters decode together."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from posttrain.contract import Sequence as Rendered
from posttrain.policy.attention import TreeAttention
from posttrain.policy.pack import fill_packs
from posttrain.policy.policy import Policy
from posttrain.sampling.cache import Cache, StepAttention, trunk_of
from posttrain.sampling.decoder import Decoder
from posttrain.sampling.prefixes import MIN_TRUNK, Family, Prefixes, Strip
from posttrain.sampling.protocol import SampleRequest
from posttrain.sampling.run import Drawing, Row, Run, computed

_GROUP = 4  # samples of one prompt from which it is a trunk of its own


class TreeRun(Run):
    """Rows in one cache, each family's over the trunk that its prompts share."""

    def __init__(
        self,
        policy: Policy,
        drawing: Drawing,
        capacity: int,
        refill: float,
        progress: Callable[[int], None] | None = None,
        session: dict[str | None, Prefixes] | None = None,
    ) -> None:
        super().__init__(drawing, capacity, refill, progress)
        self.family: dict[int, Family] = {}
        self.strips: dict[int, Strip | None] = {}
        self.decoder = Decoder(policy, ())
        self.cache = Cache(capacity, 0)
        self._policy, self._session = policy, session

    def expect(self, requests: Mapping[int, SampleRequest]) -> None:
        """See `Run.expect`. What the prompts share is found among all of these."""
        # neighbours share the most
        order = sorted(requests, key=lambda i: (requests[i].adapter or "", requests[i].prompt))
        super().expect({i: requests[i] for i in order})
        by_adapter = [(adapter, list(own)) for adapter, own in itertools.groupby(order, key=lambda i: requests[i].adapter)]
        self.decoder = Decoder(self._policy, [adapter for adapter, _ in by_adapter])
        for adapter, own in by_adapter:
            self._settle(adapter, own, None if self._session is None else self._session.setdefault(adapter, Prefixes()))
        self._make_room(order)
        for family in {id(family): family for family in self.family.values()}.values():
            if family.prefixes is not None and family.prefixes.trunk is not None:
                family.number = self.cache.add(family.prefixes.trunk)

    def _make_room(self, indices: Iterable[int]) -> None:
        """Memory for the strips of these requests, one token more than they can need."""
        room = max(
            len(self.requests[i].prompt) - len(self.family[i].ids) + self.requests[i].options.max_tokens + 1 for i in indices
        )
        self.cache.reserve(self.capacity, room)

    def forget(self, index: int) -> None:
        """See `Run.forget`."""
        super().forget(index)
        self.family.pop(index, None)
        self.strips.pop(index, None)

    def _settle(self, adapter: str | None, indices: list[int], prefixes: Prefixes | None) -> None:
        """Find the families of an adapter's requests (sorted by prompt), and the strips a session remembers for them."""
        prompts = [self.requests[i].prompt for i in indices]
        if prefixes is not None:
            if prefixes.trunk_for(prompts) is None:
                prefixes.forget()
            else:
                self.strips.update(zip(indices, prefixes.claim(prompts), strict=True))
            family = Family(adapter, prefixes.trunk_ids if prefixes.trunk else _common(prompts), prefixes)
            self.family.update(dict.fromkeys(indices, family))
            return
        rest = []
        for prompt, same in itertools.groupby(indices, key=lambda i: self.requests[i].prompt):
            group = list(same)
            if len(group) < _GROUP or len(prompt) <= MIN_TRUNK:
                rest += group
            else:
                self.family.update(dict.fromkeys(group, Family(adapter, prompt[:-1], None)))
        if rest:
            self.family.update(dict.fromkeys(rest, Family(adapter, _common([self.requests[i].prompt for i in rest]), None)))

    # -- prefill -------------------------------------------------------------------------------------------------------

    def admit(self, rows: list[Row]) -> None:
        """Start these rows. A remembered prefix is copied, and what follows it is left to the next step."""
        new: dict[str | None, list[Row]] = {}
        for row in sorted(rows, key=_length):  # neighbours of like length: their attention is padded to the longest
            strip, family = self.strips.pop(row.index, None), self.family[row.index]
            if strip is None:
                new.setdefault(family.adapter, []).append(row)
                continue
            assert family.number is not None, "a strip hangs on a remembered trunk"
            row.pending = list(row.request.prompt[len(strip.ids) :])
            self.cache.restore(len(self.rows), strip.keys, strip.values, family.number)
            self.rows.append(row)
        for adapter, own in new.items():
            self._prefill(adapter, own)

    def _prefill(self, adapter: str | None, rows: list[Row]) -> None:
        for pack in fill_packs([_prompt(row.request.prompt) for row in rows], self.options.prefill_tokens):
            sink: dict[int, tuple[Tensor, Tensor]] = {}
            hidden = self.decoder.infer(pack.ids, pack.positions, TreeAttention(pack, sink), [(adapter, None)])
            order = sorted(range(len(pack.members)), key=lambda place: _length(rows[pack.members[place]]))
            logits = self.decoder.logits(hidden[torch.tensor([pack.ends[place] for place in order])])
            fresh = [rows[pack.members[place]] for place in order]
            families = [self.family[row.index] for row in fresh]
            trunks = [self._trunk(family, pack.sequence_rows(p), sink) for family, p in zip(families, order, strict=True)]
            own = [pack.sequence_rows(p)[len(family.ids) :] for family, p in zip(families, order, strict=True)]
            self.cache.fill(len(self.rows), own, trunks, sink)
            self.rows += fresh
            self.choose(logits, fresh)

    def _trunk(self, family: Family, rows: Tensor, sink: dict[int, tuple[Tensor, Tensor]]) -> int:
        """The number of the family's trunk; its first prefilled prompt, at these rows of the pack, gives it."""
        if family.number is None:
            trunk = trunk_of(rows[: len(family.ids)], sink)
            family.number = self.cache.add(trunk)
            if family.prefixes is not None:
                family.prefixes.start(trunk, family.ids)
        return family.number

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
            prefixes.keep(Strip(computed(row), *self.cache.copy(place)))
        if place != last:
            self.cache.move(last, place)


def _length(row: Row) -> int:
    return len(row.request.prompt)


def _common(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest prefix shared by all prompts (sorted), shorter by at least one token than each: a prompt must have a last token
    to run. Empty where sharing would not pay."""
    length = min(len(os.path.commonprefix([prompts[0], prompts[-1]])), min(map(len, prompts)) - 1)
    return prompts[0][:length] if len(prompts) > 1 and length >= MIN_TRUNK else ()


def _prompt(ids: Sequence[int]) -> Rendered:
    array = np.asarray(ids, dtype=np.int32)
    return Rendered(array, np.zeros(len(array), np.float32), np.zeros(len(array), np.int16))
