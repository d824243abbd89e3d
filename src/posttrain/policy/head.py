"""The output head, run only at the rows asked for, in chunks: full [tokens, vocabulary] logits never exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

_EVEN = 16  # rows
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
        layer, config = model.get_output_embeddings(), model.config.get_text_config()
        scale = 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides, Cohere and Falcon-H1 multiply
        for name in ("logit_scale", "lm_head_multiplier"):
            scale *= float(getattr(config, name, None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(layer.weight, getattr(layer, "bias", None), scale, None if cap is None else float(cap))

    @property
    def vocabulary(self) -> int:
        return int(self.weight.shape[0])

    def logits(self, hidden: Tensor, product: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """[n, hidden] -> [n, V] float32. `product`: another way to h W^T + bias."""
        return self._shaped(self._product(hidden) if product is None else product(hidden))

    def _product(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self.weight, self.bias)

    def _shaped(self, product: Tensor) -> Tensor:
        out = product.float()
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.cap is None else self.cap * torch.tanh(out / self.cap)

    def tokenwise(
        self,
        function: Callable[..., Tensor],
        hidden: Tensor,
        beside: Sequence[tuple[Head, Tensor]] = (),
        aligned: Sequence[Tensor] = (),
        chunk: int = 256,
    ) -> Tensor:
        """function(logits [n, V], *logits of each head in `beside` at its own hidden states [n, V], *aligned) -> [n], over all rows;
        a row's value may depend on that row alone. Only this head's hidden states get a gradient, and the head itself where it is
        trained. Peak memory is one chunk's whatever the number of tokens: the gradient is formed while the logits are there, or, where
        the head is trained, the backward pass computes the logits again."""
        learning = torch.is_grad_enabled()
        assert not any(tensor.requires_grad for tensor in (*(states for _, states in beside), *aligned)), "gets no gradient here"
        if learning and (self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            heads = [head for head, _ in beside]

            def again(own: Tensor, *others: Tensor) -> Tensor:
                theirs = [head.logits(states) for head, states in zip(heads, others, strict=False)]
                return function(self.logits(own), *theirs, *others[len(heads) :])

            parts = [
                checkpoint(again, *pieces, use_reentrant=False, preserve_rng_state=False)
                for pieces in _pieces(chunk, hidden, *(states for _, states in beside), *aligned)
            ]
            return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
        out: Tensor = _RowByRow.apply(hidden, self, function, beside, aligned, chunk, learning and hidden.requires_grad)  # type: ignore[no-untyped-call]
        return out

    def logprobs(self, hidden: Tensor, targets: Tensor, chunk: int = 256) -> Tensor:
        """log softmax(logits(hidden))[target]: [N, hidden], [N] -> [N] float32."""
        if self.bias is None and self.scale == 1.0 and self.cap is None and not self.weight.requires_grad:
            learning = torch.is_grad_enabled() and hidden.requires_grad
            out: Tensor = _PlainLogprobs.apply(hidden, self.weight, targets, chunk, learning)  # type: ignore[no-untyped-call]
            return out
        return self.tokenwise(_token_logprobs, hidden, aligned=[targets], chunk=chunk)


def _token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, dim=-1)


def _pieces(chunk: int, *tensors: Tensor) -> Iterator[list[Tensor]]:
    for start in range(0, len(tensors[0]), chunk):
        yield [tensor[start : start + chunk] for tensor in tensors]


class _RowByRow(torch.autograd.Function):
    """`Head.tokenwise` of a frozen head. The gradient of each value is known as soon as the value is, whatever the objective makes of it
    later: it is formed in the forward pass while the chunk's logits are there (Hsu 2024, Liger Kernel, section 3.2), and the backward
    pass is one product with a number per row. Products are made chunk by chunk, the function's own passes over the logits by rows that
    stay in cache."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        function: Callable[..., Tensor],
        beside: Sequence[tuple[Head, Tensor]],
        aligned: Sequence[Tensor],
        chunk: int,
        learning: bool,
    ) -> Tensor:
        values = hidden.new_empty(len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if learning else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            count = len(hidden[rows])
            logits = head._product(evened(hidden[rows], _EVEN))
            others = [other._product(evened(states[rows], _EVEN))[:count] for other, states in beside]
            given = (values[rows], *others, *(tensor[rows] for tensor in aligned))
            for own, found, *rest in _pieces(_CACHED, logits[:count], *given):
                theirs = [other._shaped(some) for (other, _), some in zip(beside, rest, strict=False)]
                with torch.set_grad_enabled(learning):
                    leaf = own.detach().requires_grad_(learning)
                    value = function(head._shaped(leaf), *theirs, *rest[len(beside) :])
                    if learning:
                        own.copy_(torch.autograd.grad(value.sum(), leaf)[0])
                found.copy_(value.detach())
            if slopes is not None:
                slopes[rows] = (logits @ head.weight)[:count]
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _scaled(ctx.saved_tensors[0], gradients[0]), None, None, None, None, None, None


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
            count = len(hidden[rows])
            logits = torch.nn.functional.linear(evened(hidden[rows], _EVEN), weight)
            for some, wanted, found in _pieces(_CACHED, logits[:count], targets[rows], values[rows]):
                _logits_to_slopes(some, wanted, found, learning)
            if slopes is not None:
                slopes[rows] = (logits @ weight)[:count]
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _scaled(ctx.saved_tensors[0], gradients[0]), None, None, None, None


def evened(rows: Tensor, multiple: int) -> Tensor:
    """[n, *] with rows of zeros behind, up to a multiple of so many, where a CPU computes in bf16: oneDNN compiles each number of rows
    anew, which takes as long as ten small products or a whole large one."""
    missing = -len(rows) % multiple if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" else 0
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


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
