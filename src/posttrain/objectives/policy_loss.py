"""Policy-gradient losses: the clipped surrogate with an optional KL term, and the reductions that name GRPO, Dr.GRPO, DAPO, PPO.

Every loss takes logp, old_logp, mask [B, T] (old_logp and advantages are constants) and advantages [B] (one per completion) or
[B, T]; the shared options are `PolicyTerms`. Masked positions may hold anything and get exactly zero gradient. The value of a
policy loss is no progress signal: at pi = pi_old it is often 0 while its gradient is not.

Metrics add up over micro-batches: `tokens`, `clipped_tokens` (where the clipped branch is the larger loss), `ratio_sum`,
`kl_sum` (k3 to the reference), `approx_kl_sum` (old - new log-probabilities): divide each sum by `tokens`.

Sources: Schulman et al. 2017 eq. 7; Shao et al. 2024 eq. 3; Liu et al. 2025 (Dr.GRPO); Yu et al. 2025 eq. 8, 12 (DAPO);
Zheng et al. 2025 eq. 5, 13 (GSPO); Yan et al. 2025 eq. 8 (LUFFY); TRL grpo_trainer.py; verl core_algos.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from posttrain.objectives.kl import k3
from posttrain.objectives.reductions import (
    const,
    group_token_mean,
    seq_mean,
    seq_mean_token_mean,
    token_mean,
)
from posttrain.objectives.tensors import EXPONENT_LIMIT, Metrics, Objective, masked, same_shape, wide


class PolicyTerms(TypedDict, total=False):
    """Options shared by the losses: clip range 1 - eps_low .. 1 + eps_high (0.2 each), weight beta of the k3 term (0) towards
    ref_logp_bt [B, T], and PPO's optional dual clip (a cap of c |A| on the loss where A < 0; None = off)."""

    ref_logp_bt: Tensor | None
    beta: float
    eps_low: float
    eps_high: float
    dual_clip: float | None


@dataclass(frozen=True, slots=True, eq=False)
class TokenLoss:
    """Loss per token before any reduction, and what it was made of; all [B, T] and 0 where mask = 0."""

    loss_bt: Tensor
    ratio_bt: Tensor
    clipped_bt: Tensor
    kl_bt: Tensor
    log_ratio_bt: Tensor
    mask_bt: Tensor

    def metrics(self) -> Metrics:
        sums = {
            "clipped_tokens": self.clipped_bt,
            "ratio_sum": self.ratio_bt,
            "kl_sum": self.kl_bt,
            "approx_kl_sum": -self.log_ratio_bt,
        }
        return {"tokens": (self.mask_bt > 0).sum(), **{name: values.detach().sum() for name, values in sums.items()}}


def ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """rho = exp(l - l_old), the exponent kept within +-20. Live in l even where l_old = l: a constant 1 would have no gradient."""
    same_shape(logp, old_logp)
    return (wide(logp) - wide(old_logp).detach()).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()


def clipped_surrogate(rho: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), and where the clipped branch won (0/1). Any shape.

    Its gradient is zero only there: A > 0 and rho > 1 + eps_high, or A < 0 and rho < 1 - eps_low.
    """
    same_shape(rho, advantages)
    plain, clipped = -rho * advantages, -rho.clamp(1 - eps_low, 1 + eps_high) * advantages
    return torch.maximum(plain, clipped), (clipped > plain).to(rho.dtype)


def policy_tokens(
    logp_bt: Tensor, old_logp_bt: Tensor, mask_bt: Tensor, advantages: Tensor, **terms: Unpack[PolicyTerms]
) -> TokenLoss:
    """Token losses -min[rho A, clip(rho) A] + beta k3. [B, T] x 3, [B] or [B, T] -> `TokenLoss`."""
    same_shape(logp_bt, old_logp_bt, mask_bt, rank=2)
    logp, old_logp = masked(wide(logp_bt), mask_bt), masked(wide(old_logp_bt), mask_bt).detach()
    advantages_bt = _per_token(advantages, mask_bt).to(logp.dtype)
    rho = ratio(logp, old_logp)
    loss, clipped = clipped_surrogate(rho, advantages_bt, terms.get("eps_low", 0.2), terms.get("eps_high", 0.2))
    cap = terms.get("dual_clip")
    if cap is not None:
        loss = torch.where(advantages_bt < 0, torch.minimum(loss, -cap * advantages_bt), loss)
    ref_logp_bt, beta = terms.get("ref_logp_bt"), terms.get("beta", 0.0)
    assert beta == 0 or ref_logp_bt is not None, "a KL term needs the reference's log-probabilities"
    kl = torch.zeros_like(loss) if ref_logp_bt is None else k3(logp, masked(wide(ref_logp_bt), mask_bt).detach())
    if beta != 0:
        loss = loss + beta * kl
    return TokenLoss(
        masked(loss, mask_bt), masked(rho, mask_bt), masked(clipped, mask_bt), masked(kl, mask_bt), logp - old_logp, mask_bt
    )


def grpo(
    logp_bt: Tensor,
    old_logp_bt: Tensor,
    mask_bt: Tensor,
    advantages_b: Tensor,
    *,
    normaliser: float | None = None,
    **terms: Unpack[PolicyTerms],
) -> Objective:
    """L = -(1/G) sum_i (1/|y_i|) sum_t {min[rho A, clip(rho) A] - beta k3}, `seq_mean_token_mean`; Shao 2024 eq. 3. -> [].

    normaliser = global number of completions. Advantages: `standardised_advantages`, or `centred_advantages` for r - mean.
    """
    tokens = policy_tokens(logp_bt, old_logp_bt, mask_bt, advantages_b, **terms)
    return seq_mean_token_mean(tokens.loss_bt, mask_bt, normaliser=normaliser), tokens.metrics()


def dr_grpo(
    logp_bt: Tensor, old_logp_bt: Tensor, mask_bt: Tensor, advantages_b: Tensor, max_len: int,
    *, normaliser: float | None = None, **terms: Unpack[PolicyTerms],
) -> Objective:  # fmt: skip
    """L = -(1/G) sum_i (1/L_max) sum_t min[rho A, clip(rho) A], `const`: no 1/|y_i|, which would make long wrong answers cheap.

    max_len is the configured generation budget; normaliser = global number of completions; advantages: `centred_advantages`. -> [].
    """
    tokens = policy_tokens(logp_bt, old_logp_bt, mask_bt, advantages_b, **terms)
    return const(tokens.loss_bt, mask_bt, max_len, normaliser=normaliser), tokens.metrics()


def dapo(
    logp_bt: Tensor,
    old_logp_bt: Tensor,
    mask_bt: Tensor,
    advantages_b: Tensor,
    *,
    normaliser: float | None = None,
    **terms: Unpack[PolicyTerms],
) -> Objective:
    """Mean over all tokens of the global batch, `token_mean`, with clip-higher (eps_high 0.28 unless given); DAPO as coded. -> [].

    normaliser = global number of completion tokens.
    """
    tokens = policy_tokens(logp_bt, old_logp_bt, mask_bt, advantages_b, **(PolicyTerms(eps_high=0.28) | terms))
    return token_mean(tokens.loss_bt, mask_bt, normaliser=normaliser), tokens.metrics()


def dapo_by_group(
    logp_bt: Tensor, old_logp_bt: Tensor, mask_bt: Tensor, advantages_b: Tensor, groups_b: Tensor,
    *, normaliser: float | None = None, **terms: Unpack[PolicyTerms],
) -> Objective:  # fmt: skip
    """Mean over prompts of each group's token mean, `group_token_mean`: DAPO as printed. normaliser = global number of groups. -> []."""
    tokens = policy_tokens(logp_bt, old_logp_bt, mask_bt, advantages_b, **(PolicyTerms(eps_high=0.28) | terms))
    return group_token_mean(tokens.loss_bt, mask_bt, groups_b, normaliser=normaliser), tokens.metrics()


def ppo(
    logp_bt: Tensor,
    old_logp_bt: Tensor,
    mask_bt: Tensor,
    advantages_bt: Tensor,
    *,
    normaliser: float | None = None,
    **terms: Unpack[PolicyTerms],
) -> Objective:
    """PPO's policy loss: token_mean of max(-rho A, -clip(rho) A); Schulman 2017 eq. 7. normaliser = global token count. -> []."""
    tokens = policy_tokens(logp_bt, old_logp_bt, mask_bt, advantages_bt, **terms)
    return token_mean(tokens.loss_bt, mask_bt, normaliser=normaliser), tokens.metrics()


def ppo_value(
    values_bt: Tensor,
    old_values_bt: Tensor,
    returns_bt: Tensor,
    mask_bt: Tensor,
    eps: float = 0.2,
    *,
    normaliser: float | None = None,
) -> Objective:
    """L_V = 1/2 token_mean max((V - R)^2, (clip(V, V_old +- eps) - R)^2); Schulman 2017, section 5 as coded. [B, T] -> [].

    Metrics: `loss_unclipped` (share of the mean), `clipped_tokens`, `tokens`.
    """
    same_shape(values_bt, old_values_bt, returns_bt, mask_bt, rank=2)
    values, old, returns = (masked(wide(x), mask_bt) for x in (values_bt, old_values_bt.detach(), returns_bt.detach()))
    plain = (values - returns).square()
    clipped = (torch.minimum(torch.maximum(values, old - eps), old + eps) - returns).square()
    metrics = {
        "loss_unclipped": token_mean(plain.detach() / 2, mask_bt, normaliser=normaliser),
        "clipped_tokens": masked((clipped > plain).to(values.dtype), mask_bt).sum(),
        "tokens": (mask_bt > 0).sum(),
    }
    return token_mean(torch.maximum(plain, clipped) / 2, mask_bt, normaliser=normaliser), metrics


def reinforce(sum_logp_b: Tensor, advantages_b: Tensor, *, normaliser: float | None = None) -> Objective:
    """-mean_i sg[A_i] sum_t l_{i,t}: the sum over tokens, not their mean (Williams 1992; RLOO). [B], [B] -> []."""
    same_shape(sum_logp_b, advantages_b, rank=1)
    return seq_mean(-advantages_b.detach() * wide(sum_logp_b), normaliser=normaliser), {}


def reinforce_clipped(
    sum_logp_b: Tensor, old_sum_logp_b: Tensor, advantages_b: Tensor, eps: float = 0.2, *, normaliser: float | None = None
) -> Objective:
    """RLOO on stale samples: one ratio per *sequence*, exp(sum l - sum l_old), with PPO's clip. [B] each -> []."""
    rho_b = ratio(sum_logp_b, old_sum_logp_b)
    loss_b, clipped_b = clipped_surrogate(rho_b, advantages_b.detach().to(rho_b.dtype), eps, eps)
    return seq_mean(loss_b, normaliser=normaliser), {"clipped_rows": clipped_b.detach().sum()}


def _per_token(advantages: Tensor, mask_bt: Tensor) -> Tensor:
    advantages_bt = advantages[:, None].expand_as(mask_bt) if advantages.ndim == 1 else advantages
    same_shape(advantages_bt, mask_bt)
    return masked(wide(advantages_bt.detach()), mask_bt)
