"""Plain-numpy writing of advantages and policy losses: loops over rows and tokens, no masks, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator
from reference_terms import Array, Made, numbers, ragged_mask, slope

# -- policies --------------------------------------------------------------------------------------------------------------


def rloo(rng: Generator) -> Made:
    rewards, logp, old, drift = numbers(rng, 4), numbers(rng, 4) - 3, numbers(rng, 4) - 3, np.abs(numbers(rng, 4))
    shaped = rewards - 0.1 * drift
    baselines = np.array([np.mean(np.delete(shaped, i)) for i in range(4)])
    a, ratio = shaped - baselines, np.exp(logp - old)
    clipped = [-min(r * x, min(max(r, 0.7), 1.3) * x) for r, x in zip(ratio, a, strict=True)]
    expected = {"shaped_rewards": shaped, "baselines": baselines, "advantages": a, "reinforce_loss": -np.mean(a * logp)}
    expected |= {"grad_logp": -a / 4, "ratio": ratio, "clipped_loss": np.mean(clipped)}
    return {"rewards": rewards, "logp_sum": logp, "old_logp_sum": old, "kl_seq": drift}, {"beta": 0.1, "eps": 0.3}, expected


def _gae_row(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    deltas = [r + gamma * (values[t + 1] if t + 1 < len(values) else 0) - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (j - t) * deltas[j] for j in range(t, len(deltas))) for t in range(len(deltas))]


def gae(rng: Generator) -> Made:
    rewards, values, mask = numbers(rng, 3, 5), numbers(rng, 3, 5), (rng.random((3, 5)) < 0.7).astype(float)
    mask[0] = 1
    advantages, returns = np.zeros((3, 5)), np.zeros((3, 5))
    for b in range(3):
        places = [t for t in range(5) if mask[b, t]]
        for t, a in zip(places, _gae_row(list(rewards[b, places]), list(values[b, places]), 0.9, 0.8), strict=True):
            advantages[b, t], returns[b, t] = a, a + values[b, t]
    real = advantages[mask > 0]
    whitened = np.where(mask > 0, (advantages - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8), 0)
    params = {"gamma": 0.9, "lam": 0.8}
    return (
        {"rewards": rewards, "values": values, "mask": mask},
        params,
        {"advantages": advantages, "returns": returns, "whitened": whitened},
    )


def kl_reward_shaping(rng: Generator) -> Made:
    score, logp, ref = numbers(rng, 3), numbers(rng, 3, 4) - 2, numbers(rng, 3, 4) - 2
    lengths, mask = ragged_mask(rng, 3, 4)
    estimator = str(rng.choice(["k1", "k3"]))
    rewards = np.zeros((3, 4))
    for b, n in enumerate(lengths):
        for t in range(n):
            d = logp[b, t] - ref[b, t]
            rewards[b, t] = -0.2 * (d if estimator == "k1" else math.exp(-d) - 1 + d) + (score[b] if t == n - 1 else 0)
    inputs = {"score": score, "logp": logp, "ref_logp": ref, "lengths": lengths}
    return inputs, {"beta": 0.2, "estimator": estimator}, {"rewards": rewards, "mask": mask}


def _surrogate(ratio: float, advantage: float, low: float, high: float) -> float:
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def ppo_clip(rng: Generator) -> Made:
    old, advantages = numbers(rng, 2, 4) - 2, numbers(rng, 2, 4)
    logp = np.round(old + 0.3 * rng.normal(size=(2, 4)), 3)
    lengths, mask = ragged_mask(rng, 2, 4)
    cap = float(rng.choice([1.05, 3])) if rng.random() < 0.5 else None
    places = [(b, t) for b, n in enumerate(lengths) for t in range(n)]

    def token(x: Array, b: int, t: int) -> float:
        plain = _surrogate(math.exp(x[b, t] - old[b, t]), advantages[b, t], 0.1, 0.2)
        return min(plain, -cap * advantages[b, t]) if cap is not None and advantages[b, t] < 0 else plain

    def loss(x: Array) -> float:
        return sum(token(x, b, t) for b, t in places) / len(places)

    clipped = [
        _surrogate(math.exp(logp[p] - old[p]), advantages[p], 0.1, 0.2) > -math.exp(logp[p] - old[p]) * advantages[p] + 1e-12
        for p in places
    ]
    expected = {
        "token_loss": [[token(logp, b, t) if t < n else 0.0 for t in range(4)] for b, n in enumerate(lengths)],
        "loss": loss(logp),
        "clipfrac": sum(clipped) / len(places),
        "approx_kl_k1": sum(old[p] - logp[p] for p in places) / len(places),
        "grad_logp": slope(loss, logp),
    }
    return (
        {"logp": logp, "old_logp": old, "advantages": advantages, "mask": mask},
        {"eps_low": 0.1, "eps_high": 0.2, "dual_clip": cap},
        expected,
    )


def ppo_value(rng: Generator) -> Made:
    values, old, returns = numbers(rng, 2, 4), numbers(rng, 2, 4), numbers(rng, 2, 4)
    lengths, mask = ragged_mask(rng, 2, 4)
    places = [(b, t) for b, n in enumerate(lengths) for t in range(n)]
    plain = [(values[p] - returns[p]) ** 2 for p in places]
    moved = [(min(max(values[p], old[p] - 0.3), old[p] + 0.3) - returns[p]) ** 2 for p in places]
    expected = {
        "loss": sum(map(max, plain, moved)) / (2 * len(places)),
        "loss_unclipped": sum(plain) / (2 * len(places)),
        "clipfrac": sum(b > a for a, b in zip(plain, moved, strict=True)) / len(places),
    }
    return {"values": values, "old_values": old, "returns": returns, "mask": mask}, {"eps": 0.3}, expected


def grpo_advantage(rng: Generator) -> Made:
    rewards = np.round(rng.random(5), 1) if rng.random() < 0.8 else np.full(5, 0.3)
    centred, sample, population = rewards - rewards.mean(), rewards.std(ddof=1), rewards.std()
    expected = {"mean": rewards.mean(), "std_sample": sample, "std_population": population, "adv_centered": centred}
    expected |= {"adv_std_sample": centred / (sample + 0.01), "adv_std_population": centred / (population + 0.01)}
    return {"rewards": rewards}, {"eps": 0.01}, expected


def group_policy_loss(rng: Generator) -> Made:
    old, ref = numbers(rng, 5, 4) - 2, numbers(rng, 5, 4) - 2
    logp, advantages, groups = np.round(old + 0.3 * rng.normal(size=(5, 4)), 3), numbers(rng, 5), [1, 0, 1, 7, 0]
    lengths, mask = ragged_mask(rng, 5, 4)
    beta = 0.3 if rng.random() < 0.6 else 0.0

    def row(x: Array, b: int) -> list[float]:
        tokens = []
        for t in range(lengths[b]):
            d = x[b, t] - ref[b, t]
            tokens.append(_surrogate(math.exp(x[b, t] - old[b, t]), advantages[b], 0.2, 0.28) + beta * (math.exp(-d) - 1 + d))
        return tokens

    def group_mean(x: Array) -> float:
        by_group = {g: [value for b in range(5) if groups[b] == g for value in row(x, b)] for g in groups}
        return sum(sum(values) / max(len(values), 1) for values in by_group.values()) / len(by_group)

    losses: dict[str, Callable[[Array], float]] = {
        "seq_mean_token_mean": lambda x: sum(sum(row(x, b)) / max(lengths[b], 1) for b in range(5)) / 5,
        "token_mean": lambda x: sum(sum(row(x, b)) for b in range(5)) / sum(lengths),
        "group_token_mean": group_mean,
        "const": lambda x: sum(sum(row(x, b)) for b in range(5)) / (5 * 6),
    }
    expected: dict[str, Any] = {name: {"loss": loss(logp), "grad_logp": slope(loss, logp)} for name, loss in losses.items()}
    expected["ratio"] = np.exp(logp - old) * mask
    expected["token_loss"] = [row(logp, b) + [0.0] * (4 - lengths[b]) for b in range(5)]
    inputs = {
        "logp": logp,
        "old_logp": old,
        "ref_logp": ref if beta else None,
        "advantages": advantages,
        "mask": mask,
        "group_ids": groups,
    }
    return inputs, {"eps_low": 0.2, "eps_high": 0.28, "beta": beta, "max_len": 6}, expected


def overlong_penalty(rng: Generator) -> Made:
    lengths, limit, cache = [int(n) for n in rng.integers(0, 60, 9)], 40, 15
    penalty = [0.0 if n <= 25 else (25 - n) / 15 if n <= 40 else -1.0 for n in lengths]
    return {"lengths": lengths}, {"max_len": limit, "cache": cache}, {"penalty": penalty}


def gspo(rng: Generator) -> Made:
    old, advantages = numbers(rng, 3, 4) - 2, numbers(rng, 3)
    logp = np.round(old + 0.2 * rng.normal(size=(3, 4)), 3)
    lengths, mask = ragged_mask(rng, 3, 4)

    def s(x: Array, b: int) -> float:
        return math.exp(sum(x[b, t] - old[b, t] for t in range(lengths[b])) / max(lengths[b], 1))

    def loss(x: Array) -> float:
        return sum(_surrogate(s(x, b), advantages[b], 0.05, 0.1) for b in range(3)) / 3

    expected = {"seq_ratio": [s(logp, b) for b in range(3)], "loss": loss(logp), "grad_logp": slope(loss, logp)}
    return {"logp": logp, "old_logp": old, "advantages": advantages, "mask": mask}, {"eps_low": 0.05, "eps_high": 0.1}, expected


def luffy(rng: Generator) -> Made:
    logp, rewards, external = -np.abs(numbers(rng, 4, 3)) - 0.1, rng.integers(0, 2, 4).astype(float), [0, 0, 1, 1]
    old = np.round(logp + 0.3 * rng.normal(size=(4, 3)), 3)
    lengths, mask = ragged_mask(rng, 4, 3)
    clip, use_std = (0.2 if rng.random() < 0.5 else None), bool(rng.random() < 0.5)
    a = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4 if use_std else 1)

    def total(x: Array) -> float:
        loss = 0.0
        for b, n in enumerate(lengths):
            for t in range(n):
                p, ratio = math.exp(x[b, t]), math.exp(x[b, t] - old[b, t])
                own = -ratio * a[b] if clip is None else _surrogate(ratio, a[b], clip, clip)
                loss += -p / (p + 0.2) * a[b] if external[b] else own
        return loss

    p, off = np.exp(logp), mask * np.array(external)[:, None]
    expected = {
        "advantages": a,
        "shaped_weight": p / (p + 0.2) * off,
        "grad_coefficient_off": 0.2 * p / (p + 0.2) ** 2 * off,
        "loss_token_total": total(logp) / sum(lengths),
        "loss_const": total(logp) / (4 * 5),
        "grad_logp_token_total": slope(lambda x: total(x) / sum(lengths), logp),
    }
    inputs = {"logp": logp, "old_logp": old, "mask": mask, "off_policy": external, "rewards": rewards}
    return inputs, {"gamma": 0.2, "max_len": 5, "on_policy_clip": clip, "use_std": use_std}, expected
