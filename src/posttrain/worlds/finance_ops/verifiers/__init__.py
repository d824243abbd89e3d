"""The judges of finance_ops by name. Each maps (task, episode, environment) to a graded, strict Judgement."""

from collections.abc import Mapping

from posttrain.verifying.judgement import Verifier
from posttrain.worlds.finance_ops.verifiers.answering import advise, benign, facts, high_risk, lookup, tenant_style
from posttrain.worlds.finance_ops.verifiers.reconciling import reconcile

VERIFIERS: Mapping[str, Verifier] = {
    "finance_ops.lookup": lookup,
    "finance_ops.benign": benign,
    "finance_ops.facts": facts,
    "finance_ops.advise": advise,
    "finance_ops.high_risk": high_risk,
    "finance_ops.reconcile": reconcile,
    "finance_ops.tenant_style": tenant_style,
}

__all__ = ["VERIFIERS"]
