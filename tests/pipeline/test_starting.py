"""What a run pins when it starts, and what it refuses before anything is measured or trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.conftest import Killed, make_base, tiny_recipe
from posttrain.agents.world import load_world
from posttrain.data import write_jsonl
from posttrain.errors import RecipeError, RegistryError, StorageError
from posttrain.pipeline.checks import check_recipe
from posttrain.pipeline.run import _Run, run_recipe
from posttrain.recipe import Recipe, parse_recipe

EXPECTED = {"calls": [{"name": "cash_position", "arguments": {"account": "payroll"}}]}


def write_suite(path: Path, **change: Any) -> Path:
    row = {"request": "can payroll clear on friday?", "tenant": "bank_A", "environment": {"world": "finance_ops", "seed": 7}}
    path.write_text("\n".join(json.dumps({"id": f"t{i}", **row, "expected": EXPECTED, **change}) for i in range(2)))
    return path


def write_data(path: Path, seed: int) -> Path:
    write_jsonl(path, load_world("finance_ops").conversations(shapes={"single_turn": 1.0}, n=4, split="train", seed=seed))
    return path


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a suite, data and a run over them that was killed when the base had been measured."""
    folder = tmp_path_factory.mktemp("begun")
    make_base(folder / "base")
    write_suite(folder / "suite.jsonl")
    write_data(folder / "data.jsonl", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_pull", killed)
        with pytest.raises(Killed):
            run_recipe(of_files(folder, folder / "runs"), quiet=True)
    return folder


def killed(*_: Any) -> None:
    raise Killed


def of_files(folder: Path, runs: Path, **changes: Any) -> Recipe:
    whole = tiny_recipe(folder / "base", runs)
    stage = {**whole["stages"][0], "data": {"path": str(folder / "data.jsonl")}}
    evaluation = {"suite": str(folder / "suite.jsonl"), "max_tokens": 8, "free": 1, "drift": 1, "latency": 1}
    return parse_recipe({**whole, "stages": [stage], "evaluation": evaluation, **changes})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda at: write_suite(at / "suite.jsonl", expected={"refusal": True}),
            r"evaluation\.suite: .*suite\.jsonl is not what",
        ),
        (lambda at: write_data(at / "data.jsonl", 2), r"stages\.sft\.data: .*data\.jsonl is not what"),
        (lambda at: make_base(at / "base", initializer_range=0.2), r"base: .*base is not what"),
    ],
)
def test_a_run_does_not_go_on_with_other_inputs(begun: Path, change: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Run, "_pull", killed)
    kept = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file() and "runs" not in path.parts}
    change(begun)
    with pytest.raises(RecipeError, match=said + r" this run was started with.*give the run another name"):
        run_recipe(of_files(begun, begun / "runs"), quiet=True)
    for path, data in kept.items():
        path.write_bytes(data)
    with pytest.raises(Killed):  # as it was, it goes on
        run_recipe(of_files(begun, begun / "runs"), quiet=True)


def test_a_run_that_an_earlier_version_began_goes_on_and_is_pinned_from_then(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Run, "_pull", killed)
    shutil.copytree(begun / "runs", tmp_path / "runs")
    note = tmp_path / "runs/tiny/run.json"
    noted = json.loads(note.read_text())
    note.write_text(json.dumps({key: value for key, value in noted.items() if key != "inputs"}))
    with pytest.raises(Killed):
        run_recipe(of_files(begun, tmp_path / "runs"), quiet=True)
    assert json.loads(note.read_text()) == noted


def asking(**gate: Any) -> dict[str, Any]:
    return {"gate": {"targets": [{"metric": "schema_validity_constrained", "at_least": 0.0}], **gate}}


@pytest.mark.parametrize(
    ("top", "stage", "evaluation", "said"),
    [
        ({"channel": "prod eu"}, {}, {}, ("channel", "'prod eu'", "letters, digits")),
        ({"channel": "e" * 120}, {}, {}, ("channel", "-retail_B'", "at most 128")),
        (
            {},
            asking(guardrails=[{"metric": "high_risk_refusal", "max_drop": 0.03}]),
            {},
            ("stages.sft.gate.guardrails[0]", "'high_risk_refusal'", "add high-risk tasks to `evaluation`"),
        ),
        ({}, asking(proxy="false_refusal"), {"kinds": {"high_risk": 2}}, ("stages.sft.gate.proxy", "tasks without high risk")),
        (
            {},
            asking(targets=[{"metric": "tool_success", "slice": "tenant=bank_a"}]),
            {},
            ("stages.sft.gate.targets[0]", "'tenant=bank_a'", "did you mean bank_A?"),
        ),
        (
            {},
            asking(targets=[{"metric": "tool_success", "slice": "kind=pay"}]),
            {"kinds": {}, "suite": "SUITE"},
            ("stages.sft.gate.targets[0]", "known: task"),
        ),
        (
            {},
            asking(targets=[{"metric": "schema_validity_free", "slice": "kind=benign"}]),
            {"free": 1},
            ("stages.sft.gate.targets[0]", "none of the 1 turns", "evaluation.free"),
        ),
        ({}, {"kind": "adapters"}, {"kinds": {}, "suite": "SUITE"}, ("stages.sft.kind", "task t0", "bank_A, retail_B, saas_C")),
    ],
)
def test_what_the_suite_cannot_answer_is_refused_by_check_and_before_anything_is_measured(
    top: dict[str, Any],
    stage: dict[str, Any],
    evaluation: dict[str, Any],
    said: tuple[str, ...],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite = write_suite(tmp_path / "suite.jsonl", tenant=None)
    whole = tiny_recipe(tiny_base, tmp_path / "runs", **top)
    asked = {**whole["evaluation"], "kinds": {"lookup": 2, "benign": 2}, **evaluation}
    whole["evaluation"] = {key: str(suite) if value == "SUITE" else value for key, value in asked.items()}
    whole["stages"] = [{**whole["stages"][0], **stage}]
    monkeypatch.setattr(_Run, "_base", lambda _: pytest.fail("the base was measured"))
    for command in (lambda: list(check_recipe(parse_recipe(whole))), lambda: run_recipe(parse_recipe(whole), quiet=True)):
        with pytest.raises((RecipeError, RegistryError)) as caught:
            command()
        assert [part for part in said if part not in str(caught.value)] == [], caught.value
    assert not list(tmp_path.rglob("run.json"))


def test_false_refusals_are_not_asked_for_where_every_task_expects_one(tiny_base: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.jsonl", expected={"refusal": True})
    whole = tiny_recipe(tiny_base, tmp_path / "runs")
    whole["evaluation"] = {**whole["evaluation"], "kinds": {}, "suite": str(suite)}
    whole["stages"] = [{**whole["stages"][0], **asking(guardrails=[{"metric": "false_refusal", "max_drop": 0.03}])}]
    with pytest.raises(RecipeError, match="no task of the suite is measured by it"):
        list(check_recipe(parse_recipe(whole)))


def test_a_run_that_was_refused_has_not_started(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Run, "_base", killed)
    whole = of_files(begun, tmp_path).model_dump()
    whole["stages"][0]["data"] = {"path": str(tmp_path / "no-such-file.jsonl")}
    with pytest.raises(StorageError, match="no-such-file"):
        run_recipe(parse_recipe(whole), quiet=True)
    with pytest.raises(Killed):  # mended, it has the same name
        run_recipe(of_files(begun, tmp_path), quiet=True)
