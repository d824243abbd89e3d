"""What a stream of requests remembers: trunks in its cache, and strips of rows that left it, the least recently used forgotten first."""

from __future__ import annotations

from collections.abc import Collection

import torch

from posttrain.sampling.cache import Cache, Trunk
from posttrain.sampling.prefixes import MIN_TRUNK, Family, Strip
from posttrain.sampling.protocol import Sharing

_MAX_BYTES = 1 << 29
_MAX_TRUNKS = 16


class Memory:
    """Both are lists from the least to the most recently used one. Families without `ids` have no trunk and cost nothing."""

    def __init__(self, cache: Cache, max_bytes: int = _MAX_BYTES, max_trunks: int = _MAX_TRUNKS) -> None:
        self._cache, self._max_bytes, self._max_trunks = cache, max_bytes, max_trunks
        self.trunks: list[Family] = []
        self.strips: list[tuple[Family, Strip]] = []
        self._bare: dict[Sharing, Family] = {}

    def bare(self, sharing: Sharing) -> Family:
        """The family of prompts that could share and have nothing in common."""
        return self._bare.setdefault(sharing, Family(sharing, ()))

    def find(self, sharing: Sharing, prompt: tuple[int, ...]) -> tuple[Family | None, Strip | None, Family | None, int]:
        """For a prompt, the longest trunk that it goes on from; the part of a strip that it goes on from, with the family that the strip
        hangs on, where that saves more; and how many tokens of the prompt the better of both holds."""
        most = len(prompt) - 1  # a prompt must have a last token to run
        fitting = (f for f in self.trunks if f.sharing == sharing and len(f.ids) <= most and prompt[: len(f.ids)] == f.ids)
        trunk = max(fitting, key=lambda family: len(family.ids), default=None)
        reach = len(trunk.ids) if trunk else 0
        found: tuple[Family, Strip] | None = None
        least = reach + MIN_TRUNK - 1  # copying a strip for less than this is not worth leaving the trunk
        for family, strip in self.strips:
            if family.sharing == sharing:
                common = min(shared(strip.ids, prompt), most)
                if common > least and common >= len(family.ids):
                    found, least, reach = (family, strip), common, common
        if found is None:
            return trunk, None, None, reach
        family, strip = found
        self.strips.append(self.strips.pop(next(i for i, (_, s) in enumerate(self.strips) if s is strip)))
        own = reach - len(family.ids)
        part = Strip(prompt[:reach], [k[:, :own] for k in strip.keys], [v[:, :own] for v in strip.values])
        return trunk, part, family, reach

    def plant(self, family: Family, ids: tuple[int, ...], keys: list[torch.Tensor], values: list[torch.Tensor]) -> Family:
        """A trunk of `ids` from a row that hangs on `family` and holds keys and values [Hkv, *, D] after it; its family."""
        assert family.number is not None
        below, own = self._cache.trunks[family.number], len(ids) - len(family.ids)
        parts = [
            [torch.cat([lower, upper[:, :own]], 1) for lower, upper in zip(lowers, uppers, strict=True)]
            if below.length
            else [upper[:, :own].contiguous() for upper in uppers]
            for lowers, uppers in ((below.keys, keys), (below.values, values))
        ]
        planted = Family(family.sharing, ids, number=self._cache.add(Trunk(len(ids), parts[0], parts[1])))
        self.trunks.append(planted)
        return planted

    def nothing_after(self, family: Family) -> Strip:
        """The empty strip on a family's trunk."""
        assert family.number is not None
        trunk = self._cache.trunks[family.number]
        return Strip(family.ids, [k[:, :0] for k in trunk.keys], [v[:, :0] for v in trunk.values])

    def use(self, family: Family) -> None:
        """A family's trunk was used, or computed, just now."""
        if family.ids and family.number is not None:
            self.trunks = [*(other for other in self.trunks if other is not family), family]

    def keep(self, family: Family, strip: Strip) -> None:
        """Remember what a row that leaves has computed. A strip that it goes on from is no longer needed."""
        size = strip.nbytes
        if size > self._max_bytes:
            return
        self.strips = [(f, s) for f, s in self.strips if f.sharing != family.sharing or strip.ids[: len(s.ids)] != s.ids]
        self.strips.append((family, strip))

    def shrink(self, living: Collection[int | None]) -> None:
        """Forget the oldest until the rest fits, except trunks with these numbers, which rows hang on."""
        held = [self._cache.trunks[family.number] for family in self.trunks if family.number is not None]
        used = sum(strip.nbytes for _, strip in self.strips) + sum(trunk.nbytes for trunk in held)
        while used > self._max_bytes and self.strips:
            used -= self.strips.pop(0)[1].nbytes
        for family in list(self.trunks):
            if len(self.trunks) <= self._max_trunks:
                return
            if family.number not in living and family.number is not None:
                self._cache.drop(family.number)
                self.trunks.remove(family)
                self.strips = [(f, s) for f, s in self.strips if f is not family]


def shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """The number of tokens that both start with."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices are compared at once, tokens one by one
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
