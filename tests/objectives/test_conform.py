"""Conformance: what passes, what fails and says why, what is skipped by name, and files that are no case files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import DataError
from posttrain.objectives import conform
from posttrain.objectives.cases import ADAPTERS

SHARED = Path(__file__).parents[2].parent / "shared" / "objectives_cases.json"

DPO = {
    "id": "dpo/mine",
    "objective": "dpo",
    "inputs": {"pc": [-1.0], "pr": [-6.0], "rc": [-2.0], "rr": [-4.0]},
    "params": {"beta": 0.5},
    "expected": {"logit_margin": [3.0], "losses": {"sigmoid": {"mean": 0.201413277983}, "hinge": {"per_pair": [0.0]}}},
    "atol": 1e-9,
    "rtol": 1e-9,
}
UNANIMOUS = {
    "id": "vote/unanimous",
    "objective": "vote_preference",
    "inputs": {"wins": 0, "n": 3, "delta": 0.0},
    "expected": {"bt_reward_gap": "-inf", "p_hat": 0.0, "soft_label_loss": math.log(2)},
}
NOBODY = {
    "id": "select/nobody",
    "objective": "best_of_n_select",
    "inputs": {"scores": [0.4, 0.6], "answers": [None, None]},
    "expected": {"best_index": None, "best_answer": None, "weighted_totals": {}},
}


def _write(folder: Path, *cases: dict[str, Any], **more: object) -> Path:
    path = folder / "cases.json"
    path.write_text(json.dumps({"format": 1, "cases": list(cases), **more}))
    return path


def _changed(case: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**case, **changes}


def test_good_cases_pass_with_infinities_nulls_and_default_tolerances(tmp_path: Path) -> None:
    result = conform.run(_write(tmp_path, DPO, UNANIMOUS, NOBODY))
    assert conform.report_lines(result) == ["3 passed, 0 failed, 0 skipped"]
    assert result.ok
    assert result.passed == ("dpo/mine", "vote/unanimous", "select/nobody")


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"logit_margin": [3.1]}, r"logit_margin\[0\]: got 3.0, expected 3.1"),
        ({"logit_margin": [3.0, 3.0]}, r"logit_margin: got \[3.0\], expected \[3.0, 3.0\]"),
        ({"logit_margin": "inf"}, "logit_margin: got .*expected 'inf'"),
        ({"losses": {"hinge": {"per_pair": [None]}}}, r"losses.hinge.per_pair\[0\]: got 0.0, expected None"),
        ({"losses": {"nonsense": 1}}, "losses.nonsense: is not computed, expected 1"),
        ({"losses": 3}, "losses: got"),
    ],
)
def test_a_number_that_differs_is_named_with_got_and_expected(tmp_path: Path, expected: dict[str, Any], message: str) -> None:
    result = conform.run(_write(tmp_path, _changed(DPO, expected=expected)))
    (failure,) = result.failed
    assert failure.case == "dpo/mine"

    assert re.search(message, failure.messages[0])
    assert conform.report_lines(result)[-1] == "0 passed, 1 failed, 0 skipped"
    assert conform.report_lines(result)[0].startswith("FAILED dpo/mine: ")
    assert not result.ok


def test_the_tolerance_is_absolute_plus_relative(tmp_path: Path) -> None:
    for value, atol, rtol, passes in (
        (3.3, 0.3, 0.0, True),
        (3.3, 0.0, 0.1, True),
        (3.3, 0.1, 0.05, False),
        (3.3, 0.2, 0.05, True),
    ):
        case = _changed(DPO, expected={"logit_margin": [value]}, atol=atol + 1e-12, rtol=rtol)
        assert conform.run(_write(tmp_path, case)).ok is passes


def test_many_differences_are_cut_short(tmp_path: Path) -> None:
    case = _changed(DPO, inputs={name: [-1.0] * 9 for name in ("pc", "pr", "rc", "rr")}, expected={"logit_margin": [5.0] * 9})
    lines = conform.report_lines(conform.run(_write(tmp_path, case)))
    assert lines[-2].strip() == "and 4 more"


def test_objectives_not_implemented_are_skipped_and_counted_by_name(tmp_path: Path) -> None:
    unknown = [_changed(DPO, id=f"u/{index}", objective=name) for index, name in enumerate(("zpo", "apo", "zpo"))]
    result = conform.run(_write(tmp_path, DPO, *unknown))
    assert result.skipped == (("u/0", "zpo"), ("u/1", "apo"), ("u/2", "zpo"))
    assert conform.report_lines(result) == ["not implemented: apo (1), zpo (2)", "1 passed, 0 failed, 3 skipped"]


def test_a_case_that_cannot_be_computed_fails_and_the_others_still_run(tmp_path: Path) -> None:
    missing = _changed(DPO, id="missing", inputs={"pc": [-1.0]})
    crooked = _changed(DPO, id="crooked", inputs={"pc": [-1.0], "pr": [-1.0, -2.0], "rc": [-1.0], "rr": [-1.0]})
    result = conform.run(_write(tmp_path, missing, crooked, DPO))
    assert result.passed == ("dpo/mine",)
    assert [failure.messages[0] for failure in result.failed] == [
        "an input or parameter is missing: pr",
        "raised AssertionError: shapes differ: [(1,), (2,), (1,), (1,)]",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"cases\.json.*is not JSON"),
        ("[]", r'has no list "cases"'),
        ('{"cases": 3}', r'has no list "cases"'),
        ('{"format": 2, "cases": []}', "unknown format; got 2"),
        ('{"cases": [3]}', r"cases\.json: case 1: is not an object"),
        ('{"cases": [{"id": "a"}]}', r'case a: "objective" must be a str'),
        ('{"cases": [{"id": "a", "objective": "dpo", "inputs": {}, "expected": []}]}', r'case a: "expected" must be a dict'),
        ('{"cases": [{"id": "a", "objective": "dpo", "inputs": {}, "expected": {}, "atol": "x"}]}', "numbers"),
        ('{"cases": [{"id": "a", "objective": "dpo", "inputs": {}, "expected": {}, "params": [1]}]}', "params"),
    ],
)
def test_a_file_that_is_no_case_file_is_refused_with_file_and_case(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cases.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        conform.run(path)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        conform.run(tmp_path / "none.json")
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not JSON"):
        conform.run(tmp_path / "b")


def test_groups_of_one_raise_no_warning_here(tmp_path: Path) -> None:
    case = {
        "id": "g1",
        "objective": "grpo_advantage",
        "inputs": {"rewards": [2.0]},
        "expected": {"adv_centered": [0.0], "std_sample": 0.0},
    }
    assert conform.run(_write(tmp_path, case)).ok


def test_optional_parameters_have_the_documented_defaults(tmp_path: Path) -> None:
    cases = [
        {"id": "unscored", "objective": "grpo_advantage", "inputs": {"rewards": [1, None, 0]},
         "expected": {"adv_centered": [0.5, 0, -0.5]}},
        {"id": "luffy", "objective": "luffy", "params": {"max_len": 2, "on_policy_clip": 0.2}, "expected": {"loss_token_total": 0.0},
         "inputs": {"logp": [[0.0], [0.0]], "old_logp": [[0.0], [0.0]], "mask": [[1], [1]], "off_policy": [0, 0], "rewards": [1, 0]}},
        {"id": "memory", "objective": "memory", "inputs": {"method": "sft_full", "P": 10}, "params": {"g_bytes": 4, "opt_bytes": 2},
         "expected": {"total_bytes": 120}},
        {"id": "kv", "objective": "kv_cache", "inputs": {"layers": 1, "kv_heads": 1, "head_dim": 8}, "expected": {"bytes_per_token": 32}},
        {"id": "bits", "objective": "nf4_bits", "inputs": {}, "expected": {"single": 4.5, "double": 4.126953125}},
        {"id": "rloo", "objective": "rloo", "inputs": {"rewards": [1, 0], "logp_sum": [-1, -2], "old_logp_sum": [-1, -2]},
         "expected": {"advantages": [1, -1], "ratio": [1, 1], "clipped_loss": 0.0}},
    ]  # fmt: skip
    assert conform.report_lines(conform.run(_write(tmp_path, *cases))) == ["6 passed, 0 failed, 0 skipped"]


def test_every_adapter_is_named_like_its_objective() -> None:
    assert all(adapter.__name__ == name for name, adapter in ADAPTERS.items())
    assert {"sft_ce", "dpo", "group_policy_loss", "grpo_advantage", "kd_logits", "kd_probs"} <= ADAPTERS.keys()


@pytest.mark.skipif(not SHARED.exists(), reason="the shared case file is not here")
def test_the_shared_cases_all_pass() -> None:
    result = conform.run(SHARED)
    assert conform.report_lines(result) == [f"{len(result.passed)} passed, 0 failed, 0 skipped"]
