"""Which of a model's layers it can do without: the divergence that skipping each one alone brings.

A language model's layers differ a hundredfold in this: a few early ones, the last one and those whose attention copies what was said
cannot go, while skipping one of many others changes almost nothing (Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper
Layers, find runs of them). Measured on the records to be taught, since what a layer is for depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from posttrain.objectives.distill import reverse_kl_tokens
from posttrain.policy.architecture import blocks_of
from posttrain.policy.pack import Pack
from posttrain.policy.policy import Policy


@torch.no_grad()
def layer_importance(policy: Policy, pack: Pack) -> list[float]:
    """KL(p || p without the layer) of each layer, full vocabulary, mean over the pack's predictions, in nats."""
    pack = pack.to(policy.device)
    whole = policy.hidden(pack)[pack.rows]
    found = []
    for layer in blocks_of(policy.base):
        hook = layer.register_forward_hook(_skip, with_kwargs=True)
        try:
            without = policy.hidden(pack)[pack.rows]
        finally:
            hook.remove()
        found.append(float(policy.head.tokenwise(reverse_kl_tokens, whole, [(policy.head, without)]).mean()))
    return found


_DEARER = (
    2.0  # what a layer may cost beyond the dearest of the cheapest ones, and still go instead of a neighbour of one that goes
)


def most_important(importance: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` layers to keep, rising: those that cost least go, first where both neighbours stay, since two layers that
    follow each other can stand in for one another but not both be missed. No layer goes for its neighbours' sake that costs more than
    twice what the dearest would if cost alone decided."""
    by_cost = sorted(range(len(importance)), key=lambda layer: importance[layer])
    surplus = len(importance) - count
    gone: set[int] = set()
    bound = _DEARER * importance[by_cost[surplus - 1]] if surplus else 0.0
    for apart in (True, False):
        for layer in by_cost:
            if len(gone) == surplus:
                break
            if layer in gone or (apart and (importance[layer] > bound or {layer - 1, layer + 1} & gone)):
                continue
            gone.add(layer)
    return tuple(layer for layer in range(len(importance)) if layer not in gone)


def _skip(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    state = inputs[0] if inputs else kwargs["hidden_states"]
    return (state, *output[1:]) if isinstance(output, tuple) else state
