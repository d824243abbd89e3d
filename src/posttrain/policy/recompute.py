"""Activations computed again in the backward pass instead of kept (gradient checkpointing, Chen 2016): a block keeps its input only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(slots=True)
class Recompute:
    """Whether blocks keep their activations (False) or compute them again."""

    on: bool = False


def wrap(blocks: nn.ModuleList, wanted: Recompute) -> None:
    """Give every block a forward that heeds `wanted`. transformers' own switch works in training mode only, which a policy is never in:
    dropout would be noise in its ratios."""
    for block in blocks:
        _wrap(block, wanted)


def _wrap(block: Any, wanted: Recompute) -> None:
    plain: Callable[..., Any] = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if wanted.on and torch.is_grad_enabled():
            return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return plain(*args, **kwargs)

    block.forward = forward
