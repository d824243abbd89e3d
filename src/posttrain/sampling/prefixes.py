"""What is shared and what is remembered of prompts: families on one trunk, and key/value strips of rows that finished."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from posttrain.sampling.protocol import SampleRequest, Sharing

MIN_TRUNK = 16  # tokens from which sharing pays
_WORTH = 2048  # tokens that need not be read in each step, over all rows, from which a trunk pays for the product of its own that it costs


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
    """Requests that may share (`SampleRequest.sharing`) and whose prompts start with the same `ids`: their trunk, `number` in the cache
    once it is computed."""

    sharing: Sharing
    ids: tuple[int, ...]
    number: int | None = None


def by_sharing(request: SampleRequest) -> tuple[str, str, tuple[int, ...]]:
    """An order in which requests that may share stand together, and those that share the most are neighbours."""
    return request.adapter or "", request.scope or "", request.prompt


def trunk_sizes(prompts: Sequence[tuple[int, ...]]) -> list[int]:
    """How many of its first tokens are each prompt's trunk (0: it has none). The prompts may share, and are sorted.

    What all start with is a trunk where that is worth its price; then so is, among those that go on alike, what more they share. A trunk
    is shorter by a token at least than each of its prompts: a prompt must have a last token to run."""
    sizes = [0] * len(prompts)
    alike = [range(len(prompts))] if len(prompts) > 1 else []
    while alike:
        members = alike.pop()
        first, last = prompts[members[0]], prompts[members[-1]]
        common = min(len(os.path.commonprefix([first, last])), *(len(prompts[i]) - 1 for i in members))
        more = common - sizes[members[0]]
        if common >= MIN_TRUNK and (len(members) - 1) * more >= _WORTH:
            for i in members:
                sizes[i] = common
        longer = [i for i in members if len(prompts[i]) > common + 1]
        for _, same in itertools.groupby(longer, key=lambda i: prompts[i][common]):
            group = list(same)
            if len(group) > 1:
                alike.append(range(group[0], group[-1] + 1))
    return sizes
