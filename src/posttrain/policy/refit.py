"""Least squares in place of many steps: a student cut from its teacher is refitted to the teacher's states, layer by layer.

A student that keeps every second layer starts far from its teacher, since each layer now has to do the work of those that were cut
behind it. Most of that work is linear in what the layer's MLP already computes: with the inner activations m [T, I] and the
teacher's states y [T, H] given, the down projection that meets them best has a closed form. After Shopkhoev et al. 2025 (ReplaceMe,
section 3.2), with the whole down projection solved for instead of one [H, H] transform behind it, and each layer fitted on the
states that the layers before it, already refitted, really give.

The same sums say which of the MLP's neurons can go: without neuron i the fit loses |w_i|^2 / [(G + lambda)^-1]_ii (Hassibi & Stork 1993,
Optimal Brain Surgeon, eq. 5), G = m^T m. Attention copies references and cannot be cut so far; MLPs are three quarters of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import BaseModelError
from posttrain.policy.architecture import blocks_of
from posttrain.policy.pack import Pack
from posttrain.policy.policy import Policy

_BLOCK = 2048  # tokens
_ROUNDS = 8  # neurons are removed in so many rounds: each changes what the others are worth
_MLP = ("gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def refit(
    student: Policy, teacher: Policy, kept: Sequence[int], pack: Pack, ridge: float, width: int | None = None
) -> list[float]:
    """Refit the down projections of `student` (its layers are the teacher's layers `kept`) to the teacher's states on `pack`, and leave
    `width` neurons in each MLP (None: all of them).

    min over W of sum_t |y_t - W m_t|^2 / |h_t|^2 + ridge * mean(m^2 / |h|^2) * T * |W - W_0|^2, where h_t is the teacher's state after
    the layer (for the student's last one: after the teacher's last), y_t what the MLP has to add to meet it, and W_0 the layer's own
    projection. A layer that keeps its width and stands where it stood in the teacher is left alone. Returns the remaining
    sum |y - W m|^2 / |h|^2 / T of each refitted layer.
    Raises BaseModelError for an architecture whose layers do not add a gated MLP's output to the residual stream as it is.
    """
    check_refit(student)
    layers = blocks_of(student.base)
    if width == student.base.config.get_text_config().intermediate_size:
        width = None
    met = reach(kept, len(blocks_of(teacher.base)))
    fitted = [place for place, layer in enumerate(met) if layer != place or width is not None]
    _, targets = teacher.states(pack, [met[place] for place in fitted])
    left: list[float] = []
    hooks = [fit_layer(layers[place], target, ridge, width, left) for place, target in zip(fitted, targets, strict=True)]
    try:
        student.hidden(pack)
    finally:
        for pair in hooks:
            for hook in pair:
                hook.remove()
    if width is not None:
        student.base.config.get_text_config().intermediate_size = width
    return left


def reach(kept: Sequence[int], layers: int) -> tuple[int, ...]:
    """The layer of the teacher, which has so many, whose states each of the student's has to meet: its own; the last one's the last."""
    return (*kept[:-1], layers - 1)


def check_refit(policy: Policy, where: str = "distill.refit") -> None:
    """Raise BaseModelError for a policy whose layers cannot be refitted."""
    for layer in blocks_of(policy.base):
        mlp = getattr(layer, "mlp", None)
        gated = all(hasattr(mlp, name) for name in (*_MLP, "act_fn"))
        plain = not hasattr(layer, "post_feedforward_layernorm") and getattr(layer, "residual_multiplier", 1.0) == 1.0
        if not (policy.packs and gated and plain):
            raise BaseModelError(
                "this architecture's layers cannot be refitted",
                where=where,
                value=type(layer).__name__,
                remedy="set refit to 0 and width to null, and give the distillation more steps",
            )


def fit_layer(
    layer: Any, target: Tensor, ridge: float, width: int | None = None, left: list[float] | None = None
) -> tuple[Any, Any]:
    """Hooks that fit the layer to the states target [T, H] as a forward pass over one pack reaches it, see `refit`, and pass on what it
    then computes. What remains is appended to `left`."""
    seen: dict[str, Tensor] = {}

    def mlp_hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["input"] = inputs[0][0]

    def layer_hook(module: Any, inputs: object, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        neurons, change, remaining = _solve(layer.mlp, seen["input"], state[0], target, ridge, width)
        if left is not None:
            left.append(remaining)
        better = state.clone()
        for block in _blocks(len(target)):
            better[0, block] += (_inner(layer.mlp, seen["input"][block]).float() @ change.t()).to(state.dtype)
        layer.mlp.down_proj.weight += change.to(layer.mlp.down_proj.weight.dtype)
        if len(neurons) < change.shape[1]:
            _narrow(layer.mlp, neurons.to(change.device))
        seen.clear()
        return (better, *output[1:]) if isinstance(output, tuple) else better

    return layer.mlp.register_forward_hook(mlp_hook), layer.register_forward_hook(layer_hook)


def _solve(
    mlp: Any, inputs: Tensor, state: Tensor, target: Tensor, ridge: float, width: int | None
) -> tuple[Tensor, Tensor, float]:
    """The neurons to keep [width], the change of the down projection [H, I] float32 (that of the others takes them away), and the
    relative squared error that remains."""
    own = mlp.down_proj.weight.float().t().cpu()  # [I, H]
    inner = len(own)
    gram, cross = torch.zeros(inner, inner), torch.zeros_like(own)
    error = 0.0
    for block in _blocks(len(target)):
        scale = target[block].float().norm(dim=-1, keepdim=True).reciprocal()
        m = _inner(mlp, inputs[block]).float() * scale
        miss = (target[block].float() - state[block].float()) * scale
        gram += (m.t() @ m).cpu()
        cross += (m.t() @ miss).cpu()
        error += float(miss.square().sum())
    pull = ridge * gram.diagonal().mean()
    wanted = cross + gram @ own + pull * own  # y = miss + W_0 m
    gram_ridge = gram + pull * torch.eye(inner)
    neurons = torch.arange(inner) if width is None else _worth_most(gram_ridge, wanted, width)
    change = -own
    change[neurons] += torch.linalg.solve(gram_ridge[neurons][:, neurons], wanted[neurons])
    error += float((change * (gram @ change)).sum()) - 2 * float((change * cross).sum())
    return neurons, change.t().to(state.device), error / len(target)


def _worth_most(gram: Tensor, wanted: Tensor, width: int) -> Tensor:
    """The `width` neurons that remain when those whose loss costs the fit least go, round by round. The inverse and the fit of those that
    remain follow from the ones before by the Schur complement of what goes, so that one inverse serves all rounds."""
    inner = len(gram)
    neurons = torch.arange(inner)
    inverse = torch.linalg.inv(gram)
    fit = inverse @ wanted
    for turn in range(1, _ROUNDS + 1):
        worth = fit.square().sum(1) / inverse.diagonal()
        count = inner - (inner - width) * turn // _ROUNDS
        order = worth.argsort(descending=True)
        stay, go = order[:count].sort().values, order[count:]
        solved = torch.linalg.solve(inverse[go][:, go], torch.cat([inverse[go][:, stay], fit[go]], 1))
        shared = inverse[stay][:, go] @ solved
        inverse, fit = inverse[stay][:, stay] - shared[:, :count], fit[stay] - shared[:, count:]
        neurons = neurons[stay]
    return neurons


def _narrow(mlp: Any, neurons: Tensor) -> None:
    for name in _MLP:
        layer = getattr(mlp, name)
        axis = 1 if name == "down_proj" else 0
        layer.weight = _like(layer.weight, layer.weight.index_select(axis, neurons))
        if axis == 0 and layer.bias is not None:
            layer.bias = _like(layer.bias, layer.bias[neurons])
    mlp.gate_proj.out_features = mlp.up_proj.out_features = mlp.down_proj.in_features = len(neurons)


def _like(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=parameter.requires_grad)


def _inner(mlp: Any, x: Tensor) -> Tensor:
    out: Tensor = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return out


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]
