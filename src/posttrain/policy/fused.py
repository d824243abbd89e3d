"""Fewer passes over memory: LoRA layers, gated MLPs and norms with gradients of their own.

A frozen base leaves no weight gradients to compute, so a training step should cost two matrix products per layer and little else.
PEFT's LoRA adds, per layer, two thin products and three passes over the layer's output; autograd's MLP and norm write every
intermediate to memory. Here W' = W + s B A is formed once per update, the forward pass is one product with W', and the backward
pass is one more, with the thin products for A and B (Hu 2021, eq. 3). MLPs and norms run over blocks of tokens that stay in cache.

The numbers are those of the plain modules up to the rounding of sums, which is why W' is formed in float32 only: in bf16 a rounded W'
would swallow small adapters. There the thin products stay apart, but what they give is added inside them, forward and backward, and
norms are computed in float32 and rounded once. Whatever does not fit (other types, trained base weights, adapters of other kinds) takes
the plain path, module by module.

Without gradients, the tokens of one pass may belong to several adapters (`Mix`): the product with W is one, the thin products are each
adapter's own (Chen 2023, Punica).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_BLOCK = 192  # tokens; [192, 1536] float32 is 1.1 MB
_NARROW, _PART = 640, 512  # columns of a product that oneDNN does not share well, and rows that it shares again
_UNSHARED = (704, 1344)
_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm")
_MLPS = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "MistralMLP")


@dataclass(slots=True)
class Mix:
    """Whose tokens the next passes hold: per adapter the indices of its tokens (None: all of them). Tokens of no adapter are the base's.
    None: the active adapter's, as PEFT has it. `merge`: whether a training pass may form W', which is as large as W."""

    shares: list[tuple[str, Tensor | None]] | None = field(default=None)
    merge: bool = True


def install(model: nn.Module, mix: Mix) -> None:
    """Give every module of a known kind its fused forward. Calling it again after adapters were added is safe and needed."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    for module in model.modules():
        kind = type(module).__name__
        if is_lora(module):
            vars(module)["_posttrain_mix"] = mix
            _shadow(module, _lora_forward)
        elif not on_cpu:
            continue
        elif kind in _MLPS and type(getattr(module, "act_fn", None)).__name__ in ("SiLUActivation", "SiLU"):
            _shadow(module, _mlp_forward)
        elif kind in _NORMS:
            _shadow(module, _norm_forward)


def _shadow(module: Any, forward: Callable[..., Tensor]) -> None:
    if "forward" not in vars(module):
        plain = module.forward
        module.forward = lambda *args, **kwargs: forward(module, plain, *args, **kwargs)


# -- linear layers -----------------------------------------------------------------------------------------------------


class _Factors:
    """What one linear layer computes with: y = x W'^T + bias, W' = W + scale B A. a, b are None without an adapter."""

    __slots__ = ("a", "b", "bias", "scale", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, a: Tensor | None = None, b: Tensor | None = None, scale: float = 0.0):
        self.weight, self.bias, self.a, self.b, self.scale = weight, bias, a, b, scale


def is_lora(module: Any) -> bool:
    """Whether PEFT adapted this linear layer."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer") and isinstance(module.base_layer, nn.Linear)


def _factors(module: Any) -> _Factors | None:
    """The factors of a frozen float32 layer with at most one plain LoRA adapter; None: take the plain path."""
    if type(module) is nn.Linear:
        return _Factors(module.weight, module.bias) if _plain(module) else None
    if not is_lora(module) or not _plain(module.base_layer) or module.merged:
        return None
    if module._posttrain_mix.shares is not None or not module._posttrain_mix.merge:
        return None
    base = module.base_layer
    active = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return _Factors(base.weight, base.bias)
    name = active[0]
    if len(active) > 1 or not is_simple(module, name):
        return None
    a, b, scale = module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])
    if a.dtype != torch.float32:
        return None
    return _Factors(_merged(module, name, base.weight, a, b, scale), base.bias, a, b, scale)


def is_simple(module: Any, name: str) -> bool:
    """Whether the adapter adds s B A x to this layer and nothing else."""
    return (
        not module.use_dora.get(name, False) and isinstance(module.lora_dropout[name], nn.Identity)
        and name not in module.lora_variant and module.lora_B[name].bias is None
    )  # fmt: skip


def _plain(layer: nn.Linear) -> bool:
    weight = layer.weight
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and not weight.requires_grad


def _merged(module: Any, name: str, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A, formed anew when a factor was written to (tensors count their writes) and kept in one buffer per layer."""
    key = (name, id(a), id(b), a._version, b._version, weight._version, a.data_ptr(), b.data_ptr())
    kept: tuple[Any, Tensor] | None = vars(module).get("_posttrain_merged")
    if kept is not None and kept[0] == key:
        return kept[1]
    # a fresh tensor, as a live graph may hold the old one; no inference tensor, as the next call may train
    with torch.inference_mode(False), torch.no_grad():
        fresh = torch.addmm(weight.detach(), b.detach(), a.detach(), alpha=scale)
    vars(module)["_posttrain_merged"] = (key, fresh)
    return fresh


def forget_merged(model: nn.Module) -> None:
    """Drop the formed W'; they are formed again when a pass needs them."""
    for module in model.modules():
        vars(module).pop("_posttrain_merged", None)


def _lora_forward(module: Any, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if module._posttrain_mix.shares is not None:
        return _mixed_forward(module, module._posttrain_mix.shares, x)
    if x.dtype == torch.bfloat16 and not (args or kwargs) and (thin := _thin(module)) is not None:
        apart: Tensor = _ThinLora.apply(x, *thin)  # type: ignore[no-untyped-call]
        return apart
    f = None if args or kwargs or x.dtype != torch.float32 else _factors(module)
    if f is None:
        return plain(x, *args, **kwargs)
    if f.a is None or f.b is None or not torch.is_grad_enabled() or not (x.requires_grad or f.a.requires_grad):
        return F.linear(x, f.weight, f.bias)
    out: Tensor = _LoraLinear.apply(x, f.weight, f.bias, f.a, f.b, f.scale)  # type: ignore[no-untyped-call]
    return out


def _mixed_forward(module: Any, shares: list[tuple[str, Tensor | None]], x: Tensor) -> Tensor:
    """x [1, T, in] -> [1, T, out]: W x, and to each adapter's tokens its s B A x."""
    out: Tensor = module.base_layer(x)
    for name, tokens in shares:
        if name not in module.lora_A:
            continue  # an adapter of other layers
        own = x[0] if tokens is None else x[0, tokens]
        added = F.linear(F.linear(own, module.lora_A[name].weight), module.lora_B[name].weight) * module.scaling[name]
        if tokens is None:
            out[0] += added
        else:
            out[0].index_add_(0, tokens, added)
    return out


class _LoraLinear(torch.autograd.Function):
    """y = x W'^T + bias; dx = dy W', dA = s (dy B)^T x, dB = s dy^T (x A^T)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b = ctx.saved_tensors
        flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = torch.mm(flat_dy, weight).view_as(x) if ctx.needs_input_grad[0] else None
        da, db = (_factor_gradients(flat_x, flat_dy, a, b, ctx.scale)) if ctx.needs_input_grad[3] else (None, None)
        return dx, None, None, da, db, None


def _thin(module: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float] | None:
    """W, bias, A, B and the scale of a frozen bf16 layer on a CPU whose one plain adapter is being trained; None: take the plain path."""
    base = module.base_layer
    active = (
        [] if module.disable_adapters or module.merged else [name for name in module.active_adapters if name in module.lora_A]
    )
    if len(active) != 1 or not torch.is_grad_enabled() or not is_simple(module, active[0]):
        return None
    a, b = module.lora_A[active[0]].weight, module.lora_B[active[0]].weight
    weight = base.weight
    fits = weight.device.type == "cpu" and weight.dtype == a.dtype == b.dtype == torch.bfloat16
    if not fits or weight.requires_grad or not a.requires_grad:
        return None
    return weight, base.bias, a, b, float(module.scaling[active[0]])


class _ThinLora(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T; dx = dy W + s (dy B) A, dA = s (dy B)^T x, dB = s dy^T (x A^T)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = torch.mm(rows, a.t())
        # W's part has the bits of F.linear, which the reference goes through
        out = _product(rows, weight.t()) if bias is None else F.linear(rows, weight, bias)
        out.addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        rows, dy = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, b.shape[0])
        thin = torch.mm(dy, b)
        dx = _product(dy, weight).addmm_(thin, a, alpha=ctx.scale).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, None, None, torch.mm(thin.t(), rows).mul_(ctx.scale), torch.mm(dy.t(), inner).mul_(ctx.scale), None


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [T, in], weight [in, out] -> [T, out]. Of two threads oneDNN leaves one idle where rows are some hundred more than columns; in
    parts of 350 to 512 rows both work (docs/performance.md). The way depends on shapes alone: a resumed run has the same bits."""
    count, columns = len(rows), weight.shape[1]
    if torch.get_num_threads() != 2 or columns > _NARROW or not _UNSHARED[0] <= count < _UNSHARED[1]:
        return torch.mm(rows, weight)
    out = rows.new_empty(count, columns)
    size = -(-count // -(-count // _PART))
    for start in range(0, count, size):
        torch.mm(rows[start : start + size], weight, out=out[start : start + size])
    return out


def _factor_gradients(x: Tensor, dy: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """x [T, in], dy [T, out], a [r, in], b [out, r] -> dA [r, in], dB [out, r]."""
    return torch.mm((dy @ b).t(), x).mul_(scale), torch.mm(dy.t(), x @ a.t()).mul_(scale)


# -- gated MLP ---------------------------------------------------------------------------------------------------------


def _mlp_forward(module: Any, plain: Callable[..., Tensor], x: Tensor) -> Tensor:
    factors = [_factors(layer) for layer in (module.gate_proj, module.up_proj, module.down_proj)]
    if x.dtype != torch.float32 or any(f is None or f.bias is not None for f in factors):
        return plain(x)
    if not torch.is_grad_enabled() or not (x.requires_grad or any(f and f.a is not None and f.a.requires_grad for f in factors)):
        return _mlp_no_grad(x, *(f.weight for f in factors if f))
    flat: list[Any] = [value for f in factors if f for value in (f.weight, f.a, f.b)]
    out: Tensor = _GatedMlp.apply(x, tuple(f.scale for f in factors if f), *flat)  # type: ignore[no-untyped-call]
    return out


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


def _mlp_no_grad(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty(len(flat), down.shape[0])
    for block in _blocks(len(flat)):
        g = F.silu(torch.mm(flat[block], gate.t()), inplace=True)
        torch.mm(g.mul_(torch.mm(flat[block], up.t())), down.t(), out=out[block])
    return out.view(*x.shape[:-1], -1)


class _GatedMlp(torch.autograd.Function):
    """y = (silu(x Wg'^T) * (x Wu'^T)) Wd'^T over blocks of tokens; keeps the two pre-activations, computes the rest again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *flat: Any) -> Tensor:
        gate, _, _, up, _, _, down, _, _ = flat
        rows = x.reshape(-1, x.shape[-1])
        g, u = torch.mm(rows, gate.t()), torch.mm(rows, up.t())
        out = torch.empty(len(rows), down.shape[0])
        for block in _blocks(len(rows)):
            torch.mm(F.silu(g[block]).mul_(u[block]), down.t(), out=out[block])
        ctx.save_for_backward(x, g, u, *flat)
        ctx.scales = scales
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, g, u, *flat = ctx.saved_tensors
        gate, gate_a, gate_b, up, up_a, up_b, down, down_a, down_b = flat
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        trained = [a is not None and ctx.needs_input_grad[2 + 3 * i + 1] for i, a in enumerate((gate_a, up_a, down_a))]
        sums: list[list[Tensor]] = [
            [torch.zeros_like(a), torch.zeros_like(b)] if on else []
            for on, a, b in zip(trained, (gate_a, up_a, down_a), (gate_b, up_b, down_b), strict=True)
        ]
        dx = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for block in _blocks(len(rows)):
            dyc, gc, uc = dy[block], g[block], u[block]
            s = torch.sigmoid(gc)
            silu = gc * s
            if sums[2]:
                _add(sums[2], _factor_gradients(silu * uc, dyc, down_a, down_b, ctx.scales[2]))
            dh = torch.mm(dyc, down)
            du = silu.mul_(dh) if sums[2] == [] else silu * dh
            # silu'(g) = s (1 + g (1 - s))
            dg = dh.mul_(uc).mul_(s).mul_((1 - s).mul_(gc).add_(1))
            if sums[0]:
                _add(sums[0], _factor_gradients(rows[block], dg, gate_a, gate_b, ctx.scales[0]))
            if sums[1]:
                _add(sums[1], _factor_gradients(rows[block], du, up_a, up_b, ctx.scales[1]))
            if dx is not None:
                torch.mm(dg, gate, out=dx[block])
                dx[block].addmm_(du, up)
        grads = [g for pair in sums for g in ((None, *pair) if pair else (None, None, None))]
        return (None if dx is None else dx.view_as(x), None, *grads)


def _add(sums: list[Tensor], parts: tuple[Tensor, Tensor]) -> None:
    for total, part in zip(sums, parts, strict=True):
        total += part


# -- root mean square norm ---------------------------------------------------------------------------------------------


def _norm_forward(module: Any, plain: Callable[..., Tensor], x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16) or module.weight.requires_grad or module.weight.dtype != x.dtype:
        return plain(x)
    if x.dtype == torch.float32 and not (torch.is_grad_enabled() and x.requires_grad):
        return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)
    # in bf16 the same with and without gradients: a fresh adapter must give its reference's bits, and DPO start at log 2
    out: Tensor = _RmsNorm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return out


class _RmsNorm(torch.autograd.Function):
    """y = x r w with r = (mean x^2 + eps)^-1/2; dx = r (w dy - x r^2 mean(w dy x)). In float32 at least, whatever the type of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat, wide = x.reshape(-1, x.shape[-1]), weight.to(torch.promote_types(weight.dtype, torch.float32))
        out, r = torch.empty_like(flat), wide.new_empty(len(flat), 1)
        for block in _blocks(len(flat)):
            rows = flat[block].to(wide.dtype)
            torch.linalg.vector_norm(rows, dim=-1, keepdim=True, out=r[block]).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            torch.mul(rows * r[block], wide, out=out[block])
        ctx.save_for_backward(x, wide, r)
        return out.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, weight, r = ctx.saved_tensors
        flat, dy = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, x.shape[-1])
        dx = torch.empty_like(flat)
        for block in _blocks(len(flat)):
            rows, rb = flat[block].to(weight.dtype), r[block]
            wdy = dy[block] * weight
            dot = (wdy * rows).sum(-1, keepdim=True)
            slope = torch.mul(rows, dot.mul_(rb.square()).div_(-x.shape[-1]))
            torch.mul(slope.add_(wdy), rb, out=dx[block])
        return dx.view_as(x), None, None
