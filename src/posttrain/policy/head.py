"""The output head, run only at the rows asked for, in chunks: full [tokens, vocabulary] logits never exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

_CACHED = 8  # rows of logits that passes over them find in the second-level cache: 8 x 49,152 in float32 are 1.5 MB


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """logits(h) = cap * tanh(scale * h W^T / cap), in float32; W is frozen and may be tied to the embedding."""

    weight: Tensor  # [V, hidden]
    bias: Tensor | None
    scale: float
    cap: float | None

    @classmethod
    def of(cls, model: Any) -> Head:
        layer, config = model.get_output_embeddings(), model.config
        scale = 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(layer.weight, getattr(layer, "bias", None), scale, None if cap is None else float(cap))

    @property
    def vocabulary(self) -> int:
        return int(self.weight.shape[0])

    def logits(self, hidden: Tensor, product: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """[n, hidden] -> [n, V] float32. `product`: another way to h W^T + bias."""
        out = (torch.nn.functional.linear(hidden, self.weight, self.bias) if product is None else product(hidden)).float()
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.cap is None else self.cap * torch.tanh(out / self.cap)

    def chunked(self, function: Callable[..., Tensor], hidden: Tensor, *aligned: Tensor, chunk: int) -> Tensor:
        """function(hidden_chunk, *aligned_chunks) -> [n] over all rows; a row's value may depend on that row alone, and what the function
        closes over is frozen. Peak memory is one chunk's whatever the number of tokens: its gradient is formed while its logits are
        there, or, where the head itself or something aligned is trained, the backward pass computes the logits again."""
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            parts = [function(*pieces) for pieces in _pieces(chunk, hidden, *aligned)]
        elif any(tensor is not None and tensor.requires_grad for tensor in (self.weight, self.bias, *aligned)):
            parts = [
                checkpoint(function, *pieces, use_reentrant=False, preserve_rng_state=False)
                for pieces in _pieces(chunk, hidden, *aligned)
            ]
        else:
            return _RowByRow.apply(hidden, function, chunk, *aligned)  # type: ignore[no-untyped-call, no-any-return]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)

    def logprobs(self, hidden: Tensor, targets: Tensor, chunk: int = 256) -> Tensor:
        """log softmax(logits(hidden))[target]: [N, hidden], [N] -> [N] float32."""
        if self.bias is None and self.scale == 1.0 and self.cap is None and not self.weight.requires_grad:
            learning = torch.is_grad_enabled() and hidden.requires_grad
            out: Tensor = _PlainLogprobs.apply(hidden, self.weight, targets, chunk, learning)  # type: ignore[no-untyped-call]
            return out
        return self.chunked(self._token_logprobs, hidden, targets, chunk=chunk)

    def _token_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(hidden)
        return logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, dim=-1)


def _pieces(chunk: int, *tensors: Tensor) -> Iterator[list[Tensor]]:
    for start in range(0, len(tensors[0]), chunk):
        yield [tensor[start : start + chunk] for tensor in tensors]


class _RowByRow(torch.autograd.Function):
    """Values [n] of a function whose row i reads row i of `hidden` only. The gradient of each value is then known as soon as the value is,
    whatever the objective makes of it later: it is formed in the forward pass while the chunk's logits are there (Hsu 2024, Liger
    Kernel, section 3.2), and the backward pass is one product with a number per row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, function: Callable[..., Tensor], chunk: int, *aligned: Tensor) -> Tensor:
        values, slopes = [hidden.new_zeros(0, dtype=torch.float32)], [hidden.new_zeros(0, hidden.shape[-1])]
        for own, *others in _pieces(chunk, hidden, *aligned):
            with torch.enable_grad():
                leaf = own.detach().requires_grad_()
                value = function(leaf, *others)
                (slope,) = torch.autograd.grad(value.sum(), leaf)
            values.append(value.detach())
            slopes.append(slope)
        ctx.save_for_backward(torch.cat(slopes))
        ctx.rest = 2 + len(aligned)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _scaled(ctx.saved_tensors[0], gradients[0]), *[None] * ctx.rest


def _scaled(slopes: Tensor, upstream: Tensor) -> Tensor:
    return (slopes * upstream[:, None]).to(slopes.dtype)


class _PlainLogprobs(torch.autograd.Function):
    """The common head (no bias, scale or cap; frozen W) as `_RowByRow` has it, with the gradient written out: d/dh = W[target] - sum_v
    p_v W_v. Same numbers; the passes over the [chunk, V] logits, most of the head's time beside its two products, go over rows that stay in
    cache."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, learning: bool) -> Tensor:
        values = hidden.new_empty(len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if learning else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = torch.nn.functional.linear(hidden[rows], weight)
            for some, wanted, found in _pieces(_CACHED, logits, targets[rows], values[rows]):
                _logits_to_slopes(some, wanted, found, learning)
            if slopes is not None:
                slopes[rows] = logits @ weight
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _scaled(ctx.saved_tensors[0], gradients[0]), None, None, None, None


def _logits_to_slopes(logits: Tensor, targets: Tensor, values: Tensor, learning: bool) -> None:
    """Fill values [n] from logits [n, V]; when learning, put d value / d logits = onehot - p in the logits' place."""
    wide, wanted = logits.float(), targets[:, None]
    normaliser = torch.logsumexp(wide, dim=-1)
    values.copy_(wide.gather(1, wanted)[:, 0] - normaliser)
    if learning:
        onehot_less_p = wide.sub_(normaliser[:, None]).exp_().neg_()  # small where p is near 1: no cancellation later
        onehot_less_p.scatter_add_(1, wanted, torch.ones_like(wanted, dtype=torch.float32))
        if wide is not logits:
            logits.copy_(onehot_less_p)
