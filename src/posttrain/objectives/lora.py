"""Low-rank adapters as plain arithmetic: the reference the model's own layers are checked against.

W [out, in] frozen, A [r, in] (down), B [out, r] (up); W' = W + s B A. Sources: Hu et al. 2021, section 4.1; Kalajdzievski 2023
(rsLoRA); microsoft/LoRA layers.py; peft tuners/lora/layer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A [r, in], B [out, r] and the scaling s; alpha/r, or alpha/sqrt(r) for rsLoRA, see `scaling`."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        """s B A [out, in]."""
        return self.scale * (self.up @ self.down)

    def apply(self, x: Tensor) -> Tensor:
        """s (x A^T) B^T. [N, in] -> [N, out]; A and B stay two thin products."""
        return self.scale * (x @ self.down.T @ self.up.T)


def scaling(alpha: float, rank: int, *, rank_stabilised: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    return alpha / (rank**0.5 if rank_stabilised else rank)


def lora_forward(x_ni: Tensor, weight_oi: Tensor, adapter: Adapter) -> Tensor:
    """y = x W^T + s (x A^T) B^T. [N, in] -> [N, out]. With B = 0 exactly the base model's output."""
    return x_ni @ weight_oi.T + adapter.apply(x_ni)


def multi_lora_forward(x_ni: Tensor, weight_oi: Tensor, adapters: Sequence[Adapter], ids_n: Tensor) -> Tensor:
    """y_n = W x_n + s_i B_i A_i x_n with i = ids_n[n], -1 meaning base only. [N, in], [N] -> [N, out]."""
    assert ids_n.shape == x_ni.shape[:1], f"{tuple(ids_n.shape)} ids for {tuple(x_ni.shape)} rows"
    assert int(ids_n.max()) < len(adapters) and int(ids_n.min()) >= -1, (
        f"adapter ids {ids_n.tolist()} of {len(adapters)} adapters"
    )
    y_no = x_ni @ weight_oi.T
    for index, adapter in enumerate(adapters):
        rows = ids_n == index
        y_no = y_no.index_put((rows,), adapter.apply(x_ni[rows]), accumulate=True)
    return y_no


def merge(weight_oi: Tensor, adapter: Adapter) -> Tensor:
    """W + s B A, added in float32 (float64 stays) and rounded once to W's type. Subtracting again does not restore bf16."""
    exact = torch.float64 if adapter.down.dtype == torch.float64 and weight_oi.dtype == torch.float64 else torch.float32
    return (weight_oi.to(exact) + adapter.delta().to(exact)).to(weight_oi.dtype)


def merge_cast_first(weight_oi: Tensor, adapter: Adapter) -> Tensor:
    """The wrong order, for comparison: s B A rounded to W's type first, then added and rounded again."""
    return weight_oi + adapter.delta().to(weight_oi.dtype)


def parameter_counts(out_features: int, in_features: int, rank: int) -> tuple[int, int]:
    """(full, LoRA) trainable parameters of one matrix: out * in, and r (in + out)."""
    return out_features * in_features, rank * (in_features + out_features)
