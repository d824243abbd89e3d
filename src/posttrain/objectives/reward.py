"""Alignment without pairs of log-ratios: reward models from votes, odds ratios (ORPO) and unpaired labels (KTO).

Sources: Bradley & Terry 1952; Ouyang et al. 2022 eq. 1; Touvron et al. 2023 (margin); Hong et al. 2024 eq. 4-7; Ethayarajh et
al. 2024 eq. 7-8; TRL reward_trainer.py, kto_trainer.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.objectives.reductions import seq_mean
from posttrain.objectives.tensors import Objective, same_shape, wide

_LARGEST_MEAN_LOGP = -1e-6


def vote_probability(wins: int, votes: int, *, smoothed: bool = False) -> float:
    """p = wins / votes, or (wins + 1) / (votes + 2), which keeps a unanimous vote finite."""
    assert 0 <= wins <= votes and votes > 0, f"{wins} of {votes} votes"
    return (wins + 1) / (votes + 2) if smoothed else wins / votes


def bradley_terry_gap(p: float) -> float:
    """Reward gap r+ - r- = log(p / (1-p)) at which p = sigma(r+ - r-); infinite for a unanimous vote."""
    if p in (0.0, 1.0):
        return math.inf if p else -math.inf
    return math.log(p / (1 - p))


def soft_preference(gap_b: Tensor, p_b: Tensor) -> Tensor:
    """-p log sigma(gap) - (1-p) log sigma(-gap), per pair [B]; smallest at gap = logit(p)."""
    same_shape(gap_b, p_b)
    return -p_b * logsigmoid(gap_b) - (1 - p_b) * logsigmoid(-gap_b)


def reward_bt(
    chosen_b: Tensor, rejected_b: Tensor, *, margin_b: Tensor | None = None, center: float = 0.0, normaliser: float | None = None
) -> Objective:
    """L = mean -log sigma(r+ - r- - margin) + c mean (r+ + r-)^2; c keeps the free constant of rewards near 0. [B] -> [].

    normaliser = global number of pairs. Metric `accuracy`: a tie counts as wrong.
    """
    same_shape(chosen_b, rejected_b, *([] if margin_b is None else [margin_b]), rank=1)
    gap_b = wide(chosen_b) - wide(rejected_b)
    per_pair_b = (
        -logsigmoid(gap_b if margin_b is None else gap_b - margin_b) + center * (wide(chosen_b) + wide(rejected_b)).square()
    )
    won_b = (gap_b.detach() > 0).to(gap_b.dtype)
    return seq_mean(per_pair_b, normaliser=normaliser), {"accuracy": seq_mean(won_b, normaliser=normaliser)}


def reward_kwise(rewards_k: Tensor) -> Objective:
    """L = 1/C(K,2) sum over pairs i better than j of -log sigma(r_i - r_j), for K answers to one prompt, best first. [K] -> []."""
    assert rewards_k.ndim == 1 and len(rewards_k) > 1, f"expected [K] with K > 1, got {tuple(rewards_k.shape)}"
    better, worse = torch.triu_indices(len(rewards_k), len(rewards_k), offset=1)
    return reward_bt(rewards_k[better], rewards_k[worse])


def log_odds(mean_logp: Tensor) -> Tensor:
    """log(P / (1-P)) with P = exp(mean log-probability), which is kept at or under -1e-6 (P = 1 has infinite odds). Any shape."""
    mean_logp = wide(mean_logp).clamp(max=_LARGEST_MEAN_LOGP)
    return mean_logp - log1mexp(mean_logp)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, accurate at both ends: log(-expm1(x)) above -ln 2, log1p(-e^x) below. Any shape."""
    near = x > -math.log(2)
    # each branch sees a harmless argument where the other is taken, or its infinite gradient would leak through `where`
    return torch.where(near, (-torch.expm1(torch.where(near, x, -1.0))).log(), torch.log1p(-torch.where(near, -1.0, x).exp()))


def odds_ratio_pairs(mean_logp_chosen_b: Tensor, mean_logp_rejected_b: Tensor) -> Tensor:
    """-log sigma(log OR) per pair, log OR = log odds(y+) - log odds(y-). [B], [B] -> [B]."""
    same_shape(mean_logp_chosen_b, mean_logp_rejected_b, rank=1)
    return -logsigmoid(log_odds(mean_logp_chosen_b) - log_odds(mean_logp_rejected_b))


def orpo(
    mean_logp_chosen_b: Tensor,
    mean_logp_rejected_b: Tensor,
    nll_chosen: Tensor,
    lam: float = 0.1,
    *,
    normaliser: float | None = None,
) -> Objective:
    """L = NLL(y+) + lambda mean of `odds_ratio_pairs`. Hong 2024 eq. 6. [B], [B], [] -> [].

    Means per token, not sums: with sums P underflows and the ratio silently becomes a log-probability difference. nll_chosen is
    the token mean over the completion, already divided by its own global count. Metrics: `loss_or`, `accuracy` (shares).
    """
    loss_or = seq_mean(odds_ratio_pairs(mean_logp_chosen_b, mean_logp_rejected_b), normaliser=normaliser)
    won_b = (mean_logp_chosen_b > mean_logp_rejected_b).to(loss_or.dtype)
    return nll_chosen + lam * loss_or, {"loss_or": loss_or.detach(), "accuracy": seq_mean(won_b, normaliser=normaliser)}


def kto_baseline(mismatched_log_ratios_m: Tensor) -> Tensor:
    """z0 = max(0, mean log pi/ref over mismatched prompt-completion pairs), a constant. [M] -> []."""
    return wide(mismatched_log_ratios_m).detach().mean().clamp(min=0)


def kto_examples(
    log_ratio_b: Tensor, desirable_b: Tensor, z0: Tensor, beta: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Per example [B]: lambda_D (1 - sigma(beta (lr - z0))) if desirable, else lambda_U (1 - sigma(beta (z0 - lr))).

    log_ratio [B] is log pi(y) - log ref(y) summed over tokens; weights = (lambda_D, lambda_U).
    """
    same_shape(log_ratio_b, desirable_b, rank=1)
    signed_b = beta * (wide(log_ratio_b) - z0)
    return torch.where(desirable_b > 0, weights[0] * torch.sigmoid(-signed_b), weights[1] * torch.sigmoid(signed_b))


def kto(
    log_ratio_b: Tensor,
    desirable_b: Tensor,
    z0: Tensor,
    beta: float,
    weights: tuple[float, float] = (1.0, 1.0),
    *,
    normaliser: float | None = None,
) -> Objective:
    """L = mean of `kto_examples` over the global number of examples. Ethayarajh 2024 eq. 8. [B], [B], [] -> []."""
    per_example_b = kto_examples(log_ratio_b, desirable_b, z0.detach(), beta, weights)
    return seq_mean(per_example_b, normaliser=normaliser), {"desirable": (desirable_b > 0).sum(), "z0": z0.detach()}
