"""Requests that come and go between steps: what a server and conversations decode with.

The same rows, cache and passes as a batch's (`tree.py`, `rows.py`). What differs is that nobody knows the requests beforehand, so what
they share is found as they come: a trunk in the cache, the strip of a row that finished, or a row that is decoding.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from posttrain.errors import PosttrainError
from posttrain.policy.policy import Policy
from posttrain.sampling.memory import Memory, shared
from posttrain.sampling.prefixes import MIN_TRUNK, Strip, by_sharing
from posttrain.sampling.protocol import Sample, SampleRequest, Sharing
from posttrain.sampling.rows import RowRun
from posttrain.sampling.run import Drawing, Row, Run, check_prompt, computed
from posttrain.sampling.tree import TreeRun

_AT_ONCE = 1024  # prompt tokens that a server takes in by one turn while others decode, who wait for them
_PLANTED = 256  # tokens shared with a decoding row from which they become a trunk, a product more in each step; fewer are copied


class LocalStream:
    """Implements `Stream` over a policy in this process. Adapters that cannot share a pass take turns."""

    def __init__(self, policy: Policy, drawing: Drawing, rows: int, at_once: int | None = _AT_ONCE) -> None:
        """`at_once`: prompt tokens taken in by one turn while rows decode; None where nobody minds the wait."""
        self._policy, self._drawing, self._rows, self._at_once = policy, drawing, rows, at_once
        self._runs: dict[str | None, TreeStream | RowRun] = {}  # by adapter; what shares passes is under _SHARED
        self._keys: dict[str | None, str | None] = {}
        self._where: dict[int, TreeStream | RowRun] = {}
        self._failed: dict[int, Sample | PosttrainError] = {}
        self._tickets = itertools.count()

    @torch.inference_mode()
    def admit(self, requests: Sequence[SampleRequest]) -> list[int]:
        """See `Stream.admit`."""
        tickets: list[int] = []
        groups: dict[str | None, dict[int, SampleRequest]] = {}
        for request in requests:
            tickets.append(next(self._tickets))
            groups.setdefault(self._key(request.adapter), {})[tickets[-1]] = request
        for key, own in groups.items():
            self._enter(key, own)
        return tickets

    def _key(self, adapter: str | None) -> str | None:
        """Under which of the runs an adapter's requests decode."""
        if adapter not in self._keys:
            apart = not self._policy.packs or not self._policy.mixes(adapter)
            self._keys[adapter] = adapter if apart else _SHARED
        return self._keys[adapter]

    def _enter(self, key: str | None, requests: dict[int, SampleRequest]) -> None:
        """Give requests to the run of their kind."""
        for ticket, request in requests.items():
            try:
                check_prompt(request, "request", self._policy.steady)
                self._where[ticket] = self._run(key, request.adapter)
            except PosttrainError as error:
                self._failed[ticket] = error
        known = {ticket: request for ticket, request in requests.items() if ticket in self._where}
        if known:
            self._runs[key].expect(known)

    def _run(self, key: str | None, adapter: str | None) -> TreeStream | RowRun:
        """BindingError for an adapter that the policy does not hold."""
        if key not in self._runs and self._policy.packs:
            self._runs[key] = TreeStream(self._policy, self._drawing, self._rows, self._at_once)
        elif key not in self._runs:
            self._runs[key] = RowRun(self._policy, adapter, self._drawing, self._rows, refill=0)
        run = self._runs[key]
        if isinstance(run, TreeStream):
            run.decoder.add(adapter)
        return run

    @torch.inference_mode()
    def step(self) -> dict[int, Sample | PosttrainError]:
        """See `Stream.step`."""
        done, self._failed = self._failed, {}
        for run in self._runs.values():
            if run.busy:
                run.activate()  # another run or another stream of the same policy may have had its turn
                done.update(run.turn())
        for ticket in done:
            self._where.pop(ticket, None)
        return done

    @torch.inference_mode()
    def cancel(self, ticket: int) -> None:
        """See `Stream.cancel`."""
        self._failed.pop(ticket, None)
        run = self._where.pop(ticket, None)
        if run is not None:
            run.cancel(ticket)


_SHARED = ""  # no adapter's name


class TreeStream(TreeRun):
    """A run whose requests arrive one by one."""

    def __init__(self, policy: Policy, drawing: Drawing, capacity: int, at_once: int | None) -> None:
        super().__init__(policy, drawing, capacity, refill=0)
        self.at_once = at_once
        self.memory = Memory(self.cache)

    def activate(self) -> None:
        """See `Decoder.activate`."""
        self.decoder.activate()

    def expect(self, requests: Mapping[int, SampleRequest]) -> None:
        """See `Run.expect`. What a prompt shares is looked for when it gets its row."""
        Run.expect(self, requests)

    def take(self, free: int) -> list[int]:
        """See `Run.take`. While rows decode, prompts enter a few at a time: the rows wait while they are prefilled."""
        if self.rows and self.at_once is not None:
            sizes = itertools.accumulate(len(self.requests[i].prompt) for i in self.waiting)
            free = min(free, max(1, sum(size <= self.at_once for size in sizes)))
        return super().take(free)

    def admit(self, rows: list[Row]) -> None:
        """See `TreeRun.admit`."""
        fresh = [row for row in rows if not self._recall(row)]
        fresh.sort(key=lambda row: by_sharing(row.request))
        for sharing, own in itertools.groupby(fresh, key=lambda row: row.request.sharing):
            self._settle(sharing, [row.index for row in own])
        for row in fresh:
            if not self.family[row.index].ids:
                self.family[row.index] = self.memory.bare(row.request.sharing)
        self._make_room(row.index for row in rows)
        families = {id(family): family for family in (self.family[row.index] for row in rows)}
        super().admit(rows)
        for family in families.values():
            self.memory.use(family)
        self.memory.shrink({family.number for family in self.family.values()})

    def _recall(self, row: Row) -> bool:
        """Find what was computed of the row's prompt for another: its family, and the strip to copy."""
        prompt, sharing = row.request.prompt, row.request.sharing
        trunk, strip, family, reach = self.memory.find(sharing, prompt)
        place, common = self._alike(sharing, prompt)
        if common >= max(reach, MIN_TRUNK) and common >= (len(trunk.ids) if trunk else 0) + MIN_TRUNK:
            donor = self.family[self.rows[place].index]
            own = common - len(donor.ids)
            if own >= _PLANTED:
                trunk, strip = self.memory.plant(donor, prompt[:common], *self.cache.copy(place)), None
            elif common > reach:
                keys, values = self.cache.copy(place)
                family, strip = donor, Strip(prompt[:common], [k[:, :own] for k in keys], [v[:, :own] for v in values])
        if strip is not None and family is not None:
            self.family[row.index], self.strips[row.index] = family, strip
        elif trunk is not None:
            self.family[row.index], self.strips[row.index] = trunk, self.memory.nothing_after(trunk)
        else:
            return False
        return True

    def _alike(self, sharing: Sharing, prompt: tuple[int, ...]) -> tuple[int, int]:
        """The decoding row whose computed tokens share the longest start with a prompt, and that start's length, less than the prompt's.
        Only starts that reach past the row's trunk count: those on the trunk are found by it."""
        best = (0, 0)
        for place, row in enumerate(self.rows):
            if row.request.sharing == sharing:
                common = min(shared(computed(row), prompt), len(prompt) - 1)
                if common > max(best[1], len(self.family[row.index].ids)):
                    best = (place, common)
        return best

    def leave(self, place: int) -> None:
        """See `Run.leave`. What the row computed is remembered."""
        row = self.rows[place]
        ids = computed(row)
        if len(ids) >= MIN_TRUNK:
            self.memory.keep(self.family[row.index], Strip(ids, *self.cache.copy(place)))
        super().leave(place)
