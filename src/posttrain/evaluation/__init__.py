"""Evaluation: suites, metrics with intervals, scorecards, and the gate."""

from posttrain.evaluation.gate import GatePolicy, Guardrail, Target, decide
from posttrain.evaluation.run import evaluate
from posttrain.evaluation.scorecard import Metric, Scorecard
from posttrain.evaluation.suites import Suite
from posttrain.evaluation.summary import RunSummary, StageSummary
from posttrain.evaluation.verdict import Check, Outcome, Verdict

__all__ = [
    "Check", "GatePolicy", "Guardrail", "Metric", "Outcome", "RunSummary", "Scorecard", "StageSummary", "Suite", "Target", "Verdict",
    "decide", "evaluate",
]  # fmt: skip
