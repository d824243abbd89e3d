"""Least squares in place of many steps: a student cut from its teacher is refitted to the teacher's states, layer by layer.

A student that keeps every second layer starts far from its teacher, since each layer now has to do the work of those that were cut
behind it. Most of that work is linear in what the layer's MLP already computes: with the inner activations m [T, I] and the
teacher's states y [T, H] given, the down projection that meets them best has a closed form. After Shopkhoev et al. 2025 (ReplaceMe,
section 3.2), with the whole down projection solved for instead of one [H, H] transform behind it, and each layer fitted on the
states that the layers before it, already refitted, really give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import BaseModelError
from posttrain.policy.pack import Pack
from posttrain.policy.policy import Policy

_BLOCK = 2048  # tokens


@torch.no_grad()
def refit(student: Policy, teacher: Policy, kept: Sequence[int], pack: Pack, ridge: float) -> list[float]:
    """Refit the down projections of `student` (its layers are the teacher's layers `kept`) to the teacher's states on `pack`.

    min over W of sum_t |y_t - W m_t|^2 / |h_t|^2 + ridge * mean(m^2 / |h|^2) * T * |W - W_0|^2, where h_t is the teacher's state after
    the layer, y_t what the MLP has to add to meet it, and W_0 the layer's own projection. A layer that stands where it stood in the
    teacher is left alone. Returns the remaining sum |y - W m|^2 / |h|^2 / T of each refitted layer.
    Raises BaseModelError for an architecture whose layers do not add a gated MLP's output to the residual stream as it is.
    """
    layers = student.base.base_model.layers
    moved = [place for place, layer in enumerate(kept) if layer != place]
    for place in moved:
        _check(layers[place])
    _, targets = teacher.states(pack, [kept[place] for place in moved])
    left: list[float] = []
    hooks = [_install(layers[place], target, ridge, left) for place, target in zip(moved, targets, strict=True)]
    try:
        student.hidden(pack)
    finally:
        for pair in hooks:
            for hook in pair:
                hook.remove()
    return left


def _check(layer: Any) -> None:
    mlp = getattr(layer, "mlp", None)
    gated = all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    if not gated or hasattr(layer, "post_feedforward_layernorm"):
        raise BaseModelError(
            "this architecture's layers cannot be refitted",
            where="distill.refit",
            value=type(layer).__name__,
            remedy="set refit to 0 and give the distillation more steps",
        )


def _install(layer: Any, target: Tensor, ridge: float, left: list[float]) -> tuple[Any, Any]:
    """Hooks that refit the layer as the forward pass reaches it and pass on what it then computes."""
    seen: dict[str, Tensor] = {}

    def mlp_hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["input"], seen["output"] = inputs[0][0], output[0]

    def layer_hook(module: Any, inputs: object, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        change, remaining = _solve(layer.mlp, seen["input"], state[0], target, ridge)
        left.append(remaining)
        layer.mlp.down_proj.weight += change.to(layer.mlp.down_proj.weight.dtype)
        better = state.clone()
        for block in _blocks(len(target)):
            better[0, block] += (_inner(layer.mlp, seen["input"][block]).float() @ change.t()).to(state.dtype)
        seen.clear()
        return (better, *output[1:]) if isinstance(output, tuple) else better

    return layer.mlp.register_forward_hook(mlp_hook), layer.register_forward_hook(layer_hook)


def _solve(mlp: Any, inputs: Tensor, state: Tensor, target: Tensor, ridge: float) -> tuple[Tensor, float]:
    """The change of the down projection [H, I] float32, and the relative squared error that remains."""
    width, inner = mlp.down_proj.weight.shape
    gram, cross = torch.zeros(inner, inner), torch.zeros(inner, width)
    error = 0.0
    for block in _blocks(len(target)):
        scale = target[block].float().norm(dim=-1, keepdim=True).reciprocal()
        m = _inner(mlp, inputs[block]).float() * scale
        miss = (target[block].float() - state[block].float()) * scale
        gram += (m.t() @ m).cpu()
        cross += (m.t() @ miss).cpu()
        error += float(miss.square().sum())
    gram_ridge = gram + ridge * gram.diagonal().mean() * torch.eye(inner)
    change = torch.linalg.solve(gram_ridge, cross)
    error += float((change * (gram @ change)).sum()) - 2 * float((change * cross).sum())
    return change.t().to(state.device), error / len(target)


def _inner(mlp: Any, x: Tensor) -> Tensor:
    out: Tensor = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return out


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]
