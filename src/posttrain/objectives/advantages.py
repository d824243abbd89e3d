"""Advantages: how much better a completion was than what it is compared with. All are constants to the losses.

Rewards of a batch come with `groups_b`, the prompt each completion belongs to (any integers; None = one group). A completion no
verifier could judge has `scored_b` = 0: it is left out of mean and std and gets advantage 0, whatever its reward holds.

Sources: Shao et al. 2024, section 4.1; Liu et al. 2025 (Dr.GRPO), sail-sg/understand-r1-zero; Ahmadian et al. 2024 (RLOO);
Schulman et al. 2016 (GAE); Ouyang et al. 2022, appendix C; Yu et al. 2025, section 3 (DAPO).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.objectives.kl import k1
from posttrain.objectives.tensors import divide, masked, same_shape, wide


@dataclass(frozen=True, slots=True, eq=False)
class GroupStatistics:
    """Mean and deviation of the rewards of each completion's group, and what one needs to divide by them. All [B]."""

    centred_b: Tensor  # r - mean, exactly 0 in a group of equal rewards and for what is not scored
    mean_b: Tensor
    squares_b: Tensor  # sum of squared deviations over the group
    count_b: Tensor  # scored completions in the group

    def std_b(self, *, population: bool = False) -> Tensor:
        """Standard deviation over n - 1 (sample, the default) or n (population); 0 for a single completion."""
        return divide(self.squares_b, self.count_b - (0 if population else 1)).sqrt()


def group_statistics(rewards_b: Tensor, groups_b: Tensor | None = None, scored_b: Tensor | None = None) -> GroupStatistics:
    """Per-group statistics, spread back to completions. rewards, groups, scored [B] -> [B] each. Warns about groups of one."""
    groups_b = torch.zeros_like(rewards_b, dtype=torch.long) if groups_b is None else groups_b
    scored_b = torch.ones_like(rewards_b) if scored_b is None else scored_b
    same_shape(rewards_b, groups_b, scored_b, rank=1)
    rewards_b, scored_b = masked(wide(rewards_b), scored_b), (scored_b > 0).to(wide(rewards_b).dtype)
    _, index_b, sizes_g = torch.unique(groups_b, return_inverse=True, return_counts=True)
    if (sizes_g == 1).any():
        warnings.warn(
            "a group of one completion has no baseline: its advantage is 0 and it teaches nothing", RuntimeWarning, stacklevel=3
        )

    def group_sum(values_b: Tensor) -> Tensor:
        return values_b.new_zeros(len(sizes_g)).index_add(0, index_b, values_b)[index_b]

    count_b = group_sum(scored_b)
    mean_b = divide(group_sum(rewards_b), count_b)
    centred_b = (rewards_b - mean_b) * scored_b
    # the mean of equal numbers may be off in the last bit; a constant group must teach exactly nothing
    constant_b = _spread(rewards_b, scored_b, index_b, len(sizes_g)) == 0
    centred_b = torch.where(constant_b, 0.0, centred_b)
    return GroupStatistics(centred_b, mean_b, group_sum(centred_b.square()), count_b)


def centred_advantages(rewards_b: Tensor, groups_b: Tensor | None = None, *, scored_b: Tensor | None = None) -> Tensor:
    """A_i = r_i - mean(r of the group), no std: the chapter's and Dr.GRPO's form. [B] -> [B]; sums to 0 in a group.

    Dividing by std would weight too-easy and too-hard prompts more. A group of one gets 0 and a warning.
    """
    return group_statistics(rewards_b, groups_b, scored_b).centred_b


def standardised_advantages(
    rewards_b: Tensor,
    groups_b: Tensor | None = None,
    *,
    scored_b: Tensor | None = None,
    eps: float = 1e-4,
    population: bool = False,
) -> Tensor:
    """A_i = (r_i - mean) / (std + eps), GRPO's form, std over n - 1 unless `population`. [B] -> [B]; sums to 0 in a group.

    Equal rewards give exactly 0; a group of one gets 0 and a warning.
    """
    statistics = group_statistics(rewards_b, groups_b, scored_b)
    return statistics.centred_b / (statistics.std_b(population=population) + eps)


def leave_one_out_baselines(rewards_g: Tensor) -> Tensor:
    """RLOO: b_i = mean of the other rewards of the group, so that r - b = G/(G-1) (r - mean). [G] -> [G].

    With G = 1 there are no others: b = r, advantage 0, and a warning.
    """
    assert rewards_g.ndim == 1, f"expected [G], got {tuple(rewards_g.shape)}"
    rewards_g = wide(rewards_g)
    if len(rewards_g) == 1:
        warnings.warn("a group of one completion has no leave-one-out baseline: its advantage is 0", RuntimeWarning, stacklevel=2)
        return rewards_g.clone()
    return (rewards_g.sum() - rewards_g) / (len(rewards_g) - 1)


def keep_informative_groups(correct: Sequence[Sequence[float]]) -> list[int]:
    """Dynamic sampling (DAPO): indices of groups with 0 < number correct < G. Judge correctness before overlong shaping."""
    return [index for index, group in enumerate(correct) if 0 < sum(1 for value in group if value > 0) < len(group)]


def overlong_penalty(lengths_b: Tensor, max_len: int, cache: int) -> Tensor:
    """DAPO's soft length penalty, added to the reward: 0 up to L_max - L_c, then ((L_max - L_c) - |y|) / L_c, -1 beyond L_max.
    [B] -> [B]. With cache 0 there is no slope."""
    excess_b = wide(lengths_b) - (max_len - cache)
    slope_b = excess_b / cache if cache > 0 else torch.zeros_like(excess_b)
    return -torch.where(wide(lengths_b) > max_len, 1.0, slope_b.clamp(0, 1))


def kl_reward_shaping(
    score_b: Tensor,
    logp_bt: Tensor,
    ref_logp_bt: Tensor,
    mask_bt: Tensor,
    beta: float,
    estimator: Callable[[Tensor, Tensor], Tensor] = k1,
) -> Tensor:
    """Token rewards r_t = -beta k(l_old, l_ref) + [t = last token] score, 0 where mask = 0. [B], [B, T] each -> [B, T].

    The score lands on the last real token; a row without tokens gets no reward. Ouyang 2022.
    """
    same_shape(logp_bt, ref_logp_bt, mask_bt, rank=2)
    last_bt = (mask_bt > 0) & (mask_bt.flip(1).cumsum(1).flip(1) == mask_bt)
    rewards_bt = -beta * estimator(masked(logp_bt, mask_bt), masked(ref_logp_bt, mask_bt))
    return masked(rewards_bt + torch.where(last_bt, score_b[:, None], 0.0), mask_bt)


def gae(rewards_bt: Tensor, values_bt: Tensor, mask_bt: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: d_t = r_t + gamma V_{t+1} - V_t, A_t = d_t + gamma lambda A_{t+1}, V = 0 after the end.

    [B, T] each -> advantages, returns A + V [B, T], 0 where mask = 0. Observation tokens inside a completion (mask 0) are
    skipped: V and A are carried over the gap. Schulman 2016 eq. 16.
    """
    same_shape(rewards_bt, values_bt, mask_bt, rank=2)
    rewards_bt, values_bt, real_bt = masked(wide(rewards_bt), mask_bt), masked(wide(values_bt), mask_bt), mask_bt > 0
    advantages_bt = torch.zeros_like(rewards_bt)
    next_value_b = next_advantage_b = rewards_bt.new_zeros(len(rewards_bt))
    for t in reversed(range(rewards_bt.shape[1])):
        delta_b = rewards_bt[:, t] + gamma * next_value_b - values_bt[:, t]
        next_advantage_b = torch.where(real_bt[:, t], delta_b + gamma * lam * next_advantage_b, next_advantage_b)
        next_value_b = torch.where(real_bt[:, t], values_bt[:, t], next_value_b)
        advantages_bt[:, t] = torch.where(real_bt[:, t], next_advantage_b, 0.0)
    return advantages_bt, masked(advantages_bt + values_bt, mask_bt)


def whiten(values_bt: Tensor, mask_bt: Tensor) -> Tensor:
    """(A - mean) / sqrt(var + 1e-8) over all tokens with mask > 0, unbiased variance; 0 elsewhere. [B, T] -> [B, T].

    A single token has no variance: it becomes 0. Take returns before whitening.
    """
    same_shape(values_bt, mask_bt, rank=2)
    chosen = wide(values_bt)[mask_bt > 0]
    if len(chosen) < 2:
        return torch.zeros_like(wide(values_bt))
    return masked((wide(values_bt) - chosen.mean()) / (chosen.var() + 1e-8).sqrt(), mask_bt)


def _spread(rewards_b: Tensor, scored_b: Tensor, index_b: Tensor, count: int) -> Tensor:
    """Largest minus smallest scored reward of each completion's group. [B]."""
    infinity = float("inf")
    high_g = rewards_b.new_full((count,), -infinity).scatter_reduce(
        0, index_b, torch.where(scored_b > 0, rewards_b, -infinity), "amax"
    )
    low_g = rewards_b.new_full((count,), infinity).scatter_reduce(
        0, index_b, torch.where(scored_b > 0, rewards_b, infinity), "amin"
    )
    return (high_g - low_g)[index_b]
