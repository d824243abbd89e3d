"""Attention over a pack, as an attention function that transformers calls in place of its own.

Every architecture that routes attention through transformers' attention interface (Llama, Qwen2/3, Gemma 3, Mistral, ...) gets
tree attention without a line of model code. Each node of the tree attends to its ancestors' keys and its own: blocks that no
query may see are never computed and no [T, T] mask exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from posttrain.policy import flex
from posttrain.policy.pack import Pack

NAME = "posttrain"


class AttentionContext(Protocol):
    """Decides what one attention layer computes. q [1, H, T, D]; k, v [1, Hkv, T, D]; returns [1, H, T, D]."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor: ...


def grouped_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention with H query heads over Hkv <= H key heads. `mask` [n, S] bool: what a query may see."""
    half_on_cpu = q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]
    if half_on_cpu and torch.is_grad_enabled() and q.requires_grad:
        out: Tensor = _HalfAttention.apply(q, k, v, scale, mask, causal)  # type: ignore[no-untyped-call]
        return out
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


class _HalfAttention(torch.autograd.Function):
    """Attention in bf16 on a CPU with its gradients computed in float32: PyTorch's kernel takes three to four times as long for them in
    bf16, and rounds them more (docs/performance.md)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_additive(mask, q.dtype), scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.scale, ctx.causal = scale, causal
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask = ctx.saved_tensors
        wide = (tensor.float() for tensor in (gradients[0], q, k, v, out))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *wide, lse, 0.0, ctx.causal, attn_mask=_additive(mask, torch.float32), scale=ctx.scale
        )
        return *(gradient.to(q.dtype) for gradient in found), None, None, None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[n, S] bool -> [1, 1, n, S]: 0 where a query may look, else -inf."""
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))[None, None]


@dataclass(slots=True)
class TreeAttention:
    """Tree attention over one pack. `sink`, when given, receives every layer's keys and values (to prefill a cache). `flex`: one kernel
    for the whole tree instead of one call a node (None: on a GPU)."""

    pack: Pack
    sink: dict[int, tuple[Tensor, Tensor]] | None = None
    flex: bool | None = None
    _paths: list[list[int]] = field(default_factory=list)  # each node's ancestors, root first, and itself
    _sizes: list[int] = field(default_factory=list)
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    _trees: dict[int | None, Any] = field(default_factory=dict)  # block masks by window

    def __post_init__(self) -> None:
        self._paths = [[*self.pack.ancestors(index), index] for index in range(len(self.pack.nodes))]
        self._sizes = [node.end - node.start for node in self.pack.nodes]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        if self.sink is not None:
            self.sink[layer] = (_own(k), _own(v))
        if self.flex if self.flex is not None else q.device.type == "cuda":
            if window not in self._trees:
                self._trees[window] = flex.block_mask(self.pack, window, q.device)
            return flex.attend(q, k, v, self._trees[window], scale)
        # split once, not sliced per node: the gradient of a slice is a zero tensor of the whole pack
        queries, keys, values = (torch.split(tensor, self._sizes, dim=2) for tensor in (q, k, v))
        outputs = []
        for index, path in enumerate(self._paths):
            k_node, v_node = _join(keys, path), _join(values, path)
            plain = len(path) == 1 and (window is None or self._sizes[index] <= window)
            mask = None if plain else self._mask(index, window, q.device)
            outputs.append(grouped_sdpa(queries[index], k_node, v_node, scale, mask, causal=plain))
        return torch.cat(outputs, dim=2)

    def _mask(self, index: int, window: int | None, device: torch.device) -> Tensor:
        """[queries, keys] bool: position of the key is not later, and within the sliding window if there is one."""
        if (index, window) not in self._masks:
            parts = torch.split(self.pack.positions, self._sizes)
            q_positions = parts[index][:, None]
            k_positions = torch.cat([parts[node] for node in self._paths[index]])[None]
            allowed = k_positions <= q_positions
            if window is not None:
                allowed &= k_positions > q_positions - window
            self._masks[index, window] = allowed.to(device)
        return self._masks[index, window]


def _own(kept: Tensor) -> Tensor:
    """[1, Hkv, T, D] that does not keep a larger tensor alive, token by token in memory."""
    alone = kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
    return kept if alone else kept.transpose(1, 2).contiguous().transpose(1, 2)


def _join(parts: tuple[Tensor, ...], path: list[int]) -> Tensor:
    return parts[path[0]] if len(path) == 1 else torch.cat([parts[index] for index in path], dim=2)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    context: AttentionContext = kwargs["posttrain_context"]
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("attention with soft-capped logits or sinks is not supported over packs")
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    out = context.attend(module.layer_idx, query, key, value, scale, kwargs.get("sliding_window"))
    return out.transpose(1, 2), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)
