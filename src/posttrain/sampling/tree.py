"""Rows in one cache: prompts that start alike share a trunk, rows of several adapters decode together."""

from __future__ import annotations

import itertools
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
from posttrain.sampling.prefixes import Family, Strip, by_sharing, trunk_sizes
from posttrain.sampling.protocol import SampleRequest, Sharing
from posttrain.sampling.run import Drawing, Row, Run


class TreeRun(Run):
    """Rows in one cache, each family's over the trunk that its prompts share."""

    def __init__(
        self,
        policy: Policy,
        drawing: Drawing,
        capacity: int,
        refill: float,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(drawing, capacity, refill, progress)
        self.family: dict[int, Family] = {}
        self.strips: dict[int, Strip | None] = {}
        self.decoder = Decoder(policy, ())
        self.cache = Cache(capacity, 0)
        self._policy = policy

    def expect(self, requests: Mapping[int, SampleRequest]) -> None:
        """See `Run.expect`. What the prompts share is found among all of these."""
        order = sorted(requests, key=lambda i: by_sharing(requests[i]))
        super().expect({i: requests[i] for i in order})
        groups = [(sharing, list(own)) for sharing, own in itertools.groupby(order, key=lambda i: requests[i].sharing)]
        self.decoder = Decoder(self._policy, [adapter for (adapter, _), _ in groups])
        for sharing, own in groups:
            self._settle(sharing, own)
        self._make_room(order)

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

    def _settle(self, sharing: Sharing, indices: list[int]) -> None:
        """Find the families of requests that may share (sorted by prompt)."""
        prompts = [self.requests[i].prompt for i in indices]
        families: dict[tuple[int, ...], Family] = {}
        for index, prompt, size in zip(indices, prompts, trunk_sizes(prompts), strict=True):
            self.family[index] = families.setdefault(prompt[:size], Family(sharing, prompt[:size]))

    # -- prefill -------------------------------------------------------------------------------------------------------

    def admit(self, rows: list[Row]) -> None:
        """Start these rows. A remembered prefix is copied, and what follows it is left to the next step."""
        new: dict[Sharing, list[Row]] = {}
        for row in sorted(rows, key=_length):  # neighbours of like length: their attention is padded to the longest
            strip, family = self.strips.pop(row.index, None), self.family[row.index]
            if strip is None:
                new.setdefault(family.sharing, []).append(row)
                continue
            assert family.number is not None, "a strip hangs on a remembered trunk"
            row.pending = list(row.request.prompt[len(strip.ids) :])
            self.cache.restore(len(self.rows), strip.keys, strip.values, family.number)
            self.rows.append(row)
        for (adapter, _), own in new.items():
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
            family.number = self.cache.add(trunk_of(rows[: len(family.ids)], sink))
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
        """See `Run.leave`."""
        last = len(self.rows) - 1
        if place != last:
            self.cache.move(last, place)


def _length(row: Row) -> int:
    return len(row.request.prompt)


def _prompt(ids: Sequence[int]) -> Rendered:
    array = np.asarray(ids, dtype=np.int32)
    return Rendered(array, np.zeros(len(array), np.float32), np.zeros(len(array), np.int16))
