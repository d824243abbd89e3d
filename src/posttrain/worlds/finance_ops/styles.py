"""House style and the three tenants' styles: how the same content is written, and how a verifier tells.

The house style is plain. bank_A cites a policy on every answer and closes refusals and proposals with the second approver.
retail_B is a telegram: a summary "Label: value" of at most eight words, one next step (two on proposals). saas_C explains
("because") and closes with a risk note.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.verifying.judgement import Step
from posttrain.worlds.finance_ops.answers import Answer, Decision
from posttrain.worlds.finance_ops.policies import passages, tenant_of

TELEGRAM_WORDS = 8
SECOND_APPROVER = "Second approver:"
RISK = "Risk:"


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer in house style with what the tenants' styles need: the policy topic, a telegram, a cause, a risk, what to sign off.
    `says`: what the summary of any right answer says, in whatever style."""

    answer: Answer
    topic: str
    brief: str
    cause: str
    risk: str
    sign_off: str = "this"
    says: str = ""


def dress(reply: Reply, style: str | None, tenant: str) -> Answer:
    """The reply in a tenant's style, or as it is in house style (`style` None)."""
    answer = reply.answer
    closing = answer.decision in (Decision.REFUSE, Decision.PROPOSE)
    if style == "bank_A":
        policy = f"{tenant_of(tenant).prefix}-{reply.topic}"
        sources = (policy, *(source for source in answer.sources if source != policy))
        steps = (*answer.next_steps, f"{SECOND_APPROVER} sign off {reply.sign_off}.") if closing else answer.next_steps
        return answer.but(sources=sources[:3], next_steps=steps[:4])
    if style == "retail_B":
        return answer.but(summary=reply.brief, next_steps=answer.next_steps[: 2 if answer.decision is Decision.PROPOSE else 1])
    if style == "saas_C":
        explained = " because " in answer.summary
        summary = answer.summary if explained else f"{answer.summary.rstrip('.')} because {reply.cause}."
        return answer.but(summary=summary, next_steps=(*answer.next_steps[:3], f"{RISK} {reply.risk}."))
    return answer


def style_steps(answer: Answer, tenant: str) -> tuple[Step, ...]:
    """The tenant's style rules, checked one by one."""
    closing = answer.decision in (Decision.REFUSE, Decision.PROPOSE)
    if tenant == "bank_A":
        known = {found["id"] for found in passages(tenant)}
        approver = any(step.startswith(SECOND_APPROVER) for step in answer.next_steps)
        return (Step("cites_policy", bool(known & {*answer.sources})), Step("second_approver", approver or not closing))
    if tenant == "retail_B":
        limit = 2 if answer.decision is Decision.PROPOSE else 1
        return (
            Step("telegram", ":" in answer.summary and len(answer.summary.split()) <= TELEGRAM_WORDS),
            Step("few_steps", len(answer.next_steps) <= limit),
        )
    if tenant == "saas_C":
        risk = any(step.startswith(RISK) for step in answer.next_steps)
        return (Step("explains", " because " in answer.summary), Step("risk_note", risk))
    return ()
