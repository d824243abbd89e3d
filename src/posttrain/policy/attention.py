"""Attention over a pack, as an attention function that transformers calls in place of its own.

Every architecture that routes attention through transformers' attention interface (Llama, Qwen2/3, Gemma 3, Mistral, ...) gets
tree attention without a line of model code. Each node of the tree attends to its ancestors' keys and its own: blocks that no
query may see are never computed and no [T, T] mask exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from posttrain.errors import BaseModelError
from posttrain.policy import flex
from posttrain.policy.half import HalfAttention
from posttrain.policy.pack import Pack

NAME = "posttrain"


class AttentionContext(Protocol):
    """Decides what one attention layer computes. q [1, H, T, D]; k, v [1, Hkv, T, D]; returns [1, H, T, D]."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor: ...


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
    _runs: dict[tuple[int | None, int, int], list[tuple[slice, slice, Tensor | None]]] = field(default_factory=dict)
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
        half_on_cpu = q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]
        if half_on_cpu and torch.is_grad_enabled() and q.requires_grad:
            out: Tensor = HalfAttention.apply(q, k, v, scale, window, self)  # type: ignore[no-untyped-call]
            return out
        return self.node_by_node(q, k, v, scale, window)

    def node_by_node(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """PyTorch's attention, forward and backward, one call a node."""
        fewer = q.shape[1] != k.shape[1]
        parts = [
            F.scaled_dot_product_attention(asking, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=fewer)
            for asking, keys, values, mask in self.by_query(q, k, v, window)
        ]
        return torch.cat(parts, dim=2)

    def by_query(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Each node's queries, the keys and values on its path, and the additive mask [1, 1, queries, keys] over them (None: causal)."""
        # split once, not sliced per node: the gradient of a slice is a zero tensor of the whole pack
        queries, keys, values = (torch.split(tensor, self._sizes, dim=2) for tensor in (q, k, v))
        for index, path in enumerate(self._paths):
            plain = len(path) == 1 and (window is None or self._sizes[index] <= window)
            mask = None if plain else self._mask(index, window, q)
            yield queries[index], _join(keys, path), _join(values, path), mask

    def _mask(self, index: int, window: int | None, like: Tensor) -> Tensor:
        """0 where a query may look, else -inf."""
        if (index, window) not in self._masks:
            parts = torch.split(self.pack.positions, self._sizes)
            blind = _blind(parts[index], torch.cat([parts[node] for node in self._paths[index]]), window)
            added = like.new_zeros(blind.shape).masked_fill_(blind.to(like.device), float("-inf"))
            self._masks[index, window] = added[None, None]
        return self._masks[index, window]

    def by_key(self, window: int | None, repeat: int, pairs: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """Each node's keys, with the queries that see them: a run of its subtree, where each token stands for `repeat` queries, and which
        pairs are blind [queries, keys] (None: none is; fewer rows: of the first queries). A run has at most about `pairs` pairs."""
        if (window, repeat, pairs) not in self._runs:
            self._runs[window, repeat, pairs] = list(self._by_key(window, repeat, pairs))
        yield from self._runs[window, repeat, pairs]

    def _by_key(self, window: int | None, repeat: int, pairs: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
        positions, ends = self.pack.positions, self.pack.reach()
        for node, end in zip(self.pack.nodes, ends, strict=True):
            keys = slice(node.start, node.end)
            step = max(1, pairs // (node.end - node.start))
            for start in range(node.start, end, step):
                stop = min(start + step, end)
                # behind the node itself only a window can hide a key
                hidden = stop if window is not None else min(stop, node.end)
                blind = _blind(positions[start:hidden], positions[keys], window)
                yield (
                    slice(start * repeat, stop * repeat), keys,
                    blind.repeat_interleave(repeat, 0) if blind.any() else None,
                )  # fmt: skip


def _blind(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """[queries, keys] bool by their positions: the key is later, or before the sliding window if there is one."""
    blind = keys[None] > queries[:, None]
    return blind if window is None else blind | (keys[None] <= queries[:, None] - window)


def _own(kept: Tensor) -> Tensor:
    """[1, Hkv, T, D] that does not keep a larger tensor alive, token by token in memory."""
    alone = kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
    return kept if alone else kept.transpose(1, 2).contiguous().transpose(1, 2)


def _join(parts: tuple[Tensor, ...], path: list[int]) -> Tensor:
    return parts[path[0]] if len(path) == 1 else torch.cat([parts[index] for index in path], dim=2)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    context: AttentionContext | None = kwargs.get("posttrain_context")
    if context is None:
        raise BaseModelError(
            "this architecture does not hand its attention what a pack needs",
            where="attention",
            value=type(module).__name__,
            remedy="load the model with Policy.load, which then runs it row by row",
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise BaseModelError(
            "attention with soft-capped logits or sinks is not supported over packs",
            where="attention",
            value=type(module).__name__,
            remedy="load the model with Policy.load, which then runs it row by row",
        )
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    out = context.attend(module.layer_idx, query, key, value, scale, kwargs.get("sliding_window"))
    return out.transpose(1, 2).contiguous(), None  # as transformers' own gives it: some architectures view it


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)
