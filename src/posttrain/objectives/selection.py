"""Choosing among samples: how likely one of K is right, which to keep for training, and which to answer with.

Sources: Chen et al. 2021 (pass@k), openai/human-eval; Zelikman et al. 2022 (STaR); Singh et al. 2023 (ReST-EM); Lightman et al.
2023, Wang et al. 2023 (process scores); Gao et al. 2022 (best-of-N KL).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from posttrain.objectives.supervised import IGNORED
from posttrain.objectives.tensors import Objective, divide, wide


def best_of_k_prob(p: float, k: int) -> float:
    """1 - (1 - p)^K: at least one of K samples is right, for a *known* p. For an estimated p use `pass_at_k`."""
    assert 0 <= p <= 1 and k >= 1, f"p = {p}, K = {k}"
    return 1 - (1 - p) ** k


def best_of_n_kl_bound(n: int) -> float:
    """KL of best-of-N sampling from its base is at most ln N - (N - 1)/N."""
    assert n >= 1, f"N = {n}"
    return math.log(n) - (n - 1) / n


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate from n samples with c right: 1 - C(n-c, k) / C(n, k) = 1 - prod_{i=n-c+1..n} (1 - k/i); 1 if n - c < k.

    Plugging c/n into `best_of_k_prob` is biased low. Average over problems after this, not before.
    """
    assert 0 <= c <= n and 1 <= k <= n, f"n = {n}, c = {c}, k = {k}: needs c <= n and k <= n"
    return 1.0 if n - c < k else 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))


@dataclass(frozen=True, slots=True)
class StepScores:
    """One score for a solution from its step probabilities, by name. `product` (log space) is the default for ranking; `total`
    rewards length and never ranks solutions of different length."""

    minimum: float
    product: float
    log_product: float
    last: float
    mean: float
    total: float


def aggregate_steps(scores_k: Sequence[float]) -> StepScores:
    """p_t = P(step t right), K of them -> `StepScores`. A zero gives log_product -inf."""
    assert scores_k, "a solution has at least one step"
    log_product = sum(math.log(score) if score > 0 else -math.inf for score in scores_k)
    total = sum(scores_k)
    return StepScores(min(scores_k), math.exp(log_product), log_product, scores_k[-1], total / len(scores_k), total)


def process_ce(logits_btc: Tensor, labels_bt: Tensor, *, normaliser: float | None = None) -> Objective:
    """Mean cross-entropy at step-end tokens (label >= 0; -100 elsewhere), *no* shift: a classification head. [B, T, C], [B, T] -> [].

    normaliser = global number of labelled steps. Metric `steps`.
    """
    assert logits_btc.shape[:2] == labels_bt.shape, f"{tuple(logits_btc.shape)} and {tuple(labels_bt.shape)} do not fit"
    labelled_bt = labels_bt != IGNORED
    logits = torch.where(labelled_bt[..., None], wide(logits_btc), 0.0)
    total = cross_entropy(logits.flatten(0, 1), labels_bt.flatten(), ignore_index=IGNORED, reduction="sum")
    return divide(total, labelled_bt.sum() if normaliser is None else normaliser), {"steps": labelled_bt.sum()}


def rollout_labels(outcomes: Sequence[Sequence[float]]) -> tuple[list[int], list[float]]:
    """Math-Shepherd: per step (hard, soft) from N completions of its prefix: any right, and the fraction right."""
    return [int(any(step)) for step in outcomes], [
        sum(1 for value in step if value) / len(step) if step else 0.0 for step in outcomes
    ]


@dataclass(frozen=True, slots=True)
class Selection:
    """What best-of-N and voting choose; None where no sample had an answer. Ties go to the first."""

    best_index: int | None
    weighted_vote: Hashable | None
    weighted_totals: dict[Hashable, float]
    majority: Hashable | None


def best_of_n_select(scores: Sequence[float], answers: Sequence[Hashable | None]) -> Selection:
    """Best-of-N (argmax score), weighted vote (sum of scores per answer) and majority. A sample without answer is no candidate."""
    assert len(scores) == len(answers), f"{len(scores)} scores for {len(answers)} answers"
    candidates = [index for index, answer in enumerate(answers) if answer is not None]
    totals: dict[Hashable, float] = {}
    counts: dict[Hashable, int] = {}
    for index in candidates:
        answer = answers[index]
        totals[answer] = totals.get(answer, 0.0) + scores[index]
        counts[answer] = counts.get(answer, 0) + 1
    return Selection(
        best_index=max(candidates, key=lambda index: scores[index], default=None),
        weighted_vote=_first_largest(totals),
        weighted_totals=totals,
        majority=_first_largest(counts),
    )


@dataclass(frozen=True, slots=True)
class Attempt:
    """One problem's tries: is the greedy answer right, is the one with the gold answer as a hint (None = not tried), and of each
    sample whether it is right and a key by which duplicates are known (its text or token ids)."""

    id: str
    direct_correct: bool
    hinted_correct: bool | None
    samples: tuple[tuple[bool, Hashable], ...]


def star_filter(attempts: Iterable[Attempt]) -> tuple[list[str], list[str]]:
    """STaR: (ids kept as they are, ids kept through the hint), the second only where the direct try failed.

    The hint itself must be taken out of the training example, and the base model is fine-tuned anew each round.
    """
    attempts = list(attempts)
    direct = [attempt.id for attempt in attempts if attempt.direct_correct]
    return direct, [attempt.id for attempt in attempts if not attempt.direct_correct and attempt.hinted_correct]


def rest_em(attempts: Iterable[Attempt], per_problem_cap: int | None = 10) -> list[tuple[str, int]]:
    """ReST-EM's E-step: (id, sample index) of right samples in order, duplicates dropped, at most `per_problem_cap` per problem."""
    kept: list[tuple[str, int]] = []
    for attempt in attempts:
        seen: set[Hashable] = set()
        for index, (correct, key) in enumerate(attempt.samples):
            if correct and key not in seen and (per_problem_cap is None or len(seen) < per_problem_cap):
                seen.add(key)
                kept.append((attempt.id, index))
    return kept


def _first_largest(values: dict[Hashable, float] | dict[Hashable, int]) -> Hashable | None:
    value_of: Callable[[Hashable], float] = values.__getitem__
    return max(values, key=value_of, default=None)  # dicts keep order and max keeps the first
