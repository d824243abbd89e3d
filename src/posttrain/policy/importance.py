"""Which of a model's layers it can do without: the divergence that skipping each one alone brings; and whether a student without some
is the teacher without them.

A language model's layers differ a hundredfold in this: a few early ones, the last one and those whose attention copies what was said
cannot go, while skipping one of many others changes almost nothing (Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper
Layers, find runs of them). Measured on the records to be taught, since what a layer is for depends on them; and where a student is
fitted to its teacher, after a fit, since most of what skipping a layer costs its neighbour learns at once (ReplaceMe, see `policy.refit`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from posttrain.errors import BaseModelError
from posttrain.objectives.distill import reverse_kl_tokens
from posttrain.policy.architecture import blocks_of, nats_apart, probe_logprobs
from posttrain.policy.pack import Pack
from posttrain.policy.policy import Policy
from posttrain.policy.refit import check_refit, fit_layer


@torch.no_grad()
def layer_importance(policy: Policy, pack: Pack, ridge: float = 0.0) -> list[float]:
    """KL(p || p without the layer) of each layer, full vocabulary, mean over the pack's predictions, in nats. With a `ridge` the layer
    behind it (the one before the last) is first fitted to the states that both gave (`policy.refit`): what a student's layer learns in
    closed form from the one that goes costs little, and what its attention copied cannot be learned so. What comes before the layer is
    computed once for all of them. BaseModelError where layers cannot be fitted."""
    if ridge > 0:
        check_refit(policy)
    pack = pack.to(policy.device)
    # layers that share their keys and values have them from a pass of those before
    again = not getattr(policy.config.get_text_config(), "num_kv_shared_layers", 0)
    with _recorded(policy) as outputs:
        whole = policy.hidden(pack)[pack.rows]
    found = []
    for layer in range(len(outputs)):
        beside = layer + 1 if layer + 1 < len(outputs) else layer - 1
        fit = nullcontext() if ridge == 0 else _fitted(policy, beside, outputs[max(layer, beside)][0], ridge)
        first = (layer if ridge == 0 else min(layer, beside)) if again else 0
        with _skipped(policy, [layer]), _replayed(policy, outputs[:first]), fit:
            without = policy.hidden(pack)[pack.rows]
        found.append(float(policy.head.tokenwise(reverse_kl_tokens, whole, [(policy.head, without)]).mean()))
    return found


def check_student(student: Policy, teacher: Policy, kept: Sequence[int]) -> None:
    """BaseModelError unless a student as it was cut computes what its teacher computes without the layers that are not `kept`."""
    with teacher.only_base(), _skipped(teacher, sorted(set(range(len(blocks_of(teacher.base)))) - set(kept))):
        wanted = probe_logprobs(teacher)
    # both make the same products, so that bfloat16 explains nothing here
    nats = nats_apart(probe_logprobs(student), wanted, torch.float32)
    if nats is not None:
        raise BaseModelError(
            f"a student of this architecture cannot be cut: it is {nats:.3g} nats from its teacher without the other layers",
            where="distill.layers",
            value=type(teacher.base).__name__,
            remedy="distil a model whose layers do not depend on their place",
        )


_DEARER = (
    2.0  # what a layer may cost beyond the dearest of the cheapest ones, and still go instead of a neighbour of one that goes
)


def most_important(importance: Sequence[float], count: int, apart: bool = True) -> tuple[int, ...]:
    """The `count` layers to keep, rising: those that cost least go. `apart`: first where both neighbours stay, since two layers that
    follow each other can stand in for one another but not both be missed, unless one was fitted to do without the other. No layer goes
    for its neighbours' sake that costs more than twice what the dearest would if cost alone decided."""
    by_cost = sorted(range(len(importance)), key=lambda layer: importance[layer])
    surplus = len(importance) - count
    gone: set[int] = set()
    bound = _DEARER * importance[by_cost[surplus - 1]] if surplus else 0.0
    for sparing in (True, False) if apart else (False,):
        for layer in by_cost:
            if len(gone) == surplus:
                break
            if layer in gone or (sparing and (importance[layer] > bound or {layer - 1, layer + 1} & gone)):
                continue
            gone.add(layer)
    return tuple(layer for layer in range(len(importance)) if layer not in gone)


@contextmanager
def _skipped(policy: Policy, layers: Sequence[int]) -> Iterator[None]:
    """Inside, a pass leaves these layers out."""
    blocks = blocks_of(policy.base)
    hooks = [blocks[layer].register_forward_hook(_skip, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _recorded(policy: Policy) -> Iterator[list[list[Any]]]:
    """Inside, a pass leaves here what each layer gives: one output for a pack, one for each row where rows run by themselves."""
    blocks = blocks_of(policy.base)
    outputs: list[list[Any]] = [[] for _ in blocks]

    def keep(layer: int) -> Any:
        return lambda module, inputs, output: outputs[layer].append(output)

    hooks = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(blocks)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replayed(policy: Policy, outputs: Sequence[Sequence[Any]]) -> Iterator[None]:
    """Inside, the first layers compute nothing: each gives its recorded outputs in turn."""

    def again(layer: int) -> Any:
        turn = iter(outputs[layer])
        return lambda *inputs, **kwargs: next(turn)

    first = list(blocks_of(policy.base))[: len(outputs)]
    own = [vars(block).get("forward") for block in first]  # of those that are recomputed, their own
    for layer, block in enumerate(first):
        block.forward = again(layer)
    try:
        yield
    finally:
        for block, forward in zip(first, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


@contextmanager
def _fitted(policy: Policy, layer: int, output: Any, ridge: float) -> Iterator[None]:
    """Inside, a pass fits this layer to the states of the given output and goes on with what it then gives."""
    block = blocks_of(policy.base)[layer]
    weight = block.mlp.down_proj.weight
    before = weight.clone()
    hooks = fit_layer(block, (output[0] if isinstance(output, tuple) else output)[0], ridge)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        weight.copy_(before)


def _skip(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    state = inputs[0] if inputs else kwargs["hidden_states"]
    return (state, *output[1:]) if isinstance(output, tuple) else state
