"""Verifying: episode to judgement, by rule; and the audit that a verifier passes before anything learns from it."""

from posttrain.verifying.answers import Answer, AnswerFault, is_refusal, parse_answer
from posttrain.verifying.audit import AuditReport, Rate, Replay, audit
from posttrain.verifying.expected import allows_refusal, check_expected, expected
from posttrain.verifying.grounding import Groundedness, episode_groundedness, figures, grounded
from posttrain.verifying.judgement import EnvironmentView, Judgement, Step, Verifier
from posttrain.verifying.matching import contains, same, same_call
from posttrain.verifying.mutations import ANSWER_MUTATIONS, CALL_MUTATIONS, Mutation, edit_answer, edit_arguments, edit_calls

__all__ = [
    "ANSWER_MUTATIONS",
    "CALL_MUTATIONS",
    "Answer",
    "AnswerFault",
    "AuditReport",
    "EnvironmentView",
    "Groundedness",
    "Judgement",
    "Mutation",
    "Rate",
    "Replay",
    "Step",
    "Verifier",
    "allows_refusal",
    "audit",
    "check_expected",
    "contains",
    "edit_answer",
    "edit_arguments",
    "edit_calls",
    "episode_groundedness",
    "expected",
    "figures",
    "grounded",
    "is_refusal",
    "parse_answer",
    "same",
    "same_call",
]
