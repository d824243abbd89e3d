"""Distillation: divergences between teacher and student distributions, per token and reduced.

Student and teacher logits have one shape [..., V] over one vocabulary (cut padded columns first) and are aligned with the mask;
the teacher is a constant; p_T = softmax(z_T / tau), p_S = softmax(z_S / tau).

Sources: Hinton et al. 2015, section 2; Romero et al. 2015 (FitNets); Agarwal et al. 2023 eq. 1 (JSD), algorithm 1; Chen et al. 2024
(Proxy-KD); TRL gkd_trainer.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from posttrain.objectives.reductions import seq_mean
from posttrain.objectives.tensors import Objective, divide, masked, same_shape, wide


def forward_kl_tokens(student_logits_nv: Tensor, teacher_logits_nv: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p_T || p_S) = sum_v p_T (log p_T - log p_S): mean-seeking. [..., V] x 2 -> [...]. Gradient (p_S - p_T) / tau per logit."""
    student, teacher = _log_probs(student_logits_nv, teacher_logits_nv, temperature)
    return _kl(teacher, student)


def reverse_kl_tokens(student_logits_nv: Tensor, teacher_logits_nv: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p_S || p_T): mode-seeking. [..., V] x 2 -> [...]."""
    student, teacher = _log_probs(student_logits_nv, teacher_logits_nv, temperature)
    return _kl(student, teacher)


def jsd_tokens(student_logits_nv: Tensor, teacher_logits_nv: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """JSD_beta = beta KL(p_T || M) + (1 - beta) KL(p_S || M), M = beta p_T + (1 - beta) p_S. [..., V] x 2 -> [...].

    At the ends, where it would vanish, the code of the paper switches and so does this: beta 0 is the forward KL, 1 the reverse.
    """
    assert 0 <= beta <= 1, f"beta lies in [0, 1], got {beta}"
    student, teacher = _log_probs(student_logits_nv, teacher_logits_nv, temperature)
    if beta in (0, 1):
        return _kl(teacher, student) if beta == 0 else _kl(student, teacher)
    weights = torch.tensor([beta, 1 - beta], dtype=student.dtype, device=student.device).log()
    mixture = torch.logaddexp(teacher + weights[0], student + weights[1])
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def hinton_tokens(
    student_logits_nv: Tensor, teacher_logits_nv: Tensor, targets_n: Tensor, temperature: float, alpha: float
) -> Tensor:
    """alpha tau^2 KL(p_T || p_S) + (1 - alpha) CE(target) with the hard term at tau = 1. [..., V] x 2, [...] -> [...].

    tau^2 keeps the size of the soft gradient, which falls as 1/tau^2. A target below 0 means none: its hard term is 0.
    """
    soft_n = forward_kl_tokens(student_logits_nv, teacher_logits_nv, temperature)
    return alpha * temperature**2 * soft_n + (1 - alpha) * hard_ce_tokens(student_logits_nv, targets_n)


def hard_ce_tokens(student_logits_nv: Tensor, targets_n: Tensor) -> Tensor:
    """-log p_S(target) at tau = 1, 0 where the target is below 0. [..., V], [...] -> [...]."""
    same_shape(student_logits_nv[..., 0], targets_n)
    flat = torch.where(targets_n < 0, -100, targets_n).flatten()
    return cross_entropy(wide(student_logits_nv).flatten(0, -2), flat, reduction="none").view(targets_n.shape)


def state_distance_tokens(student_states_td: Tensor, teacher_states_td: Tensor) -> Tensor:
    """|h_S - h_T|^2 / |h_T|^2 at each position: a hint (FitNets eq. 3; Jiao et al. 2020, TinyBERT, eq. 8), without a projection since both
    have one width, and relative to the teacher's state, so that layers whose states differ in size count alike. [..., D] x 2 -> [...]."""
    same_shape(student_states_td, teacher_states_td)
    student, teacher = wide(student_states_td), wide(teacher_states_td).detach()
    return divide((student - teacher).square().sum(-1), teacher.square().sum(-1))


def forward_kl(
    student_logits_nv: Tensor,
    teacher_logits_nv: Tensor,
    weight_n: Tensor,
    temperature: float = 1.0,
    *,
    normaliser: float | None = None,
) -> Objective:
    """L = sum_n w KL(p_T || p_S) / N, token mean over the global batch; N = global sum of w. [N, V] x 2, [N] -> [].

    No tau^2: ask `hinton_tokens` for it. Positions of weight 0 may hold anything. Metrics: `tokens`, `kl_sum`.
    """
    same_shape(student_logits_nv[..., 0], weight_n)
    kl_n = forward_kl_tokens(*_only_learned(student_logits_nv, teacher_logits_nv, weight_n), temperature)
    return reduce_tokens(kl_n, weight_n, normaliser=normaliser)


def reduce_tokens(values_n: Tensor, weight_n: Tensor, *, normaliser: float | None = None) -> Objective:
    """sum_n w L / N for any of the token divergences, N = global sum of w. [...] x 2 -> []. Metrics: `tokens`, `kl_sum`."""
    same_shape(values_n, weight_n)
    total = (masked(values_n, weight_n) * weight_n).sum()
    loss = divide(total, weight_n.sum() if normaliser is None else normaliser)
    return loss, {"tokens": (weight_n > 0).sum(), "kl_sum": total.detach()}


def proxy_weights(proxy_loglik_b: Tensor) -> Tensor:
    """Proxy-KD: w = sigma((log p_proxy - mean) / std) over the batch, population std, detached; 1/2 where all are equal. [B] -> [B]."""
    loglik_b = wide(proxy_loglik_b).detach()
    return torch.sigmoid(divide(loglik_b - loglik_b.mean(), loglik_b.std(correction=0)))


def proxy_kd(proxy_loglik_b: Tensor, kl_b: Tensor, nll_b: Tensor, alpha: float, *, normaliser: float | None = None) -> Objective:
    """L = mean NLL + alpha mean w KL(p_proxy || p_S), w = `proxy_weights`. [B] each -> []. Metric `weighted_kl` (share)."""
    same_shape(proxy_loglik_b, kl_b, nll_b, rank=1)
    weighted = seq_mean(proxy_weights(proxy_loglik_b) * wide(kl_b), normaliser=normaliser)
    return seq_mean(wide(nll_b), normaliser=normaliser) + alpha * weighted, {"weighted_kl": weighted.detach()}


def _log_probs(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    same_shape(student_logits, teacher_logits)
    assert temperature > 0, f"temperature must be positive, got {temperature}"
    return (wide(student_logits) / temperature).log_softmax(-1), (wide(teacher_logits).detach() / temperature).log_softmax(-1)


def _kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    """KL(p || q) over the last axis; 0 log 0 = 0. A token that p forbids is replaced first, so that no gradient is NaN."""
    possible = p_log > -torch.inf
    difference = torch.where(possible, p_log, 0.0) - torch.where(possible, q_log, 0.0)
    return torch.where(possible, p_log.exp() * difference, 0.0).sum(-1)


def _only_learned(student: Tensor, teacher: Tensor, weight_n: Tensor) -> tuple[Tensor, Tensor]:
    learned = weight_n[..., None]
    return masked(student, learned), masked(teacher, learned)
