"""Tree attention on a GPU: one FlexAttention call a layer with the pack's tree as a block mask (Dong 2024).

A pack is laid out depth first, so the tokens that may see token k are those from k to the end of the subtree below k's node: k <= q <
end[k]. That is the whole mask; blocks in which no query may see a key are skipped by the kernel. The block mask is made by compiled code
on a GPU: made eagerly it would evaluate all [T, T] places before it reduces them to blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from posttrain.policy.pack import Pack

BLOCK = 128  # tokens, the kernel's own


def subtree_ends(pack: Pack) -> Tensor:
    """[T] int64: one past the last row of the subtree below each token's node."""
    last = [node.end for node in pack.nodes]
    for index in range(len(pack.nodes) - 1, -1, -1):  # children come after their parents
        parent = pack.nodes[index].parent
        if parent >= 0:
            last[parent] = max(last[parent], last[index])
    sizes = torch.tensor([node.end - node.start for node in pack.nodes])
    return torch.repeat_interleave(torch.tensor(last), sizes)


def block_mask(pack: Pack, window: int | None, device: torch.device) -> Any:
    """FlexAttention's block mask of a pack; with a sliding window a key must also be nearer than `window` positions."""
    ends, positions = subtree_ends(pack).to(device), pack.positions.to(device)

    near = pack.tokens if window is None else window

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends[k])

    def sees_near(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees(batch, head, q, k) & (positions[k] > positions[q] - near)

    size = pack.tokens
    sees_all = sees if window is None else sees_near
    return _maker(device.type)(sees_all, None, None, size, size, device=device, BLOCK_SIZE=BLOCK)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
    """q [1, H, T, D], k and v [1, Hkv, T, D] -> [1, H, T, D]."""
    out: Tensor = _kernel(q.device.type)(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out


@cache
def _maker(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=True) if device == "cuda" else create_block_mask  # type: ignore[no-any-return]


@cache
def _kernel(device: str) -> Callable[..., Tensor]:
    """Compiled on a GPU, where packs of every size share one kernel; elsewhere as it is, which forms all scores and serves for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Any = flex_attention
    return torch.compile(kernel, dynamic=True) if device == "cuda" else kernel  # type: ignore[no-any-return]
