"""Supervised fine-tuning: token log-probabilities and masked next-token cross-entropy.

Sources: Ouyang et al. 2022, section 3.5; TRL sft_trainer.py; transformers pull request 34191 (accumulation).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.objectives.reductions import token_mean, token_sum
from posttrain.objectives.tensors import Objective, masked, same_shape, wide

IGNORED = -100


def token_logprobs(logits_btv: Tensor, labels_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of un-shifted labels: position t scores the label at t+1, once.

    logits [B, T, V], labels [B, T] with -100 where nothing is supervised -> logp [B, T-1], mask [B, T-1]:
    l[b, t] = log softmax(logits[b, t])[labels[b, t+1]], m[b, t] = [labels[b, t+1] != -100], l = 0 where m = 0.

    The plain form, for checks and small tensors: training reads the same numbers from the chunked head. Rows of logits that are
    not supervised are replaced before the softmax, so they get exactly zero gradient even if they hold infinity or NaN.
    """
    assert logits_btv.ndim == 3 and logits_btv.shape[:2] == labels_bt.shape, (
        f"{tuple(logits_btv.shape)} and {tuple(labels_bt.shape)} do not fit"
    )
    supervised_bt = labels_bt[:, 1:] != IGNORED
    logits = torch.where(supervised_bt[..., None], wide(logits_btv[:, :-1]), 0.0)
    legal = torch.where(supervised_bt, labels_bt[:, 1:], 0)  # a gather with -100 is an index error
    logp_bt = logits.log_softmax(dim=-1).gather(2, legal[..., None])[..., 0]
    return torch.where(supervised_bt, logp_bt, 0.0), supervised_bt.to(logp_bt.dtype)


def sft_ce(logp_bt: Tensor, weight_bt: Tensor, *, normaliser: float | None = None) -> Objective:
    """Masked cross-entropy: L = -sum_{b,t} w[b, t] l[b, t] / N, the `token_mean` reduction.

    logp, weight [B, T]; normaliser N = sum of w over the global batch (default: this batch) -> [].
    Metrics: `loss_sum` (before the division), `tokens` (supervised ones). Perplexity is exp(sum of loss_sum / sum of w).
    """
    same_shape(logp_bt, weight_bt, rank=2)
    nll_bt = -masked(wide(logp_bt), weight_bt)
    loss = token_mean(nll_bt, weight_bt, normaliser=normaliser)
    return loss, {"loss_sum": token_sum(nll_bt, weight_bt).detach(), "tokens": (weight_bt > 0).sum()}


def scaled_micro_losses(loss_sums: Sequence[float], token_counts: Sequence[float]) -> list[float]:
    """Loss of each micro-batch under accumulation: S_k / N with N = sum_k n_k, so that the parts add up to the global mean.

    The mean of the micro-batches' own means would weight short ones too much. objectives: section 1.2.
    """
    assert len(loss_sums) == len(token_counts), "one count per sum"
    total = sum(token_counts)
    return [loss_sum / (total if total > 0 else 1.0) for loss_sum in loss_sums]
