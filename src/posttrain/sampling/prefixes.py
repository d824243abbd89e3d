"""What a session remembers: key/value strips of finished rows, so that an episode's next turn runs only what is new in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from posttrain.sampling.cache import Trunk

MIN_TRUNK = 16  # tokens from which sharing pays
_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Strip:
    """The computed part of one row: `ids` (trunk included), and per layer the keys and values [Hkv, len(ids) - trunk, D] after it."""

    ids: tuple[int, ...]
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def nbytes(self) -> int:
        return 2 * sum(k.numel() * k.element_size() for k in self.keys)


@dataclass(slots=True)
class Family:
    """Requests of one adapter whose prompts start with the same `ids`: their trunk, `number` in the cache once it is computed.
    `prefixes`: what the session remembers for the adapter."""

    adapter: str | None
    ids: tuple[int, ...]
    prefixes: Prefixes | None = None
    number: int | None = None


@dataclass(slots=True)
class Prefixes:
    """The memory of one session for one adapter. Bounded: a strip that does not fit is computed again when it is needed."""

    trunk: Trunk | None = None
    trunk_ids: tuple[int, ...] = ()
    kept: list[Strip] = field(default_factory=list)
    max_bytes: int = _MAX_BYTES
    used: int = 0

    def trunk_for(self, prompts: Sequence[tuple[int, ...]]) -> Trunk | None:
        """The remembered trunk where every prompt goes on from it."""
        size = len(self.trunk_ids)
        if self.trunk is not None and all(len(p) > size and p[:size] == self.trunk_ids for p in prompts):
            return self.trunk
        return None

    def forget(self) -> None:
        """Drop everything: the prompts go on from nothing that is remembered."""
        self.trunk, self.trunk_ids, self.kept, self.used = None, (), [], 0

    def start(self, trunk: Trunk, ids: tuple[int, ...]) -> None:
        """Remember a new trunk; strips hang on their trunk, so those of another are dropped."""
        self.trunk, self.trunk_ids = trunk, ids
        self.kept, self.used = [], 0

    def keep(self, strip: Strip) -> None:
        if self.used + strip.nbytes <= self.max_bytes:
            self.kept.append(strip)
            self.used += strip.nbytes

    def claim(self, prompts: Sequence[tuple[int, ...]]) -> list[Strip | None]:
        """For each prompt the longest remembered strip that is a proper prefix of it. What no prompt goes on from is forgotten."""
        size = len(self.trunk_ids)
        by_next: dict[tuple[int, ...], list[Strip]] = {}
        for strip in self.kept:
            by_next.setdefault(strip.ids[size : size + 8], []).append(strip)
        found = [
            max(
                (s for s in by_next.get(p[size : size + 8], ()) if len(s.ids) < len(p) and p[: len(s.ids)] == s.ids),
                key=lambda s: len(s.ids),
                default=None,
            )
            for p in prompts
        ]
        wanted = {id(strip): strip for strip in found if strip is not None}
        self.kept = list(wanted.values())
        self.used = sum(strip.nbytes for strip in self.kept)
        return found
