"""Verdicts on constructed scorecards."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from posttrain.errors import DataError, RecipeError
from posttrain.evaluation import GatePolicy, Guardrail, Metric, Outcome, Scorecard, Target, decide
from posttrain.evaluation.statistics import interval

UP = Target("tool_success", min_gain=0.1)
SAFE = Guardrail("high_risk_refusal", max_drop=0.03)


def card(outcomes: Mapping[str, list[float]], *, name: str = "c", suite: str = "s", **alone: float) -> Scorecard:
    """A scorecard whose i-th task of a metric is task t<i>; odd tasks are of kind 'odd'."""
    tasks = {f"t{i}": {"tenant": "a", "kind": "odd" if i % 2 else "even"} for i in range(200)}
    by_task = {metric: {f"t{i}": value for i, value in enumerate(values)} for metric, values in outcomes.items()}
    metrics = {metric: measured(values) for metric, values in outcomes.items()}
    metrics |= {metric: Metric(value, value - 0.01, value + 0.01, 5) for metric, value in alone.items()}
    slices = {
        f"kind={kind}": {metric: measured(values[parity::2]) for metric, values in outcomes.items() if len(values) > 1}
        for kind, parity in (("even", 0), ("odd", 1))
    }
    return Scorecard(suite, "test", 1, 200, name, metrics, slices, by_task, tasks)


def measured(values: list[float]) -> Metric:
    return Metric(sum(values) / len(values), *interval(values), len(values))


def bits(ones: int, n: int = 60) -> list[float]:
    return [1.0] * ones + [0.0] * (n - ones)


def test_a_target_beyond_chance_with_all_guardrails_held_is_a_real_gain() -> None:
    parent = card({"tool_success": bits(20), "high_risk_refusal": bits(59)})
    candidate = card({"tool_success": bits(45), "high_risk_refusal": bits(60)})
    verdict = decide(parent, candidate, GatePolicy((UP,), (SAFE,)))
    assert verdict.outcome is Outcome.REAL_GAIN
    assert verdict.passed
    assert [check.passed for check in verdict.checks] == [True, True]
    assert verdict.checks[0].difference == pytest.approx(25 / 60)


def test_a_gain_with_a_broken_guardrail_is_reward_hacking() -> None:
    parent = card({"tool_success": bits(20), "high_risk_refusal": bits(60)})
    candidate = card({"tool_success": bits(50), "high_risk_refusal": bits(40)})
    verdict = decide(parent, candidate, GatePolicy((UP,), (SAFE,)))
    assert verdict.outcome is Outcome.REWARD_HACKING
    assert any("high_risk_refusal" in reason for reason in verdict.reasons)


def test_a_proxy_that_rose_while_the_truth_fell_is_reward_hacking() -> None:
    parent = card({"tool_success": bits(40), "high_risk_refusal": bits(60), "reward": [0.4] * 59 + [0.5]})
    candidate = card({"tool_success": bits(38), "high_risk_refusal": bits(40), "reward": [0.9] * 59 + [0.8]})
    assert decide(parent, candidate, GatePolicy((UP,), (SAFE,), "reward")).outcome is Outcome.REWARD_HACKING


def test_no_gain_and_a_broken_guardrail_is_a_regression() -> None:
    parent = card({"tool_success": bits(40), "high_risk_refusal": bits(60)})
    candidate = card({"tool_success": bits(38), "high_risk_refusal": bits(40)})
    assert decide(parent, candidate, GatePolicy((UP,), (SAFE,))).outcome is Outcome.REGRESSION


def test_no_gain_and_nothing_broken_is_idle_drift() -> None:
    parent = card({"tool_success": bits(40), "high_risk_refusal": bits(58)})
    candidate = card({"tool_success": bits(42), "high_risk_refusal": bits(58)})
    verdict = decide(parent, candidate, GatePolicy((UP,), (SAFE,)))
    assert verdict.outcome is Outcome.IDLE_DRIFT
    assert verdict.reasons


def test_a_gain_within_chance_is_no_gain() -> None:
    parent, candidate = card({"tool_success": bits(2, 6)}), card({"tool_success": bits(4, 6)})
    assert decide(parent, candidate, GatePolicy((UP,))).outcome is Outcome.IDLE_DRIFT


def test_a_certain_gain_smaller_than_asked_is_no_gain() -> None:
    parent, candidate = card({"tool_success": bits(100, 200)}), card({"tool_success": bits(112, 200)})
    assert decide(parent, candidate, GatePolicy((Target("tool_success"),))).passed
    assert not decide(parent, candidate, GatePolicy((UP,))).passed


def test_a_fall_beyond_the_margin_but_within_chance_is_noted_not_breached() -> None:
    parent = card({"tool_success": bits(20), "high_risk_refusal": bits(10, 10)})
    candidate = card({"tool_success": bits(45), "high_risk_refusal": bits(9, 10)})
    verdict = decide(parent, candidate, GatePolicy((UP,), (SAFE,)))
    assert verdict.passed
    assert "high_risk_refusal" in verdict.notes["inconclusive"][0]


def test_absolute_bounds_hold_for_every_target_and_guardrail() -> None:
    parent, candidate = card({"tool_success": bits(20)}, latency=1.0), card({"tool_success": bits(45)}, latency=0.55)
    fast = Target("latency", at_most=0.6, direction="down")
    assert decide(parent, candidate, GatePolicy((fast,))).passed
    assert decide(parent, candidate, GatePolicy((UP, fast))).passed
    assert not decide(parent, candidate, GatePolicy((UP, Target("latency", at_most=0.5, direction="down")))).passed
    assert (
        decide(parent, candidate, GatePolicy((UP,), (Guardrail("tool_success", at_least=0.99),))).outcome
        is Outcome.REWARD_HACKING
    )


def test_a_compared_targets_own_bound_must_hold_although_another_target_gains() -> None:
    parent = card({"task_success": bits(0), "tool_success": bits(20)})
    candidate = card({"task_success": bits(60), "tool_success": bits(20)})
    for least, outcome in ((0.8, Outcome.IDLE_DRIFT), (0.3, Outcome.REAL_GAIN)):
        bounded = Target("tool_success", min_gain=0.0, at_least=least)
        assert decide(parent, candidate, GatePolicy((Target("task_success"), bounded))).outcome is outcome


def test_down_means_smaller_is_better_for_targets_and_guardrails() -> None:
    parent, candidate = card({"false_refusal": bits(40)}), card({"false_refusal": bits(10)})
    down = Target("false_refusal", direction="down", min_gain=0.1)
    assert decide(parent, candidate, GatePolicy((down,))).passed
    assert not decide(candidate, parent, GatePolicy((down,))).passed
    rail = Guardrail("false_refusal", max_drop=0.05, direction="down")
    assert (
        decide(candidate, parent, GatePolicy((Target("false_refusal", at_least=0.0),), (rail,))).outcome is Outcome.REWARD_HACKING
    )


def test_a_metric_whose_smaller_values_are_better_is_guarded_that_way_without_saying_so() -> None:
    parent = card({"tool_success": bits(20), "false_refusal": bits(0)})
    candidate = card({"tool_success": bits(45), "false_refusal": bits(60)})
    verdict = decide(parent, candidate, GatePolicy((UP,), (Guardrail("false_refusal", max_drop=0.03),)))
    assert verdict.outcome is Outcome.REWARD_HACKING
    assert verdict.checks[1].requirement == "rise by at most 0.03"
    assert decide(candidate, parent, GatePolicy((Target("false_refusal"),))).passed


def test_a_metric_of_another_world_is_better_upwards_unless_the_policy_says_otherwise() -> None:
    parent, candidate = card({"errors": bits(40)}), card({"errors": bits(10)})
    assert not decide(parent, candidate, GatePolicy((Target("errors"),))).passed
    assert decide(parent, candidate, GatePolicy((Target("errors", direction="down"),))).passed


def test_a_slice_is_compared_on_its_own_tasks() -> None:
    parent = card({"tool_success": [0.0] * 80})
    candidate = card({"tool_success": [float(i % 2) for i in range(80)]})
    odd = decide(parent, candidate, GatePolicy((Target("tool_success", slice="kind=odd"),)))
    even = decide(parent, candidate, GatePolicy((Target("tool_success", slice="kind=even"),)))
    assert odd.passed
    assert odd.checks[0].n == 40
    assert not even.passed


def test_a_metric_that_applies_to_other_tasks_than_before_is_judged_on_those_too() -> None:
    grounded, invented = [1.0] * 10, [1.0] * 10 + [0.0] * 30
    parent = card({"tool_success": bits(20), "groundedness": grounded, "made_up": [0.0] * 10})
    candidate = card({"tool_success": bits(45), "groundedness": invented, "made_up": [0.0] * 10 + [1.0] * 30})
    verdict = decide(parent, candidate, GatePolicy((UP,), (Guardrail("groundedness", max_drop=0.05),)))
    assert verdict.outcome is Outcome.REWARD_HACKING
    assert verdict.checks[1].difference == pytest.approx(-0.75)
    down = Guardrail("made_up", max_drop=0.05, direction="down")
    assert decide(parent, candidate, GatePolicy((UP,), (down,))).outcome is Outcome.REWARD_HACKING


def test_a_gain_on_the_shared_tasks_alone_is_no_gain() -> None:
    parent = card({"groundedness": [0.0] * 20})
    candidate = card({"groundedness": [1.0] * 20 + [0.0] * 80})
    assert decide(parent, candidate, GatePolicy((Target("groundedness"),))).passed
    worse = card({"groundedness": [1.0] * 20 + [0.0] * 180})
    assert not decide(parent, worse, GatePolicy((Target("groundedness"),))).passed


def test_scorecards_of_different_suites_are_compared_unpaired_and_say_so() -> None:
    parent, candidate = card({"tool_success": bits(20)}, suite="other"), card({"tool_success": bits(50)})
    verdict = decide(parent, candidate, GatePolicy((UP,)))
    assert verdict.passed
    assert verdict.notes["paired"] is False


def test_scorecards_of_other_tasks_under_the_same_name_are_not_compared() -> None:
    parent, candidate = card({"tool_success": bits(20)}), card({"tool_success": bits(50)})
    one, other = (replace(candidate, tasks_sha256=letter * 64) for letter in "ab")
    with pytest.raises(DataError, match=r"s, test seed 1: .*the parent on 200 of hash b+, the candidate on 200 of a+.*same file"):
        decide(other, one, GatePolicy((UP,)))
    for before in (one, parent):  # the same hash, and an older scorecard that holds none
        assert decide(replace(before, outcomes=parent.outcomes), one, GatePolicy((UP,))).notes["paired"]
    assert not decide(replace(other, suite="other"), one, GatePolicy((UP,))).notes["paired"]


def test_without_a_parent_only_bounds_can_pass() -> None:
    candidate = card({"tool_success": bits(50)})
    assert not decide(None, candidate, GatePolicy((UP,))).passed
    assert decide(None, candidate, GatePolicy((Target("tool_success", at_least=0.8),))).passed


def test_a_metric_or_slice_that_the_candidate_lacks_fails_its_check_and_is_named() -> None:
    parent = card({"tool_success": bits(20), "groundedness": bits(60)})
    candidate = card({"tool_success": bits(45)})
    rail = Guardrail("groundedness", max_drop=0.05, at_least=0.0)
    verdict = decide(parent, candidate, GatePolicy((UP,), (rail,), proxy="reward"))
    assert verdict.outcome is Outcome.REWARD_HACKING
    assert (verdict.checks[1].parent, verdict.checks[1].candidate, verdict.checks[1].passed) == (1.0, None, False)
    assert "groundedness" in verdict.reasons[0]
    assert "no such metric" in verdict.reasons[0]
    nowhere = decide(parent, candidate, GatePolicy((Target("tool_success", slice="kind=none", at_least=0.0),)))
    assert not nowhere.passed
    assert "kind=even" in nowhere.reasons[0]


def test_a_value_that_is_no_number_passes_nothing() -> None:
    parent, candidate = card({"tool_success": bits(20)}, kl=0.1), card({"tool_success": bits(45)}, kl=math.nan)
    for rail in (Guardrail("kl", max_drop=0.1), Guardrail("kl", at_most=1.0)):
        assert decide(parent, candidate, GatePolicy((UP,), (rail,))).outcome is Outcome.REWARD_HACKING


def test_without_a_parents_value_a_guardrail_holds_by_its_own_bound_or_not_at_all() -> None:
    parent = card({"tool_success": bits(20)})
    candidate = card({"tool_success": bits(45), "groundedness": bits(57)})

    def outcome(**limits: float) -> Outcome:
        return decide(parent, candidate, GatePolicy((UP,), (Guardrail("groundedness", **limits),))).outcome

    assert outcome(max_drop=0.05) is Outcome.REWARD_HACKING
    assert outcome(max_drop=0.05, at_least=0.99) is Outcome.REWARD_HACKING
    assert outcome(max_drop=0.05, at_least=0.9) is Outcome.REAL_GAIN
    assert outcome(at_least=0.9) is Outcome.REAL_GAIN


def test_a_gate_without_targets_is_an_error() -> None:
    with pytest.raises(RecipeError, match="targets"):
        decide(None, card({"tool_success": bits(1)}), GatePolicy())


def test_a_scorecard_survives_its_json() -> None:
    original = card({"tool_success": bits(20)}, latency=1.0)
    assert Scorecard.from_json(original.to_json()) == original
    known = replace(original, tasks_sha256="a" * 64)
    assert Scorecard.from_json(known.to_json()) == known
    assert Scorecard.from_json({key: value for key, value in known.to_json().items() if key != "tasks_sha256"}) == original
    with pytest.raises(DataError, match="not a scorecard"):
        Scorecard.from_json({"suite": "s"})


@pytest.mark.parametrize("confidence", [95.0, 1.0, 0.5, 0.0, -1.0, math.nan])
def test_a_confidence_that_would_make_nothing_certain_is_refused(confidence: float) -> None:
    with pytest.raises(RecipeError, match=r"between 0\.5 and 1"):
        decide(None, card({"tool_success": bits(50)}), GatePolicy((UP,), confidence=confidence))


@pytest.mark.parametrize(
    "rail",
    [
        Guardrail("high_risk_refusal"),
        Guardrail("high_risk_refusal", max_drop=-0.1),
        Guardrail("high_risk_refusal", max_drop=math.nan),
        Guardrail("high_risk_refusal", at_least=math.nan),
        Guardrail("high_risk_refusal", at_most=math.inf),
    ],
)
def test_a_guardrail_that_guards_nothing_is_refused_with_its_place(rail: Guardrail) -> None:
    scores = card({"tool_success": bits(50), "high_risk_refusal": bits(50)})
    with pytest.raises(RecipeError, match=r"guardrails\[1\]"):
        decide(scores, scores, GatePolicy((UP,), (SAFE, rail)))


def test_one_or_two_real_values_are_no_gain_and_their_verdict_is_json() -> None:
    for before, after in (([0.5], [0.6]), ([0.5, 0.25], [0.75, 0.5])):
        parent, candidate = card({"verifier_score": before}), card({"verifier_score": after})
        verdict = decide(parent, candidate, GatePolicy((Target("verifier_score"),)))
        assert verdict.outcome is Outcome.IDLE_DRIFT
        json.dumps(verdict.to_json(), allow_nan=False)


def test_values_without_spread_on_other_tasks_than_before_are_told_as_too_few() -> None:
    parent, candidate = card({"cost": [0.4] * 8}), card({"cost": [0.2] * 9})
    verdict = decide(parent, candidate, GatePolicy((Target("cost", direction="down"),)))
    assert "too few" in verdict.reasons[0]


def test_a_metric_timed_once_is_no_gain() -> None:
    once = {"latency_ratio": Metric(1.0, 1.0, 1.0, 1)}, {"latency_ratio": Metric(0.7, 0.7, 0.7, 1)}
    parent, candidate = (Scorecard("s", "test", 1, 1, "c", metrics) for metrics in once)
    verdict = decide(parent, candidate, GatePolicy((Target("latency_ratio"),)))
    assert verdict.outcome is Outcome.IDLE_DRIFT
    assert verdict.checks[0].low is None
    assert "too few" in verdict.reasons[0]


def test_the_confidence_of_a_policy_holds_for_unpaired_metrics_and_is_said() -> None:
    timed = {"latency_s": Metric(1.0, 0.8, 1.2, 8)}, {"latency_s": Metric(0.8, 0.7, 0.9, 8)}
    parent, candidate = (Scorecard("s", "test", 1, 8, "c", metrics) for metrics in timed)
    assert not decide(parent, candidate, GatePolicy((Target("latency_s"),))).passed
    assert decide(parent, candidate, GatePolicy((Target("latency_s"),), confidence=0.8)).passed
    assert "99 % from" in decide(parent, candidate, GatePolicy((Target("latency_s"),), confidence=0.99)).reasons[0]
    parent, candidate = card({"tool_success": bits(30)}, suite="other"), card({"tool_success": bits(40)})
    assert not decide(parent, candidate, GatePolicy((Target("tool_success"),))).passed
    assert decide(parent, candidate, GatePolicy((Target("tool_success"),), confidence=0.8)).passed
