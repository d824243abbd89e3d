"""Sequence packing and padding as index arithmetic: what makes a packed row exactly equal to separate rows.

Packed equals separate iff attention is block-diagonal causal, positions restart per segment, the first label of every segment is
ignored, and the loss is a global token mean. Axis letters: S segments, T tokens of the packed row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.objectives.supervised import IGNORED


def segment_ids(lengths_s: Tensor) -> Tensor:
    """[S] lengths -> [T] index of the segment each token lies in."""
    assert lengths_s.ndim == 1, f"expected [S], got {tuple(lengths_s.shape)}"
    return torch.repeat_interleave(torch.arange(len(lengths_s), device=lengths_s.device), lengths_s)


def cumulative_lengths(lengths_s: Tensor) -> Tensor:
    """[S] lengths -> [S+1] int32 prefix sums from 0, as variable-length attention kernels take them."""
    return torch.nn.functional.pad(lengths_s.cumsum(0), (1, 0)).to(torch.int32)


def packed_positions(lengths_s: Tensor) -> Tensor:
    """[S] lengths -> [T] positions that restart at 0 in every segment."""
    starts_s = cumulative_lengths(lengths_s)[:-1].long()
    return torch.arange(int(lengths_s.sum()), device=lengths_s.device) - starts_s[segment_ids(lengths_s)]


def packed_attention_mask(lengths_s: Tensor) -> Tensor:
    """[S] lengths -> [T, T] bool, query x key: allowed(i, j) = [j <= i] and [segment(i) = segment(j)]."""
    segments_t = segment_ids(lengths_s)
    return (segments_t[:, None] == segments_t[None, :]).tril()


def ignore_segment_starts(labels_t: Tensor, lengths_s: Tensor) -> Tensor:
    """Labels with -100 at the first token of every segment, which no token of the same segment predicts. [T], [S] -> [T]."""
    assert labels_t.shape == (int(lengths_s.sum()),), f"{len(labels_t)} labels for {int(lengths_s.sum())} tokens"
    return torch.where(packed_positions(lengths_s) == 0, IGNORED, labels_t)


def attention(q_td: Tensor, k_td: Tensor, v_td: Tensor, allowed_tt: Tensor) -> Tensor:
    """One head, softmax(q k^T / sqrt(d)) v over allowed keys. [T, d] x 3, [T, T] -> [T, d]."""
    scores: Tensor = (q_td @ k_td.T / q_td.shape[1] ** 0.5).masked_fill(~allowed_tt, -torch.inf)
    return scores.softmax(dim=1) @ v_td


def left_pad_positions(attention_mask_bt: Tensor) -> Tensor:
    """Positions of a left-padded batch, max(cumsum(mask) - 1, 0), so that every row starts at 0. [B, T] -> [B, T]."""
    assert attention_mask_bt.ndim == 2, f"expected [B, T], got {tuple(attention_mask_bt.shape)}"
    return (attention_mask_bt.cumsum(dim=1) - 1).clamp(min=0)
