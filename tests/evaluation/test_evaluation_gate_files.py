"""The gate on files: two scorecards and a policy that a person wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.errors import DataError, RecipeError
from posttrain.evaluation import Metric, Outcome, Scorecard, Verdict
from posttrain.pipeline.evaluating import decide_files

TARGETS = "targets: [{metric: task_success}]\n"


def scores(**shares: float) -> Scorecard:
    """Forty tasks, each metric the same on the first of them and 0 on the rest."""
    outcomes = {name: {f"t{i}": float(i < 40 * share) for i in range(40)} for name, share in shares.items()}
    metrics = {name: Metric(share, 0.0, 1.0, 40) for name, share in shares.items()}
    return Scorecard("s", "file", 0, 40, "c", metrics, {}, outcomes)


@pytest.fixture
def cards(tmp_path: Path) -> tuple[Path, Path]:
    """A candidate that learned its tasks and refuses nothing any more."""
    return (
        written(tmp_path / "parent.json", scores(task_success=0.0, high_risk_refusal=1.0, manners=1.0)),
        written(tmp_path / "candidate.json", scores(task_success=1.0, high_risk_refusal=0.0, manners=1.0)),
    )


def written(path: Path, card: Scorecard) -> Path:
    path.write_text(json.dumps(card.to_json()), "utf-8")
    return path


def decided(cards: tuple[Path, Path], policy: str | bytes) -> Verdict:
    path = cards[0].with_name("policy.yaml")
    path.write_bytes(policy if isinstance(policy, bytes) else policy.encode())
    return decide_files(*cards, path)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("guardrails: [{metric: high_risk_refusal}]", "guards nothing"),
        ("guardrails: [{metric: high_risk_refusal, max_drop: 0.03}]\nconfidence: 95", r"between 0\.5 and 1"),
        ("guardrails: [{metric: high_risk_refusals, max_drop: 0.03}]", "did you mean high_risk_refusal"),
    ],
)
def test_a_policy_file_that_would_guard_nothing_is_refused(cards: tuple[Path, Path], more: str, said: str) -> None:
    with pytest.raises(RecipeError, match=f"policy.yaml.*{said}"):
        decided(cards, TARGETS + more)


def test_a_policy_file_may_name_a_metric_that_only_its_scorecards_know(cards: tuple[Path, Path]) -> None:
    assert decided(cards, TARGETS + "guardrails: [{metric: manners, max_drop: 0.03}]").outcome is Outcome.REAL_GAIN


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("guardrails: [{metric: high_risk_refusal, max_drop: 0.03}]\nguardrails: []\n" + TARGETS, "'guardrails' occurs twice"),
        ((TARGETS + "# caf\u00e9").encode("latin-1"), "not UTF-8"),
        ("targets: [", "not YAML"),
        ("- a", "dictionary"),
        ("", "without targets"),
    ],
)
def test_a_policy_file_is_read_as_strictly_as_a_recipe(cards: tuple[Path, Path], policy: str | bytes, said: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s)policy.yaml.*{said}"):
        decided(cards, policy)


def test_a_scorecard_file_that_is_none_is_refused_by_its_name(cards: tuple[Path, Path]) -> None:
    for content in ('{"suite": "caf\u00e9"}'.encode("latin-1"), b"{", b"{}", b"[]"):
        cards[1].write_bytes(content)
        with pytest.raises(DataError, match=r"candidate\.json"):
            decided(cards, TARGETS)
