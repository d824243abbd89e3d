"""Policy losses whose weight is not a plain token ratio: GSPO's sequence ratio and LUFFY's external traces.

Shapes and masks as in `policy_loss`. Sources: Zheng et al. 2025 eq. 5, 7, 13-14 (GSPO); Yan et al. 2025 eq. 8-10 (LUFFY),
ElliottYan/LUFFY mix_core_alg.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.objectives.policy_loss import clipped_surrogate, ratio
from posttrain.objectives.reductions import row_means, seq_mean, seq_mean_token_mean, token_mean
from posttrain.objectives.tensors import EXPONENT_LIMIT, Objective, masked, same_shape, wide


def sequence_ratio(logp_bt: Tensor, old_logp_bt: Tensor, mask_bt: Tensor) -> Tensor:
    """s_i = exp((1/|y_i|) sum_t (l - l_old)), the geometric mean of the token ratios; 1 for an empty row. [B, T] -> [B]."""
    same_shape(logp_bt, old_logp_bt, mask_bt, rank=2)
    log_ratio_bt = masked(wide(logp_bt), mask_bt) - masked(wide(old_logp_bt), mask_bt).detach()
    return row_means(log_ratio_bt, mask_bt).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()


def gspo(
    logp_bt: Tensor, old_logp_bt: Tensor, mask_bt: Tensor, advantages_b: Tensor,
    *, eps_low: float = 3e-4, eps_high: float = 4e-4, normaliser: float | None = None,
) -> Objective:  # fmt: skip
    """L = -(1/G) sum_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i); Zheng 2025 eq. 5. [B, T] x 3, [B] -> [].

    All tokens of a row share one weight, and a clipped row loses all of them. The clip range is small because s is a geometric
    mean. normaliser = global number of rows. Metrics: `clipped_rows`, `rows`.
    """
    s_b = sequence_ratio(logp_bt, old_logp_bt, mask_bt)
    loss_b, clipped_b = clipped_surrogate(s_b, wide(advantages_b.detach()).to(s_b.dtype), eps_low, eps_high)
    return seq_mean(loss_b, normaliser=normaliser), {"clipped_rows": clipped_b.detach().sum(), "rows": torch.tensor(len(s_b))}


def gspo_token(
    logp_bt: Tensor, old_logp_bt: Tensor, mask_bt: Tensor, advantages_bt: Tensor,
    *, eps_low: float = 3e-4, eps_high: float = 4e-4, normaliser: float | None = None,
) -> Objective:  # fmt: skip
    """GSPO with an advantage per token: s_{i,t} = sg[s_i] exp(l - sg[l]), reduced by `seq_mean_token_mean`; Zheng 2025 eq. 13.

    Value and gradient equal `gspo` when the advantages of a row are equal (and the row is not empty). [B, T] x 4 -> [].
    """
    same_shape(logp_bt, advantages_bt, mask_bt, rank=2)
    logp = masked(wide(logp_bt), mask_bt)
    s_bt = sequence_ratio(logp_bt, old_logp_bt, mask_bt).detach()[:, None] * (logp - logp.detach()).exp()
    loss_bt, clipped_bt = clipped_surrogate(s_bt, masked(wide(advantages_bt.detach()), mask_bt).to(s_bt.dtype), eps_low, eps_high)
    metrics = {"clipped_tokens": masked(clipped_bt, mask_bt).detach().sum(), "tokens": (mask_bt > 0).sum()}
    return seq_mean_token_mean(loss_bt, mask_bt, normaliser=normaliser), metrics


@dataclass(frozen=True, slots=True)
class Luffy:
    """gamma of the shaping f(p) = p / (p + gamma) for external tokens, and the clip range (low, high) of the model's own tokens;
    None, as in the released run, leaves them unclipped."""

    gamma: float = 0.1
    clip: tuple[float, float] | None = None


RELEASED_RUN = Luffy()


def shaped_probability(logp: Tensor, gamma: float) -> Tensor:
    """f(p) = p / (p + gamma), p = exp(l): steepest at rare but plausible tokens. Any shape."""
    return torch.sigmoid(wide(logp) - torch.tensor(gamma, dtype=wide(logp).dtype).log())


def shaped_gradient(logp: Tensor, gamma: float) -> Tensor:
    """df/dl = gamma p / (p + gamma)^2, largest at p = gamma. Any shape."""
    weight = shaped_probability(logp, gamma)
    return weight * (1 - weight)


def luffy_tokens(
    logp_bt: Tensor, old_logp_bt: Tensor, mask_bt: Tensor, advantages_b: Tensor, external_b: Tensor, options: Luffy = RELEASED_RUN
) -> Tensor:  # fmt: skip
    """-f(p) A for tokens of external traces (external_b = 1, their l_old is not used), -CLIP(rho, A) for own ones. -> [B, T]."""
    same_shape(logp_bt, old_logp_bt, mask_bt, rank=2)
    same_shape(advantages_b, external_b, rank=1)
    external_bt = (external_b > 0)[:, None].expand_as(mask_bt)
    logp = masked(wide(logp_bt), mask_bt)
    old_logp = torch.where(external_bt, logp.detach(), masked(wide(old_logp_bt), mask_bt))
    advantages_bt = wide(advantages_b.detach()).to(logp.dtype)[:, None].expand_as(mask_bt)
    rho = ratio(logp, old_logp)
    own = -rho * advantages_bt if options.clip is None else clipped_surrogate(rho, advantages_bt, *options.clip)[0]
    return masked(torch.where(external_bt, -shaped_probability(logp, options.gamma) * advantages_bt, own), mask_bt)


def luffy(
    logp_bt: Tensor, old_logp_bt: Tensor, mask_bt: Tensor, advantages_b: Tensor, external_b: Tensor, options: Luffy = RELEASED_RUN,
    *, normaliser: float | None = None,
) -> Objective:  # fmt: skip
    """L = sum of `luffy_tokens` / Z, Z = all tokens of the union (`token_mean`; Yan 2025 eq. 10). -> [].

    The released run divides by a constant instead: `const(luffy_tokens(...), mask_bt, max_len)`.
    Advantages are taken over the union of own and external completions; the external reward is verified, not assumed.
    """
    loss_bt = luffy_tokens(logp_bt, old_logp_bt, mask_bt, advantages_b, external_b, options)
    return token_mean(loss_bt, mask_bt, normaliser=normaliser), {"tokens": (mask_bt > 0).sum()}
