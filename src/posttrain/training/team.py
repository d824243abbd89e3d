"""Several processes that train one policy: each takes a share of a step's packs, and gradients are summed.

Every process holds the whole policy and runs the same stage; what decides anything (gradients, metrics, sampled episodes) is made equal
on all of them, so that they stay equal. Only the first process writes. An objective divides by the step's global counts itself
(objectives.md 1.2), which is why sums are all there is to exchange.

Where accelerate's configuration names FSDP (version 2), a process holds a share of the frozen weights while a stage trains
(`policy/sharded.py`); whatever else that configuration asks for is refused rather than ignored.

Processes are started by `accelerate launch -m posttrain run ...` or by `torchrun`; alone, every call here is the identity.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.errors import RecipeError
from posttrain.policy.pack import Pack

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # how long processes wait for an order of the first, which measures, decides and writes meanwhile


@dataclass(frozen=True, slots=True)
class Sharding:
    """FSDP2. reshard: let go of a block's whole weights between its forward and its backward pass."""

    reshard: bool = True


class Team:
    """This process's place among `size` processes, and what they exchange. Calls must be made by all, in the same order."""

    def __init__(self, rank: int = 0, size: int = 1, sharding: Sharding | None = None, orders: Any = None) -> None:
        """`orders`: the group of processes that waits longer than the backend's time limit (None: no other than the default)."""
        self.rank, self.size, self.sharding, self._orders = rank, size, sharding, orders

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def own(self, packs: Iterable[Pack]) -> list[Pack]:
        """This process's packs: the longest first, each to the process with the fewest tokens so far."""
        everything = list(packs)
        return [everything[index] for index in sorted(self._shares(everything)[self.rank])]

    def idle(self, packs: Sequence[Pack]) -> int:
        """How many packs this process has fewer than the one that has most."""
        shares = self._shares(packs)
        return max(map(len, shares)) - len(shares[self.rank])

    def _shares(self, packs: Sequence[Pack]) -> list[list[int]]:
        loads, shares = [0] * self.size, [[] for _ in range(self.size)]  # type: list[int], list[list[int]]
        for index in sorted(range(len(packs)), key=lambda i: (-packs[i].tokens, i)):
            least = loads.index(min(loads))
            loads[least] += packs[index].tokens
            shares[least].append(index)
        return shares

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
        return self._broadcast(value, None)

    def order(self, value: T) -> T:
        """`share` for what the first process decides after work that it does alone: the others wait days, not the backend's limit."""
        return self._broadcast(value, self._orders)

    def _broadcast(self, value: T, group: Any) -> T:
        if self.size == 1:
            return value
        box: list[Any] = [value if self.first else None]
        dist.broadcast_object_list(box, src=0, group=group)
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

    sharding = sharding_of(os.environ)
    if torch.cuda.is_available():  # tensors may lie on either side: a recipe may name the CPU on a machine with GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl")
    state = PartialState(cpu=not torch.cuda.is_available())
    atexit.register(_leave)
    orders = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Team(state.process_index, state.num_processes, sharding, orders)


def _leave() -> None:
    """End the backend's threads while the interpreter still runs: one that lets go of a tensor after that aborts the process. Not after an
    error that nobody caught: the others may still wait for this process, and it must not wait for them."""
    if dist.is_initialized() and not hasattr(sys, "last_type"):
        dist.destroy_process_group()


# What `accelerate launch` may ask for and posttrain does in another way or not at all: variable, its harmless values, remedy.
_REFUSED = (
    ("ACCELERATE_USE_DEEPSPEED", ("", "false"), "use FSDP version 2"),
    ("ACCELERATE_USE_MEGATRON_LM", ("", "false"), "use FSDP version 2"),
    (
        "ACCELERATE_MIXED_PRECISION",
        ("", "no"),
        "name the number type in the recipe, `dtype: bfloat16`, and set mixed_precision to no",
    ),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("", "1"), "a step's packs are accumulated already: raise the stage's `batch`"),
)
_REFUSED_FSDP = (
    ("FSDP_OFFLOAD_PARAMS", ("", "false"), "set fsdp_offload_params to false"),
    ("FSDP_ACTIVATION_CHECKPOINTING", ("", "false"), "say `recompute: true` in the recipe"),
)


def sharding_of(environment: Mapping[str, str]) -> Sharding | None:
    """What accelerate's configuration says of sharding. RecipeError where it asks for something that would not be done."""
    sharded = _flag(environment, "ACCELERATE_USE_FSDP")
    for name, harmless, remedy in (*_REFUSED, *(_REFUSED_FSDP if sharded else ())):
        if (value := environment.get(name, "").lower()) not in harmless:
            raise RecipeError(
                "accelerate's configuration asks for what posttrain does not do", where=name, value=value, remedy=remedy
            )
    if not sharded:
        return None
    if (version := environment.get("FSDP_VERSION", "1")) != "2":
        raise RecipeError("only FSDP version 2 is supported", where="FSDP_VERSION", value=version, remedy="set fsdp_version to 2")
    return Sharding(_flag(environment, "FSDP_RESHARD_AFTER_FORWARD", "true"))


def _flag(environment: Mapping[str, str], name: str, default: str = "false") -> bool:
    return environment.get(name, default).lower() in ("true", "1")
