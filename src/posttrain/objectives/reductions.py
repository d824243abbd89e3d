"""Reductions from token losses to one number, each by its name.

Every mean takes `normaliser`, the *global* count of what it averages over (all micro-batches, all ranks); without it, the count
of this batch. Micro-batches reduced with one global normaliser add up to the value and gradient of the whole batch.
Masked positions contribute nothing, and get exactly zero gradient, whatever they hold. An empty mask gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.objectives.tensors import divide, masked, same_shape


def token_sum(values_bt: Tensor, mask_bt: Tensor) -> Tensor:
    """sum_{b,t} m L, the `sum` reduction. values, mask [B, T] -> []."""
    return row_sums(values_bt, mask_bt).sum()


def row_sums(values_bt: Tensor, mask_bt: Tensor) -> Tensor:
    """sum_t m L per row: a sequence log-probability, when values are token log-probabilities. [B, T] -> [B]."""
    same_shape(values_bt, mask_bt, rank=2)
    return (masked(values_bt, mask_bt) * mask_bt).sum(dim=1)


def row_means(values_bt: Tensor, mask_bt: Tensor) -> Tensor:
    """sum_t m L / sum_t m per row, 0 for an empty row. [B, T] -> [B]."""
    return divide(row_sums(values_bt, mask_bt), mask_bt.sum(dim=1))


def token_mean(values_bt: Tensor, mask_bt: Tensor, *, normaliser: float | None = None) -> Tensor:
    """sum_{b,t} m L / sum m over the global batch; normaliser = global sum of m. SFT, DAPO as coded, PPO. [B, T] -> []."""
    return divide(token_sum(values_bt, mask_bt), mask_bt.sum() if normaliser is None else normaliser)


def seq_mean_token_mean(values_bt: Tensor, mask_bt: Tensor, *, normaliser: float | None = None) -> Tensor:
    """(1/B) sum_b [sum_t m L / |y_b|]; normaliser = global number of rows. GRPO, GSPO. [B, T] -> [].

    An empty row contributes 0 and stays in B (it was sampled); SFT, which leaves such rows out, passes `supervised_rows`.
    """
    return seq_mean(row_means(values_bt, mask_bt), normaliser=normaliser)


def group_token_mean(values_bt: Tensor, mask_bt: Tensor, groups_b: Tensor, *, normaliser: float | None = None) -> Tensor:
    """(1/#groups) sum_g [sum_{i in g, t} m L / sum_{i in g} |y_i|]; normaliser = global number of groups. [B, T], [B] -> [].

    DAPO as printed. A group must lie in one micro-batch, because its own token count is needed.
    """
    assert groups_b.shape == mask_bt.shape[:1], f"{tuple(groups_b.shape)} groups for {tuple(mask_bt.shape)} tokens"
    sums_b, tokens_b = row_sums(values_bt, mask_bt), mask_bt.sum(dim=1)
    _, index_b = torch.unique(groups_b, return_inverse=True)
    count = int(index_b.max()) + 1 if len(index_b) else 0
    sums_g = sums_b.new_zeros(count).index_add(0, index_b, sums_b)
    tokens_g = tokens_b.new_zeros(count).index_add(0, index_b, tokens_b)
    return divide(divide(sums_g, tokens_g).sum(), count if normaliser is None else normaliser)


def const(values_bt: Tensor, mask_bt: Tensor, max_len: int, *, normaliser: float | None = None) -> Tensor:
    """sum m L / (B L_max); normaliser = global number of rows B. Dr.GRPO. [B, T] -> [].

    max_len is a configured generation budget: the padded width of a batch changes every step and would change the loss.
    """
    return divide(token_sum(values_bt, mask_bt) / max_len, len(mask_bt) if normaliser is None else normaliser)


def seq_mean(values_b: Tensor, *, normaliser: float | None = None) -> Tensor:
    """Mean over rows of one number per row; normaliser = global number of rows. DPO, ORPO, RLOO, KTO, reward model. [B] -> []."""
    assert values_b.ndim == 1, f"expected [B], got {tuple(values_b.shape)}"
    return divide(values_b.sum(), len(values_b) if normaliser is None else normaliser)


def supervised_rows(mask_bt: Tensor) -> int:
    """Number of rows with at least one supervised token: B of SFT's row means."""
    return int((mask_bt > 0).any(dim=1).sum())
