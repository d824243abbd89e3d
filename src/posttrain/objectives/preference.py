"""Direct preference optimisation: one objective over the gap h of log-ratios, and a named loss per pair for each option.

| option | call |
|---|---|
| DPO | `dpo(pc, pr, rc, rr, beta)` |
| cDPO, robust | `dpo(..., pair_loss=partial(cdpo_pairs, label_smoothing=0.1))`, `robust_pairs` likewise |
| hinge (SLiC), IPO on sums | `pair_loss=hinge_pairs`, `pair_loss=ipo_pairs` |
| length-normalised DPO, IPO on means | the same with every log-probability through `per_token` |
| SimPO | `simpo(...)`, no reference |
| + SFT term | add `sft_term(...)` to the loss |

Log-probabilities are *sums* over completion tokens, [B]; the reference's are constants.

Sources: Rafailov et al. 2023 eq. 7; Mitchell's note on cDPO; Chowdhury et al. 2024 (robust); Zhao et al. 2023 (hinge);
Azar et al. 2023 eq. 17 (IPO); Meng et al. 2024 (SimPO); TRL dpo_trainer.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.objectives.reductions import seq_mean
from posttrain.objectives.tensors import Metrics, Objective, divide, same_shape, wide

PairLoss = Callable[[Tensor, float], Tensor]


def log_ratio_gap(policy_chosen_b: Tensor, policy_rejected_b: Tensor, ref_chosen_b: Tensor, ref_rejected_b: Tensor) -> Tensor:
    """h = [log pi(y+) - log ref(y+)] - [log pi(y-) - log ref(y-)]. [B] each -> [B]."""
    same_shape(policy_chosen_b, policy_rejected_b, ref_chosen_b, ref_rejected_b, rank=1)
    return (wide(policy_chosen_b) - wide(ref_chosen_b).detach()) - (wide(policy_rejected_b) - wide(ref_rejected_b).detach())


def sigmoid_pairs(h_b: Tensor, beta: float) -> Tensor:
    """-log sigma(beta h), per pair [B]."""
    return -logsigmoid(beta * h_b)


def cdpo_pairs(h_b: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """-(1-e) log sigma(beta h) - e log sigma(-beta h), per pair [B]; smallest at h = logit(1-e) / beta."""
    return (1 - label_smoothing) * sigmoid_pairs(h_b, beta) + label_smoothing * sigmoid_pairs(-h_b, beta)


def robust_pairs(h_b: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """[-(1-e) log sigma(beta h) + e log sigma(-beta h)] / (1-2e), per pair [B], e < 1/2: unbiased under flipped labels,
    may be negative."""
    assert label_smoothing < 0.5, f"the flip rate must be under 1/2, got {label_smoothing}"
    kept, flipped = sigmoid_pairs(h_b, beta), sigmoid_pairs(-h_b, beta)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_pairs(h_b: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta h), per pair [B]."""
    return (1 - beta * h_b).clamp(min=0)


def ipo_pairs(h_b: Tensor, beta: float) -> Tensor:
    """(h - 1/(2 beta))^2, per pair [B]."""
    return (h_b - 1 / (2 * beta)).square()


def per_token(sum_logp_b: Tensor, length_b: Tensor) -> Tensor:
    """Summed log-probabilities divided by their lengths; a zero length counts as 1. [B], [B] -> [B]."""
    same_shape(sum_logp_b, length_b, rank=1)
    return divide(wide(sum_logp_b), length_b)


def dpo(
    policy_chosen_b: Tensor,
    policy_rejected_b: Tensor,
    ref_chosen_b: Tensor,
    ref_rejected_b: Tensor,
    beta: float,
    *,
    pair_loss: PairLoss = sigmoid_pairs,
    normaliser: float | None = None,
) -> Objective:
    """L = mean over pairs of pair_loss(h, beta), by default -log sigma(beta h) (Rafailov 2023 eq. 7). [B] each -> [].

    dL/d log pi(y+) = -(beta/B) sigma(-beta h), the opposite for y-; at pi = ref the loss is ln 2. normaliser = global number
    of pairs (`seq_mean`). Metrics are shares of means over pairs: `chosen_reward`, `rejected_reward` (beta log pi/ref), `margin`,
    `accuracy` (strict >), and both policy log-probabilities, because both may fall while h grows.
    """
    h_b = log_ratio_gap(policy_chosen_b, policy_rejected_b, ref_chosen_b, ref_rejected_b)
    rewards = beta * (wide(policy_chosen_b) - wide(ref_chosen_b)), beta * (wide(policy_rejected_b) - wide(ref_rejected_b))
    metrics = _pair_metrics(*rewards, normaliser)
    metrics["chosen_logp"] = seq_mean(wide(policy_chosen_b.detach()), normaliser=normaliser)
    metrics["rejected_logp"] = seq_mean(wide(policy_rejected_b.detach()), normaliser=normaliser)
    return seq_mean(pair_loss(h_b, beta), normaliser=normaliser), metrics


def simpo_pairs(mean_chosen_b: Tensor, mean_rejected_b: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigma(beta l+ - beta l- - gamma) of *mean* log-probabilities, per pair [B]."""
    same_shape(mean_chosen_b, mean_rejected_b, rank=1)
    return -logsigmoid(beta * (mean_chosen_b - mean_rejected_b) - gamma)


def simpo(
    mean_chosen_b: Tensor, mean_rejected_b: Tensor, beta: float, gamma: float, *, normaliser: float | None = None
) -> Objective:
    """SimPO: mean of `simpo_pairs`, on log-probabilities that went through `per_token`; no reference (Meng 2024). [B] -> [].

    Metrics as in `dpo`, the rewards being beta times the mean log-probability.
    """
    mean_chosen_b, mean_rejected_b = wide(mean_chosen_b), wide(mean_rejected_b)
    loss = seq_mean(simpo_pairs(mean_chosen_b, mean_rejected_b, beta, gamma), normaliser=normaliser)
    return loss, _pair_metrics(beta * mean_chosen_b, beta * mean_rejected_b, normaliser)


def sft_term(policy_chosen_b: Tensor, chosen_length_b: Tensor, alpha: float, *, normaliser: float | None = None) -> Tensor:
    """alpha NLL(y+), to be added to any of these: -alpha sum_b log pi(y+) / N, N = global number of chosen tokens. [B] -> []."""
    same_shape(policy_chosen_b, chosen_length_b, rank=1)
    return -alpha * divide(wide(policy_chosen_b).sum(), chosen_length_b.sum() if normaliser is None else normaliser)


def dpo_gap(logp_chosen: Tensor, logp_rejected: Tensor) -> Tensor:
    """log p(y+) - log p(y-) of the policy alone: the gap people quote; DPO optimises h, which has the reference in it."""
    return logp_chosen - logp_rejected


def _pair_metrics(chosen_reward_b: Tensor, rejected_reward_b: Tensor, normaliser: float | None) -> Metrics:
    chosen_reward_b, rejected_reward_b = chosen_reward_b.detach(), rejected_reward_b.detach()
    won_b = (chosen_reward_b > rejected_reward_b).to(chosen_reward_b.dtype)
    per_pair = {
        "chosen_reward": chosen_reward_b,
        "rejected_reward": rejected_reward_b,
        "margin": chosen_reward_b - rejected_reward_b,
        "accuracy": won_b,
    }
    return {name: seq_mean(values_b, normaliser=normaliser) for name, values_b in per_pair.items()}
