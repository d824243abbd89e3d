"""Cases of section 6: divergences between teacher and student."""

from __future__ import annotations

from posttrain.objectives import distill
from posttrain.objectives import kl as divergences
from posttrain.objectives.cases.values import Outputs, Values, gradient, integers, leaf, number, tensor


def kd_probs(inputs: Values, params: Values) -> Outputs:
    teacher, student = tensor(inputs["teacher"]), tensor(inputs["student"])
    return {"forward_kl": divergences.kl_divergence(teacher, student), "reverse_kl": divergences.kl_divergence(student, teacher)}


def kd_logits(inputs: Values, params: Values) -> Outputs:
    student, teacher, mask = leaf(inputs["student_logits"]), tensor(inputs["teacher_logits"]), tensor(inputs["mask"])
    tau = number(params.get("temperature", 1.0))
    forward, _ = distill.forward_kl(student, teacher, mask, tau)
    reverse, _ = distill.reduce_tokens(distill.reverse_kl_tokens(student, teacher, tau), mask)
    jsd, _ = distill.reduce_tokens(distill.jsd_tokens(student, teacher, number(params.get("jsd_beta", 0.5)), tau), mask)
    out: Outputs = {
        "forward_kl_per_token": distill.forward_kl_tokens(student, teacher, tau),
        "forward_kl": forward,
        "reverse_kl": reverse,
        "forward_kl_times_T2": forward * tau**2,
        "jsd_beta": jsd,
        "grad_student_logits_forward": gradient(forward, student),
    }
    if inputs.get("hard_targets") is not None:
        targets, alpha = integers(inputs["hard_targets"]), number(params.get("alpha", 0.5))
        out["hard_ce"], _ = distill.reduce_tokens(distill.hard_ce_tokens(student, targets), mask)
        out["hinton_total"], _ = distill.reduce_tokens(distill.hinton_tokens(student, teacher, targets, tau, alpha), mask)
    return out


def proxy_kd(inputs: Values, params: Values) -> Outputs:
    loglik, kl, nll = (tensor(inputs[name]) for name in ("proxy_loglik", "kl_per_sample", "nll_per_sample"))
    loss, metrics = distill.proxy_kd(loglik, kl, nll, number(params.get("alpha", 1.0)))
    return {"weights": distill.proxy_weights(loglik), "weighted_kl": metrics["weighted_kl"], "loss": loss}
