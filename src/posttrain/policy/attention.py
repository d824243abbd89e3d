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
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from posttrain.policy.pack import Pack

NAME = "posttrain"


class AttentionContext(Protocol):
    """Decides what one attention layer computes. q [1, H, T, D]; k, v [1, Hkv, T, D]; returns [1, H, T, D]."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor: ...


def grouped_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention with H query heads over Hkv <= H key heads."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


@dataclass(slots=True)
class TreeAttention:
    """Tree attention over one pack. `sink`, when given, receives every layer's keys and values (to prefill a cache)."""

    pack: Pack
    sink: dict[int, tuple[Tensor, Tensor]] | None = None
    _keys: list[Tensor | None] = field(default_factory=list)
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, node in enumerate(self.pack.nodes):
            spans = [self.pack.nodes[a] for a in self.pack.ancestors(index)]
            rows = [torch.arange(s.start, s.end) for s in spans] + [torch.arange(node.start, node.end)]
            self._keys.append(torch.cat(rows).to(self.pack.ids.device) if spans else None)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        if self.sink is not None:
            self.sink[layer] = (k, v)
        outputs = []
        for index, node in enumerate(self.pack.nodes):
            rows = self._keys[index]
            k_node = k[:, :, node.start : node.end] if rows is None else k.index_select(2, rows)
            v_node = v[:, :, node.start : node.end] if rows is None else v.index_select(2, rows)
            plain = rows is None and (window is None or node.end - node.start <= window)
            mask = None if plain else self._mask(index, window)
            outputs.append(grouped_sdpa(q[:, :, node.start : node.end], k_node, v_node, scale, mask, causal=plain))
        return torch.cat(outputs, dim=2)

    def _mask(self, index: int, window: int | None) -> Tensor:
        """[queries, keys] bool: position of the key is not later, and within the sliding window if there is one."""
        if (index, window) not in self._masks:
            node, rows = self.pack.nodes[index], self._keys[index]
            q_positions = self.pack.positions[node.start : node.end, None]
            k_positions = (self.pack.positions[node.start : node.end] if rows is None else self.pack.positions[rows])[None]
            allowed = k_positions <= q_positions
            if window is not None:
                allowed &= k_positions > q_positions - window
            self._masks[index, window] = allowed
        return self._masks[index, window]


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
