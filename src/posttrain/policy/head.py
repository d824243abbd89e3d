"""The output head, run only at the rows asked for, in chunks: full [tokens, vocabulary] logits never exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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
        """function(hidden_chunk, *aligned_chunks) -> [n] over all rows. The backward pass recomputes a chunk's logits instead of
        keeping them, so peak memory is one chunk whatever the number of tokens."""
        parts = []
        for start in range(0, len(hidden), chunk):
            pieces = [tensor[start : start + chunk] for tensor in (hidden, *aligned)]
            if torch.is_grad_enabled() and hidden.requires_grad:
                parts.append(checkpoint(function, *pieces, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(function(*pieces))
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)

    def logprobs(self, hidden: Tensor, targets: Tensor, chunk: int = 256) -> Tensor:
        """log softmax(logits(hidden))[target]: [N, hidden], [N] -> [N] float32."""
        if self.bias is None and self.scale == 1.0 and self.cap is None and not self.weight.requires_grad:
            out: Tensor = _PlainLogprobs.apply(hidden, self.weight, targets, chunk)  # type: ignore[no-untyped-call]
            return out
        return self.chunked(self._token_logprobs, hidden, targets, chunk=chunk)

    def _token_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(hidden)
        return logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, dim=-1)


class _PlainLogprobs(torch.autograd.Function):
    """The common head (no bias, scale or cap; frozen W) with its gradient written out: d/dh = g (W[target] - sum_v p_v W_v).

    Same numbers as the checkpointed path, fewer passes over the [chunk, V] logits, which are most of the head's time.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        values, normalisers = [], []
        for start in range(0, len(hidden), chunk):
            logits = torch.nn.functional.linear(hidden[start : start + chunk], weight).float()
            normaliser = torch.logsumexp(logits, dim=-1)
            values.append(logits.gather(1, targets[start : start + chunk, None])[:, 0] - normaliser)
            normalisers.append(normaliser)
        empty = hidden.new_zeros(0, dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(normalisers) if normalisers else empty)
        ctx.chunk = chunk
        return torch.cat(values) if values else empty

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        hidden, weight, targets, normalisers = ctx.saved_tensors
        grad = gradients[0]
        out = torch.empty_like(hidden)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            p = torch.nn.functional.linear(hidden[rows], weight).float()
            p.sub_(normalisers[rows, None]).exp_().mul_(-grad[rows, None])
            p.scatter_add_(1, targets[rows, None], grad[rows, None])
            out[rows] = p.to(weight.dtype) @ weight
        return out, None, None, None
