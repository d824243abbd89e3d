"""Plain-numpy writing of supervised, preference and distillation objectives: loops over rows and tokens, no masks, no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator
from reference_terms import Array, Made, kl, numbers, ragged_mask, sigma, slope, softmax

# -- supervised ------------------------------------------------------------------------------------------------------------


def sft_ce(rng: Generator) -> Made:
    logits, labels = numbers(rng, 3, 5, 4), rng.integers(0, 4, (3, 5))
    labels[rng.random((3, 5)) < 0.4] = -100
    labels[2] = -100 if rng.random() < 0.5 else labels[2]

    def rows(z: Array) -> list[list[float]]:
        return [[-math.log(softmax(z[b, t])[labels[b, t + 1]]) for t in range(4) if labels[b, t + 1] >= 0] for b in range(3)]

    found = rows(logits)
    count, full = sum(map(len, found)), [row for row in found if row]
    total = sum(map(sum, found))
    logp = [
        [math.log(softmax(logits[b, t])[labels[b, t + 1]]) if labels[b, t + 1] >= 0 else 0.0 for t in range(4)] for b in range(3)
    ]
    expected = {
        "token_logps": logp,
        "loss_sum": total,
        "n_tokens": count,
        "loss_token_mean": total / max(count, 1),
        "loss_seq_mean_token_mean": sum(sum(row) / len(row) for row in full) / max(len(full), 1),
        "loss_seq_mean_token_sum": total / max(len(full), 1),
        "grad_logits_token_mean": slope(lambda z: sum(map(sum, rows(z))) / max(count, 1), logits),
    }
    return {"logits": logits, "labels": labels}, {}, expected


def sft_accum(rng: Generator) -> Made:
    micro = [(float(rng.random() * 9), int(rng.integers(0, 9))) for _ in range(4)]
    micro = [(total if count else 0.0, count) for total, count in micro]
    tokens = max(sum(count for _, count in micro), 1)
    expected = {
        "global_token_mean": sum(total for total, _ in micro) / tokens,
        "mean_of_micro_means": sum(total / max(count, 1) for total, count in micro) / 4,
        "micro_losses_scaled": [total / tokens for total, _ in micro],
    }
    return {"micro": [{"loss_sum": total, "n_tokens": count} for total, count in micro]}, {}, expected


def packing(rng: Generator) -> Made:
    lengths = [int(n) for n in rng.integers(1, 4, 3)]
    size = sum(lengths)
    q, k, v = (numbers(rng, size, 2) for _ in range(3))
    labels = rng.integers(0, 9, size)
    segment = [index for index, n in enumerate(lengths) for _ in range(n)]
    position = [t for n in lengths for t in range(n)]

    def attend(keys: Callable[[int], list[int]]) -> list[Array]:
        return [softmax([q[i] @ k[j] / math.sqrt(2) for j in keys(i)]) @ v[keys(i)] for i in range(size)]

    expected = {
        "segment_ids": segment,
        "position_ids": position,
        "cu_seqlens": [0, *itertools.accumulate(lengths)],
        "max_seqlen": max(lengths),
        "allowed": [[int(j <= i and segment[i] == segment[j]) for j in range(size)] for i in range(size)],
        "attn_out": attend(lambda i: [j for j in range(i + 1) if segment[j] == segment[i]]),
        "attn_out_wrong_plain_causal": attend(lambda i: list(range(i + 1))),
        "labels_with_segment_starts_ignored": [-100 if t == 0 else int(label) for t, label in zip(position, labels, strict=True)],
        "n_supervised": size - 3,
    }
    return {"lengths": lengths, "q": q, "k": k, "v": v, "labels": labels}, {}, expected


def lora(rng: Generator) -> Made:
    weight, down, up, x = numbers(rng, 3, 4), numbers(rng, 2, 4), numbers(rng, 3, 2), numbers(rng, 5, 4)
    stabilised, alpha = bool(rng.random() < 0.5), float(rng.integers(1, 9))
    scale = alpha / (math.sqrt(2) if stabilised else 2)
    merged = weight + scale * up @ down
    expected = {
        "scaling": scale,
        "delta_W": merged - weight,
        "y": x @ merged.T,
        "W_merged": merged,
        "n_trainable": 14,
        "n_full": 12,
    }
    return {"W": weight, "A": down, "B": up, "x": x}, {"alpha": alpha, "rslora": stabilised}, expected


def multi_lora(rng: Generator) -> Made:
    weight, x = numbers(rng, 2, 3), numbers(rng, 6, 3)
    adapters = [
        {"A": numbers(rng, rank, 3), "B": numbers(rng, 2, rank), "alpha": float(rng.integers(1, 9))} for rank in (1, 2, 3)
    ]
    ids = [int(i) for i in rng.integers(-1, 3, 6)]
    deltas = [np.zeros((2, 3)) if i < 0 else adapters[i]["alpha"] / (i + 1) * adapters[i]["B"] @ adapters[i]["A"] for i in ids]
    y = [(weight + delta) @ row for delta, row in zip(deltas, x, strict=True)]
    return {"W": weight, "adapters": adapters, "x": x, "adapter_ids": ids}, {}, {"y": y}


# -- preference ------------------------------------------------------------------------------------------------------------


def vote_preference(rng: Generator) -> Made:
    n = int(rng.integers(1, 9))
    wins, delta = int(rng.integers(0, n + 1)), float(rng.normal())
    p, smooth = wins / n, (wins + 1) / (n + 2)
    gap: float | str = "inf" if wins == n else "-inf" if wins == 0 else math.log(p / (1 - p))
    loss = -p * math.log(sigma(delta)) - (1 - p) * math.log(sigma(-delta))
    expected = {"p_hat": p, "p_laplace": smooth, "bt_reward_gap": gap, "soft_label_loss": loss}
    return {"wins": wins, "n": n, "delta": delta}, {}, expected | {"bt_reward_gap_laplace": math.log(smooth / (1 - smooth))}


def reward_bt(rng: Generator) -> Made:
    chosen, rejected = numbers(rng, 4), numbers(rng, 4)
    margin = np.abs(numbers(rng, 4)) if rng.random() < 0.5 else None
    center = float(rng.choice([0, 0.01, 0.3]))

    def loss(c: Array, r: Array) -> float:
        gap = c - r - (0 if margin is None else margin)
        return float(np.mean(-np.log(sigma(gap))) + center * np.mean((c + r) ** 2))

    expected = {
        "loss": loss(chosen, rejected),
        "prob_chosen": sigma(chosen - rejected),
        "accuracy": float(np.mean(chosen > rejected)),
        "grad_chosen": slope(lambda c: loss(c, rejected), chosen),
        "grad_rejected": slope(lambda r: loss(chosen, r), rejected),
    }
    inputs = {"chosen": chosen, "rejected": rejected} | ({} if margin is None else {"margin": margin})
    return inputs, {"center": center} | ({"margin": None} if margin is None else {}), expected


def reward_kwise(rng: Generator) -> Made:
    rewards = numbers(rng, 5)
    pairs = [-math.log(sigma(rewards[i] - rewards[j])) for i in range(5) for j in range(i + 1, 5)]
    return {"rewards_best_to_worst": rewards}, {}, {"loss": sum(pairs) / 10}


def kl_rlhf(rng: Generator) -> Made:
    ref, pi, rewards, beta = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4)), numbers(rng, 4), 0.3 + float(rng.random())
    z = sum(p * math.exp(r / beta) for p, r in zip(ref, rewards, strict=True))
    best = ref * np.exp(rewards / beta) / z
    expected = {
        "pi_star": best,
        "log_Z": math.log(z),
        "J_star": beta * math.log(z),
        "J_pi": float(pi @ rewards) - beta * kl(pi, ref),
        "kl_pi_ref": kl(pi, ref),
        "gap_beta_kl_pi_pistar": beta * kl(pi, best),
        "implicit_reward_check": rewards,
    }
    return {"ref": ref, "rewards": rewards, "pi": pi}, {"beta": beta}, expected


def kl_exact(rng: Generator) -> Made:
    p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    d = np.log(p / q)
    expected = {"kl_p_q": kl(p, q), "kl_q_p": kl(q, p), "E_k1": p @ d, "E_k2": p @ d**2 / 2, "E_k3": p @ (np.exp(-d) - 1 + d)}
    return {"p": p, "q": q}, {}, expected


def kl_estimators(rng: Generator) -> Made:
    logp, ref = -np.abs(numbers(rng, 2, 3)), -np.abs(numbers(rng, 2, 3))
    lengths, mask = ragged_mask(rng, 2, 3)
    forms: dict[str, Callable[[float], float]] = {
        "k1": lambda d: d,
        "k2": lambda d: d * d / 2,
        "k3": lambda d: math.exp(-d) - 1 + d,
    }
    expected: dict[str, Any] = {}
    for name, form in forms.items():

        def mean(x: Array, form: Callable[[float], float] = form) -> float:
            return sum(form(x[b, t] - ref[b, t]) for b, n in enumerate(lengths) for t in range(n)) / sum(lengths)

        expected |= {f"{name}_mean": mean(logp), f"grad_{name}": slope(mean, logp)}
    return {"logp": logp, "ref_logp": ref, "mask": mask}, {}, expected


def dpo(rng: Generator) -> Made:
    pc, pr, rc, rr = (-10 * np.round(rng.random(4), 3) - 1 for _ in range(4))
    nc, nr = rng.integers(1, 9, 4), rng.integers(1, 9, 4)
    beta, smoothing, gamma = 0.1 + float(rng.random()), float(rng.choice([0, 0.1, 0.3])), float(rng.choice([0, 0.7]))

    def sig(x: Any) -> Any:
        return -np.log(sigma(x))

    h, mean_h = pc - rc - pr + rr, (pc - rc) / nc - (pr - rr) / nr
    per_pair = {
        "sigmoid": sig(beta * h),
        "cdpo": (1 - smoothing) * sig(beta * h) + smoothing * sig(-beta * h),
        "robust": ((1 - smoothing) * sig(beta * h) - smoothing * sig(-beta * h)) / (1 - 2 * smoothing),
        "hinge": np.maximum(0, 1 - beta * h),
        "ipo_sum": (h - 1 / (2 * beta)) ** 2,
        "ipo_mean": (mean_h - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": sig(beta * mean_h),
        "simpo": sig(beta * (pc / nc - pr / nr) - gamma),
    }
    expected = {
        "logit_margin": h,
        "chosen_reward": beta * (pc - rc),
        "rejected_reward": beta * (pr - rr),
        "reward_accuracy": float(np.mean(pc - rc > pr - rr)),
        "losses": {name: {"per_pair": values, "mean": values.mean()} for name, values in per_pair.items()},
        "grad_chosen_logp_sigmoid": -beta / 4 * sigma(-beta * h),
        "grad_rejected_logp_sigmoid": beta / 4 * sigma(-beta * h),
    }
    inputs = {"pc": pc, "pr": pr, "rc": rc, "rr": rr, "nc": nc, "nr": nr}
    return inputs, {"beta": beta, "label_smoothing": smoothing, "simpo_gamma": gamma}, expected


def dpo_from_logits(rng: Generator) -> Made:
    policy, ref, labels = numbers(rng, 4, 5, 3), numbers(rng, 4, 5, 3), rng.integers(0, 3, (4, 5))
    labels[:, 0] = -100
    labels[rng.random((4, 5)) < 0.3] = -100

    def sums(z: Array) -> Array:
        return np.array(
            [sum(math.log(softmax(z[b, t])[labels[b, t + 1]]) for t in range(4) if labels[b, t + 1] >= 0) for b in range(4)]
        )

    gap = sums(policy) - sums(ref)
    h = gap[:2] - gap[2:]
    losses = {"sigmoid": {"per_pair": -np.log(sigma(0.2 * h))}}
    expected = {"logit_margin": h, "losses": losses, "policy_logps": sums(policy), "ref_logps": sums(ref)}
    lengths = [[int(label) >= 0 for label in row[1:]].count(True) for row in labels]
    return (
        {"policy_logits": policy, "ref_logits": ref, "labels": labels},
        {"beta": 0.2},
        expected | {"completion_lengths": lengths},
    )


def orpo(rng: Generator) -> Made:
    chosen, rejected, nll, lam = -0.05 - 2 * rng.random(3), -0.05 - 2 * rng.random(3), float(rng.random()), 0.3
    odds_w, odds_l = np.exp(chosen) / (1 - np.exp(chosen)), np.exp(rejected) / (1 - np.exp(rejected))

    def loss(c: Array, r: Array) -> float:
        log_or = (c - r) - (np.log(1 - np.exp(c)) - np.log(1 - np.exp(r)))
        return nll + lam * float(np.mean(-np.log(sigma(log_or))))

    expected = {
        "odds_w": odds_w,
        "odds_l": odds_l,
        "log_odds_ratio": np.log(odds_w / odds_l),
        "loss_or": -np.log(sigma(np.log(odds_w / odds_l))),
        "loss": loss(chosen, rejected),
        "grad_mean_logp_chosen": slope(lambda c: loss(c, rejected), chosen),
        "grad_mean_logp_rejected": slope(lambda r: loss(chosen, r), rejected),
    }
    return {"mean_logp_chosen": chosen, "mean_logp_rejected": rejected, "nll_chosen": nll}, {"lam": lam}, expected


def kto(rng: Generator) -> Made:
    ratios, desirable, mismatched = numbers(rng, 5), rng.integers(0, 2, 5), numbers(rng, 3)
    z0 = max(0.0, float(mismatched.mean()))
    rows = [
        1.5 * (1 - sigma(0.4 * (r - z0))) if d else 0.8 * (1 - sigma(0.4 * (z0 - r)))
        for r, d in zip(ratios, desirable, strict=True)
    ]
    inputs = {"logratios": ratios, "desirable": desirable, "kl_pair_logratios": mismatched}
    return inputs, {"beta": 0.4, "lambda_d": 1.5, "lambda_u": 0.8}, {"z0": z0, "per_example": rows, "loss": float(np.mean(rows))}


# -- distillation and retrieval --------------------------------------------------------------------------------------------


def kd_logits(rng: Generator) -> Made:
    student, teacher, targets = numbers(rng, 2, 3, 4), numbers(rng, 2, 3, 4), rng.integers(0, 4, (2, 3))
    lengths, mask = ragged_mask(rng, 2, 3)
    tau, beta, alpha = 1.7, 0.3, 0.4
    places = [(b, t) for b, n in enumerate(lengths) for t in range(n)]

    def mean(divergence: Callable[[Array, Array], float], z: Array) -> float:
        return sum(divergence(softmax(teacher[p] / tau), softmax(z[p] / tau)) for p in places) / len(places)

    def jsd(p_t: Array, p_s: Array) -> float:
        mixture = beta * p_t + (1 - beta) * p_s
        return beta * kl(p_t, mixture) + (1 - beta) * kl(p_s, mixture)

    forward = mean(kl, student)
    hard = sum(-math.log(softmax(student[p])[targets[p]]) for p in places) / len(places)
    expected = {
        "forward_kl": forward,
        "reverse_kl": mean(lambda p_t, p_s: kl(p_s, p_t), student),
        "forward_kl_times_T2": forward * tau**2,
        "jsd_beta": mean(jsd, student),
        "hard_ce": hard,
        "hinton_total": alpha * tau**2 * forward + (1 - alpha) * hard,
        "grad_student_logits_forward": slope(lambda z: mean(kl, z), student),
    }
    inputs = {"student_logits": student, "teacher_logits": teacher, "mask": mask, "hard_targets": targets}
    return inputs, {"temperature": tau, "jsd_beta": beta, "alpha": alpha}, expected


def kd_probs(rng: Generator) -> Made:
    teacher, student = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4))
    return (
        {"teacher": teacher, "student": student},
        {},
        {"forward_kl": kl(teacher, student), "reverse_kl": kl(student, teacher)},
    )


def proxy_kd(rng: Generator) -> Made:
    loglik, divergence, nll = 5 * numbers(rng, 5), np.abs(numbers(rng, 5)), np.abs(numbers(rng, 5))
    weights = sigma((loglik - loglik.mean()) / loglik.std())
    expected = {
        "weights": weights,
        "weighted_kl": np.mean(weights * divergence),
        "loss": np.mean(nll) + 3 * np.mean(weights * divergence),
    }
    return {"proxy_loglik": loglik, "kl_per_sample": divergence, "nll_per_sample": nll}, {"alpha": 3.0}, expected


def rag(rng: Generator) -> Made:
    docs, tokens = rng.dirichlet(np.ones(3)), rng.random((3, 4))
    sequence = sum(p * np.prod(row) for p, row in zip(docs, tokens, strict=True))
    token = np.prod([docs @ tokens[:, t] for t in range(4)])
    expected = {"rag_sequence": sequence, "rag_token": token, "nll_sequence": -np.log(sequence), "nll_token": -np.log(token)}
    return {"doc_probs": docs, "token_probs": tokens}, {}, expected


def constrained_step(rng: Generator) -> Made:
    logits, allowed, tau = numbers(rng, 6), sorted(int(i) for i in rng.choice(6, 3, replace=False)), 0.5 + float(rng.random())
    p = softmax(logits / tau)
    mass = sum(p[allowed])
    probs = [p[v] / mass if v in allowed else 0.0 for v in range(6)]
    expected = {"probs": probs, "legal_mass": mass, "log_legal_mass": math.log(mass)}
    return {"logits": logits, "allowed": allowed}, {"temperature": tau}, expected


def prm_ce(rng: Generator) -> Made:
    logits, labels = numbers(rng, 2, 5, 3), rng.integers(0, 3, (2, 5))
    labels[rng.random((2, 5)) < 0.5] = -100
    losses = [-math.log(softmax(logits[p])[labels[p]]) for p in np.ndindex(2, 5) if labels[p] >= 0]
    return {"logits": logits, "labels": labels}, {}, {"loss": sum(losses) / max(len(losses), 1), "n_steps": len(losses)}
