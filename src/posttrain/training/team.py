"""Several processes that train one policy: each takes a share of a step's packs, and gradients are summed.

Every process holds the whole policy and runs the same stage; what decides anything (gradients, metrics, sampled episodes) is made equal
on all of them, so that they stay equal. Only the first process writes. An objective divides by the step's global counts itself
(objectives.md 1.2), which is why sums are all there is to exchange.

Processes are started by `accelerate launch -m posttrain run ...` or by `torchrun`; alone, every call here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.policy.pack import Pack

T = TypeVar("T")


class Team:
    """This process's place among `size` processes, and what they exchange. Calls must be made by all, in the same order."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def own(self, packs: Iterable[Pack]) -> list[Pack]:
        """This process's packs: the longest first, each to the process with the fewest tokens so far."""
        everything = list(packs)
        loads, shares = [0] * self.size, [[] for _ in range(self.size)]  # type: list[int], list[list[int]]
        for index in sorted(range(len(everything)), key=lambda i: (-everything[i].tokens, i)):
            least = loads.index(min(loads))
            loads[least] += everything[index].tokens
            shares[least].append(index)
        return [everything[index] for index in sorted(shares[self.rank])]

    def split(self, items: Sequence[T]) -> list[T]:
        """This process's items: every `size`-th. `joined` puts what became of them back in order."""
        return list(items[self.rank :: self.size])

    def joined(self, own: Sequence[T]) -> list[T]:
        """The results of `split`'s items from all processes, in the order of the items."""
        if self.size == 1:
            return list(own)
        shares = self.gather(list(own))
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the first process's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def totals(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Sums by name over the processes, added in their order; a name need not be known to all."""
        if self.size == 1:
            return dict(metrics)
        found: dict[str, float] = {}
        for share in self.gather(dict(metrics)):
            for name, value in share.items():
                found[name] = found.get(name, 0.0) + value
        return found

    def share(self, value: T) -> T:
        """The first process's value."""
        if self.size == 1:
            return value
        box: list[Any] = [value if self.first else None]
        dist.broadcast_object_list(box, src=0)
        found: T = box[0]
        return found

    def gather(self, value: T) -> list[T]:
        """Every process's value, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


@cache
def team() -> Team:
    """The processes this one was started with. Joins them at the first call; a process that does not come is an error after the
    backend's time limit."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Team()
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return Team(state.process_index, state.num_processes)
