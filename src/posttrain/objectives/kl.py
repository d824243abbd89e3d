"""Kullback-Leibler: sample estimators, exact values over a finite set, and the optimum of KL-regularised reward.

Sources: Schulman's note "Approximating KL divergence" (2020); Rafailov et al. 2023, appendix A.1; Ouyang et al. 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.objectives.tensors import EXPONENT_LIMIT, same_shape, wide


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k1 = d = log pi - log pi_ref on tokens sampled from pi. Unbiased, may be negative on a sample. Any shape.

    As a differentiated loss its expected gradient is 0: it belongs in the reward, not in the loss.
    """
    same_shape(logp, ref_logp)
    return wide(logp) - wide(ref_logp)


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k2 = d^2 / 2. Biased as a value; its expected gradient is exactly that of KL(pi || pi_ref). Any shape."""
    return k1(logp, ref_logp).square() / 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 = e^{-d} - 1 + d >= 0, the exponent being ref - policy. Unbiased; its expected gradient is that of KL(pi_ref || pi).

    d is kept above -20, where the exponential would overflow; large positive d needs no limit. Any shape.
    """
    d = k1(logp, ref_logp).clamp(min=-EXPONENT_LIMIT)
    return torch.expm1(-d) + d


def k3_with_k2_gradient(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Straight-through: the value of k3 with the gradient of k2, sg[k3] + k2 - sg[k2]. Any shape."""
    quadratic = k2(logp, ref_logp)
    return k3(logp, ref_logp).detach() + quadratic - quadratic.detach()


def kl_divergence(p_v: Tensor, q_v: Tensor) -> Tensor:
    """KL(p || q) = sum_v p (log p - log q) of probability vectors [V] -> []; 0 log 0 = 0, and infinity where q misses p."""
    return _expectation(p_v, _log_ratio(p_v, q_v))


def estimator_expectations(p_v: Tensor, q_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E_p of k1, k2, k3 for probability vectors [V]: k1 and k3 give KL(p || q), k2 does not."""
    d_v = _log_ratio(p_v, q_v)
    return _expectation(p_v, d_v), _expectation(p_v, d_v.square() / 2), _expectation(p_v, torch.expm1(-d_v) + d_v)


def optimal_policy(ref_v: Tensor, rewards_v: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The maximiser of E_pi[r] - beta KL(pi || ref): pi* = ref e^{r/beta} / Z -> (pi* [V], log Z []). J(pi*) = beta log Z."""
    same_shape(ref_v, rewards_v, rank=1)
    scores_v = wide(ref_v).log() + wide(rewards_v) / beta
    return scores_v.softmax(dim=0), scores_v.logsumexp(dim=0)


def regularised_value(pi_v: Tensor, ref_v: Tensor, rewards_v: Tensor, beta: float) -> Tensor:
    """J(pi) = E_pi[r] - beta KL(pi || ref) = beta log Z - beta KL(pi || pi*). [V], [V], [V] -> []."""
    same_shape(pi_v, ref_v, rewards_v, rank=1)
    return (pi_v * rewards_v).sum() - beta * kl_divergence(pi_v, ref_v)


def implicit_reward(policy_v: Tensor, ref_v: Tensor, beta: float, log_z: Tensor) -> Tensor:
    """r = beta log(pi / ref) + beta log Z, the step from the optimum to DPO. [V] -> [V]."""
    return beta * (_log_ratio(policy_v, ref_v) + log_z)


def kl_net_gain(reward_gain: float, kl: float, beta: float) -> float:
    """Reward gained minus what it cost in KL: gain - beta KL."""
    return reward_gain - beta * kl


def _log_ratio(p_v: Tensor, q_v: Tensor) -> Tensor:
    same_shape(p_v, q_v, rank=1)
    return wide(p_v).log() - wide(q_v).log()


def _expectation(p_v: Tensor, values_v: Tensor) -> Tensor:
    return torch.where(p_v > 0, p_v * values_v, 0.0).sum()
