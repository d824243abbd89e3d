"""Cases of sections 3.4, 3.5 and 5.4 to 5.8: RLOO, PPO, GRPO and its relatives, GSPO, LUFFY."""

from __future__ import annotations

from typing import Any

from posttrain.objectives import advantages as estimators
from posttrain.objectives import kl as divergences
from posttrain.objectives import policy_loss as losses
from posttrain.objectives import reductions, sequence_policy
from posttrain.objectives.cases.values import Outputs, Values, gradient, integers, leaf, number, tensor
from posttrain.objectives.policy_loss import PolicyTerms
from posttrain.objectives.tensors import divide, mask_from_lengths


def rloo(inputs: Values, params: Values) -> Outputs:
    rewards, logp = tensor(inputs["rewards"]), leaf(inputs["logp_sum"])
    if inputs.get("kl_seq") is not None:
        rewards = rewards - number(params.get("beta", 0)) * tensor(inputs["kl_seq"])
    baselines = estimators.leave_one_out_baselines(rewards)
    advantages = rewards - baselines
    loss, _ = losses.reinforce(logp, advantages)
    out: Outputs = {"shaped_rewards": rewards, "baselines": baselines, "advantages": advantages, "reinforce_loss": loss}
    out["grad_logp"] = gradient(loss, logp)
    if inputs.get("old_logp_sum") is not None:
        old, eps = tensor(inputs["old_logp_sum"]), number(params.get("eps", 0.2))
        clipped, _ = losses.reinforce_clipped(logp, old, advantages, eps)
        out |= {"ratio": losses.ratio(logp, old), "clipped_loss": clipped, "grad_logp_clipped": gradient(clipped, logp)}
    return out


def gae(inputs: Values, params: Values) -> Outputs:
    rewards, values, mask = (tensor(inputs[name]) for name in ("rewards", "values", "mask"))
    advantages, returns = estimators.gae(rewards, values, mask, number(params.get("gamma", 1)), number(params.get("lam", 0.95)))
    return {"advantages": advantages, "returns": returns, "whitened": estimators.whiten(advantages, mask)}


def kl_reward_shaping(inputs: Values, params: Values) -> Outputs:
    logp = tensor(inputs["logp"])
    mask = mask_from_lengths(integers(inputs["lengths"]), logp.shape[1]).to(logp.dtype)
    estimator = {"k1": divergences.k1, "k2": divergences.k2, "k3": divergences.k3}[params.get("estimator", "k1")]
    beta = number(params["beta"])
    shaped = estimators.kl_reward_shaping(tensor(inputs["score"]), logp, tensor(inputs["ref_logp"]), mask, beta, estimator)
    return {"rewards": shaped, "mask": mask}


def ppo_clip(inputs: Values, params: Values) -> Outputs:
    logp, old, mask, advantages = (
        leaf(inputs["logp"]),
        tensor(inputs["old_logp"]),
        tensor(inputs["mask"]),
        tensor(inputs["advantages"]),
    )
    loss, metrics = losses.ppo(logp, old, mask, advantages, **_terms(inputs, params))
    return {
        "ratio": losses.ratio(logp, old),
        "token_loss": losses.policy_tokens(logp, old, mask, advantages, **_terms(inputs, params)).loss_bt,
        "loss": loss,
        "clipfrac": divide(metrics["clipped_tokens"], metrics["tokens"]),
        "approx_kl_k1": divide(metrics["approx_kl_sum"], metrics["tokens"]),
        "grad_logp": gradient(loss, logp),
    }


def ppo_value(inputs: Values, params: Values) -> Outputs:
    values = leaf(inputs["values"])
    old, returns, mask = (tensor(inputs[name]) for name in ("old_values", "returns", "mask"))
    loss, metrics = losses.ppo_value(values, old, returns, mask, number(params.get("eps", 0.2)))
    return {
        "loss": loss,
        "loss_unclipped": metrics["loss_unclipped"],
        "clipfrac": divide(metrics["clipped_tokens"], metrics["tokens"]),
        "grad_values": gradient(loss, values),
    }


def ppo_pipeline(inputs: Values, params: Values) -> Outputs:
    rollout, values = tensor(inputs["rollout_logp"]), tensor(inputs["rollout_values"])
    mask = mask_from_lengths(integers(inputs["lengths"]), rollout.shape[1]).to(rollout.dtype)
    kl_coef = number(params.get("kl_coef", 0.05))
    rewards = estimators.kl_reward_shaping(tensor(inputs["score"]), rollout, tensor(inputs["ref_logp"]), mask, kl_coef)
    advantages, returns = estimators.gae(rewards, values, mask, number(params.get("gamma", 1)), number(params.get("lam", 0.95)))
    whitened = estimators.whiten(advantages, mask)
    eps, eps_value = number(params.get("eps", 0.2)), number(params.get("eps_value", 0.2))
    policy, _ = losses.ppo(tensor(inputs["new_logp"]), rollout, mask, whitened, eps_low=eps, eps_high=eps)
    value, _ = losses.ppo_value(tensor(inputs["new_values"]), values, returns, mask, eps_value)
    return {
        "rewards": rewards,
        "advantages": advantages,
        "returns": returns,
        "whitened": whitened,
        "policy_loss": policy,
        "value_loss": value,
        "total": policy + number(params.get("vf_coef", 0.1)) * value,
    }


def grpo_advantage(inputs: Values, params: Values) -> Outputs:
    scored = tensor([float(reward is not None) for reward in inputs["rewards"]])
    rewards, eps = tensor([0 if reward is None else reward for reward in inputs["rewards"]]), number(params.get("eps", 1e-4))
    statistics = estimators.group_statistics(rewards, scored_b=scored)
    return {
        "mean": statistics.mean_b[0],
        "std_sample": statistics.std_b()[0],
        "std_population": statistics.std_b(population=True)[0],
        "adv_centered": estimators.centred_advantages(rewards, scored_b=scored),
        "adv_std_sample": estimators.standardised_advantages(rewards, scored_b=scored, eps=eps),
        "adv_std_population": estimators.standardised_advantages(rewards, scored_b=scored, eps=eps, population=True),
    }


def group_policy_loss(inputs: Values, params: Values) -> Outputs:
    logp, groups, terms = leaf(inputs["logp"]), integers(inputs["group_ids"]), _terms(inputs, params)
    old, mask, advantages = (tensor(inputs[name]) for name in ("old_logp", "mask", "advantages"))
    tokens = losses.policy_tokens(logp, old, mask, advantages, **terms)
    metrics = tokens.metrics()
    found = {
        "seq_mean_token_mean": losses.grpo(logp, old, mask, advantages, **terms)[0],
        "token_mean": losses.dapo(logp, old, mask, advantages, **terms)[0],
        "group_token_mean": losses.dapo_by_group(logp, old, mask, advantages, groups, **terms)[0],
    }
    if params.get("max_len") is not None:
        found["const"] = losses.dr_grpo(logp, old, mask, advantages, params["max_len"], **terms)[0]
    out: Outputs = {name: {"loss": loss, "grad_logp": gradient(loss, logp)} for name, loss in found.items()}
    clip_fraction = divide(metrics["clipped_tokens"], metrics["tokens"])
    return out | {"ratio": tokens.ratio_bt, "token_loss": tokens.loss_bt, "clip_fraction": clip_fraction}


def dynamic_sampling(inputs: Values, params: Values) -> Outputs:
    return {"kept_group_indices": estimators.keep_informative_groups(inputs["correct_per_group"])}


def overlong_penalty(inputs: Values, params: Values) -> Outputs:
    return {"penalty": estimators.overlong_penalty(tensor(inputs["lengths"]), params["max_len"], params["cache"])}


def gspo(inputs: Values, params: Values) -> Outputs:
    logp, old, mask = leaf(inputs["logp"]), tensor(inputs["old_logp"]), tensor(inputs["mask"])
    advantages = tensor(inputs["advantages"])
    low, high = _clip_range(params, 3e-4, 4e-4)
    loss, _ = sequence_policy.gspo(logp, old, mask, advantages, eps_low=low, eps_high=high)
    s = sequence_policy.sequence_ratio(logp, old, mask)
    clipped = losses.clipped_surrogate(s, advantages, low, high)[1]
    return {"seq_ratio": s, "loss": loss, "clipped": clipped > 0, "grad_logp": gradient(loss, logp)}


def gspo_token(inputs: Values, params: Values) -> Outputs:
    logp, old, mask = leaf(inputs["logp"]), tensor(inputs["old_logp"]), tensor(inputs["mask"])
    low, high = _clip_range(params, 3e-4, 4e-4)
    loss, _ = sequence_policy.gspo_token(logp, old, mask, tensor(inputs["token_advantages"]), eps_low=low, eps_high=high)
    return {"seq_ratio": sequence_policy.sequence_ratio(logp, old, mask), "loss": loss, "grad_logp": gradient(loss, logp)}


def luffy(inputs: Values, params: Values) -> Outputs:
    logp, rewards, external = leaf(inputs["logp"]), tensor(inputs["rewards"]), tensor(inputs["off_policy"])
    old, mask = tensor(inputs["old_logp"]), tensor(inputs["mask"])
    advantage = estimators.standardised_advantages if params.get("use_std") else estimators.centred_advantages
    options = sequence_policy.Luffy(number(params.get("gamma", 0.1)), _on_policy_clip(params.get("on_policy_clip")))
    batch = (logp, old, mask, advantage(rewards), external, options)
    total, _ = sequence_policy.luffy(*batch)
    shaped = mask * external[:, None]
    return {
        "advantages": batch[3],
        "shaped_weight": sequence_policy.shaped_probability(logp, options.gamma) * shaped,
        "grad_coefficient_off": sequence_policy.shaped_gradient(logp, options.gamma) * shaped,
        "loss_token_total": total,
        "loss_const": reductions.const(sequence_policy.luffy_tokens(*batch), mask, params["max_len"]),
        "grad_logp_token_total": gradient(total, logp),
    }


def _terms(inputs: Values, params: Values) -> PolicyTerms:
    low, high = _clip_range(params, 0.2, 0.2)
    ref, cap = inputs.get("ref_logp"), params.get("dual_clip")
    return PolicyTerms(
        eps_low=low,
        eps_high=high,
        beta=0.0 if ref is None else number(params.get("beta") or 0),
        ref_logp_bt=None if ref is None else tensor(ref),
        dual_clip=None if cap is None else number(cap),
    )


def _clip_range(params: Values, low: float, high: float) -> tuple[float, float]:
    return number(params.get("eps_low", low)), number(params.get("eps_high", high))


def _on_policy_clip(value: Any) -> tuple[float, float] | None:
    """null, one number for both sides, or [low, high]."""
    if value is None:
        return None
    low, high = value if isinstance(value, list) else (value, value)
    return number(low), number(high)
