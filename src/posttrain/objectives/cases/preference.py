"""Cases of section 3: votes, reward models, KL, the DPO family, ORPO, KTO."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.objectives import kl as divergences
from posttrain.objectives import preference, reductions, reward, supervised
from posttrain.objectives.cases.values import Outputs, Values, gradient, integers, leaf, number, tensor


def vote_preference(inputs: Values, params: Values) -> Outputs:
    p, smoothed = (reward.vote_probability(inputs["wins"], inputs["n"], smoothed=flag) for flag in (False, True))
    return {
        "p_hat": p,
        "p_laplace": smoothed,
        "bt_reward_gap": reward.bradley_terry_gap(p),
        "bt_reward_gap_laplace": reward.bradley_terry_gap(smoothed),
        "soft_label_loss": reward.soft_preference(tensor(inputs["delta"]), tensor(p)),
    }


def reward_bt(inputs: Values, params: Values) -> Outputs:
    chosen, rejected = leaf(inputs["chosen"]), leaf(inputs["rejected"])
    margin = inputs.get("margin", params.get("margin"))
    margin_b = None if margin is None else tensor(margin).expand_as(chosen)
    loss, metrics = reward.reward_bt(chosen, rejected, margin_b=margin_b, center=number(params.get("center") or 0))
    return {
        "loss": loss,
        "prob_chosen": torch.sigmoid(chosen - rejected),
        "accuracy": metrics["accuracy"],
        "grad_chosen": gradient(loss, chosen),
        "grad_rejected": gradient(loss, rejected),
    }


def reward_kwise(inputs: Values, params: Values) -> Outputs:
    return {"loss": reward.reward_kwise(tensor(inputs["rewards_best_to_worst"]))[0]}


def kl_rlhf(inputs: Values, params: Values) -> Outputs:
    ref, rewards, pi, beta = tensor(inputs["ref"]), tensor(inputs["rewards"]), tensor(inputs["pi"]), number(params["beta"])
    best, log_z = divergences.optimal_policy(ref, rewards, beta)
    return {
        "pi_star": best,
        "log_Z": log_z,
        "J_star": divergences.regularised_value(best, ref, rewards, beta),
        "J_pi": divergences.regularised_value(pi, ref, rewards, beta),
        "kl_pi_ref": divergences.kl_divergence(pi, ref),
        "gap_beta_kl_pi_pistar": beta * divergences.kl_divergence(pi, best),
        "implicit_reward_check": divergences.implicit_reward(best, ref, beta, log_z),
    }


def kl_net_gain(inputs: Values, params: Values) -> Outputs:
    return {"net": divergences.kl_net_gain(number(inputs["reward_gain"]), number(inputs["kl"]), number(params["beta"]))}


def kl_exact(inputs: Values, params: Values) -> Outputs:
    p, q = tensor(inputs["p"]), tensor(inputs["q"])
    e_k1, e_k2, e_k3 = divergences.estimator_expectations(p, q)
    forward, backward = divergences.kl_divergence(p, q), divergences.kl_divergence(q, p)
    return {"kl_p_q": forward, "kl_q_p": backward, "E_k1": e_k1, "E_k2": e_k2, "E_k3": e_k3}


def kl_estimators(inputs: Values, params: Values) -> Outputs:
    logp, ref, mask = leaf(inputs["logp"]), tensor(inputs["ref_logp"]), tensor(inputs["mask"])
    out: Outputs = {}
    for name, estimator in {"k1": divergences.k1, "k2": divergences.k2, "k3": divergences.k3}.items():
        values = estimator(logp, ref)
        mean = reductions.token_mean(values, mask)
        out |= {name: values, f"{name}_mean": mean, f"grad_{name}": gradient(mean, logp)}
    return out


def dpo(inputs: Values, params: Values) -> Outputs:
    lengths = None
    if inputs.get("nc") is not None:
        lengths = tensor(inputs["nc"]), tensor(inputs["nr"])
    policy = leaf(inputs["pc"]), leaf(inputs["pr"])
    return _dpo_outputs(policy, (tensor(inputs["rc"]), tensor(inputs["rr"])), lengths, params)


def dpo_gap(inputs: Values, params: Values) -> Outputs:
    return {"delta": preference.dpo_gap(tensor(inputs["p_chosen"]).log(), tensor(inputs["p_rejected"]).log())}


def dpo_from_logits(inputs: Values, params: Values) -> Outputs:
    labels = integers(inputs["labels"])
    sums = {}
    for name in ("policy", "ref"):
        logp, mask = supervised.token_logprobs(tensor(inputs[f"{name}_logits"]), labels)
        sums[name] = reductions.row_sums(logp, mask)
    lengths = mask.sum(dim=1)
    pairs = len(labels) // 2
    chosen, rejected = (sums["policy"][rows].requires_grad_() for rows in (slice(0, pairs), slice(pairs, None)))
    out = _dpo_outputs((chosen, rejected), (sums["ref"][:pairs], sums["ref"][pairs:]), (lengths[:pairs], lengths[pairs:]), params)
    return out | {"policy_logps": sums["policy"], "ref_logps": sums["ref"], "completion_lengths": lengths}


def _dpo_outputs(
    policy: tuple[Tensor, Tensor], ref: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor] | None, params: Values
) -> Outputs:
    beta = number(params["beta"])
    gap = preference.log_ratio_gap(*policy, *ref)
    loss, metrics = preference.dpo(*policy, *ref, beta)
    per_pair = _per_pair(gap, beta, number(params.get("label_smoothing") or 0))
    if lengths is not None:
        mean_chosen, mean_rejected = (preference.per_token(logp, length) for logp, length in zip(policy, lengths, strict=True))
        mean_ref = (preference.per_token(logp, length) for logp, length in zip(ref, lengths, strict=True))
        mean_gap = preference.log_ratio_gap(mean_chosen, mean_rejected, *mean_ref)
        per_pair["ipo_mean"] = preference.ipo_pairs(mean_gap, beta)
        per_pair["sigmoid_norm"] = preference.sigmoid_pairs(mean_gap, beta)
        per_pair["simpo"] = preference.simpo_pairs(mean_chosen, mean_rejected, beta, number(params.get("simpo_gamma") or 0))
    return {
        "logit_margin": gap,
        "chosen_reward": beta * (policy[0] - ref[0]),
        "rejected_reward": beta * (policy[1] - ref[1]),
        "reward_accuracy": metrics["accuracy"],
        "losses": {name: {"per_pair": values, "mean": reductions.seq_mean(values)} for name, values in per_pair.items()},
        "grad_chosen_logp_sigmoid": gradient(loss, policy[0]),
        "grad_rejected_logp_sigmoid": gradient(loss, policy[1]),
    }


def _per_pair(gap: Tensor, beta: float, smoothing: float) -> dict[str, Tensor]:
    per_pair = {
        "sigmoid": preference.sigmoid_pairs(gap, beta),
        "cdpo": preference.cdpo_pairs(gap, beta, smoothing),
        "hinge": preference.hinge_pairs(gap, beta),
        "ipo_sum": preference.ipo_pairs(gap, beta),
    }
    if smoothing < 0.5:  # robust is undefined from there on
        per_pair["robust"] = preference.robust_pairs(gap, beta, smoothing)
    return per_pair


def orpo(inputs: Values, params: Values) -> Outputs:
    chosen, rejected = leaf(inputs["mean_logp_chosen"]), leaf(inputs["mean_logp_rejected"])
    loss, _ = reward.orpo(chosen, rejected, tensor(inputs["nll_chosen"]), number(params.get("lam", 0.1)))
    odds = reward.log_odds(chosen), reward.log_odds(rejected)
    return {
        "odds_w": odds[0].exp(),
        "odds_l": odds[1].exp(),
        "log_odds_ratio": odds[0] - odds[1],
        "loss_or": reward.odds_ratio_pairs(chosen, rejected),
        "loss": loss,
        "grad_mean_logp_chosen": gradient(loss, chosen),
        "grad_mean_logp_rejected": gradient(loss, rejected),
    }


def kto(inputs: Values, params: Values) -> Outputs:
    log_ratio, desirable, beta = tensor(inputs["logratios"]), tensor(inputs["desirable"]), number(params["beta"])
    z0 = reward.kto_baseline(tensor(inputs["kl_pair_logratios"]))
    weights = (number(params.get("lambda_d", 1)), number(params.get("lambda_u", 1)))
    return {
        "z0": z0,
        "per_example": reward.kto_examples(log_ratio, desirable, z0, beta, weights),
        "loss": reward.kto(log_ratio, desirable, z0, beta, weights)[0],
    }
