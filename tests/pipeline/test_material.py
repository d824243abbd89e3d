"""What a stage learns from: shares are kept, and data options that would decide nothing, or fail only later, are refused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.agents.world import load_world
from posttrain.contract import Contract
from posttrain.contract.rendering import Renderer
from posttrain.data import write_jsonl
from posttrain.errors import DataError, PosttrainError, RecipeError
from posttrain.evaluation import Suite
from posttrain.pipeline.checks import check_demonstrations, check_material, check_recipe, check_tenants
from posttrain.pipeline.console import Console
from posttrain.pipeline.material import Material, gather
from posttrain.recipe import DataOptions, StageRecipe, parse_recipe

WORLD = load_world("finance_ops")
TASK = {
    "id": "a", "request": "can payroll clear?", "tenant": "bank_A", "environment": {"world": "finance_ops", "seed": 7},
    "expected": {"calls": [{"name": "cash_position", "arguments": {"account": "payroll"}}]},
}  # fmt: skip


WORLD_KINDS = ("lookup", "advise", "high_risk", "benign", "reconcile", "facts")
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def stage(kind: str, **data: Any) -> StageRecipe:
    return StageRecipe(name="it", kind=kind, data=DataOptions(**data))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve conversations of two of the three tenants, without a call."""
    records = WORLD.conversations(shapes={"single_turn": 1.0}, n=24, split="train", seed=5)
    plain = [record for record in records if not any(message.tool_calls for message in record.messages)]
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"
    write_jsonl(path, [record for record in plain if record.tenant != "saas_C"][:12])
    return str(path)


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        ("sft", {"n": 4, "kinds": {"lookup": 1}}, ("it.data.kinds", "decides nothing for sft")),
        ("reason", {"n": 4, "kinds": {"lookup": 1}, "shapes": {"single_turn": 1.0}}, ("it.data.shapes",)),
        ("preference", {"n": 4, "own_share": 0.5}, ("it.data.own_share",)),
        ("reason", {"n": 4, "kinds": {"lookup": 0}}, ("needs kinds of tasks",)),
        ("sft", {"n": 4, "path": "FILE"}, ("it.data.n", "beside a path")),
        ("distill", {"path": "FILE", "kinds": {"lookup": 1}}, ("would not be read", "own_share")),
        (
            "distill",
            {"path": "FILE", "own_share": 0.5, "kinds": {"lookup": 1}, "shapes": {"single_turn": 1.0}},
            ("it.data.shapes",),
        ),
        ("tools", {"path": "FILE"}, ("no record holds a tool call",)),
        ("adapters", {"path": "FILE"}, ("no record of saas_C", "mine.jsonl")),
    ],
)
def test_data_options_that_cannot_be_meant_are_refused(kind: str, data: dict[str, Any], said: tuple[str, ...], file: str) -> None:
    with pytest.raises(RecipeError) as caught:
        gather(stage(kind, **{key: file if value == "FILE" else value for key, value in data.items()}), WORLD, 1)
    for part in said:
        assert part in str(caught.value)


def test_a_record_of_nobody_is_refused_where_adapters_are_made_by_tenant(tmp_path: Path) -> None:
    records = WORLD.conversations(shapes={"single_turn": 1.0}, n=6, split="train", seed=5)
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, [*records[:5], replace(records[5], tenant=None)])
    with pytest.raises(RecipeError, match=r"mine\.jsonl: record .*tenant.*bank_A, retail_B, saas_C"):
        gather(stage("adapters", path=str(path)), WORLD, 1)


@pytest.mark.parametrize(("tenant", "said"), [("acme.com", "no adapter can have this name"), ("main", "of all tenants")])
def test_a_tenant_no_adapter_can_be_called_after_is_refused_before_anything_is_trained(tenant: str, said: str) -> None:
    with pytest.raises(PosttrainError, match=rf"stages\.it: tenant.*{said}.*{tenant}"):
        check_tenants(Material(tenants={"bank_A": [], tenant: []}), "stages.it: tenant")


def test_a_file_gives_what_it_holds_and_a_student_plays_tasks_beside_it(file: str) -> None:
    assert len(gather(stage("sft", path=file), WORLD, 1).conversations) == 12
    both = gather(stage("distill", path=file, n=8, own_share=0.5, kinds={"lookup": 1}), WORLD, 1)
    assert (len(both.tasks), len(both.conversations)) == (4, 12)


@pytest.mark.parametrize("kinds", [{"lookup": 3, "benign": 1}, {"lookup": 0.3, "benign": 0.1}, {"lookup": 0.75, "benign": 0.25}])
def test_shares_of_kinds_are_kept_whatever_they_add_up_to(kinds: dict[str, float]) -> None:
    tasks = gather(stage("reason", n=40, kinds={**kinds, "reconcile": 0.0}), WORLD, 1).tasks
    assert Counter(task.kind for task in tasks) == {"lookup": 30, "benign": 10}


def rows(folder: Path, *lines: dict[str, Any]) -> str:
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_tasks_to_learn_from_are_completed_as_a_suites_are(tmp_path: Path) -> None:
    path = rows(tmp_path, TASK, {**TASK, "id": "b", "tools": ["cash_position"]})
    short, named = gather(stage("reason", path=path), WORLD, 1).tasks
    suite = Suite.load(path).tasks
    assert (short.messages, short.tools, short.response_schema) == (suite[0].messages, suite[0].tools, suite[0].response_schema)
    assert short.tools == WORLD.tools("bank_A")
    assert [tool.name for tool in named.tools] == ["cash_position"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"expected": None, "verifier": "finance_ops.lokup"}, ("verifier", "finance_ops.lookup")),
        ({"expected": {"cals": []}}, ("expected", "did you mean calls?")),
        ({"tenant": "bank_Z"}, ("tenant", "'bank_Z'", "bank_A")),
        ({"environment": {"world": "mars", "seed": 1}}, ("environment", "'mars'", "finance_ops")),
    ],
)
def test_a_task_to_learn_from_that_nobody_could_judge_is_refused_with_its_row(
    change: dict[str, Any], said: tuple[str, ...], tmp_path: Path
) -> None:
    bad = {key: value for key, value in {**TASK, "id": "b", **change}.items() if value is not None}
    with pytest.raises(DataError) as caught:
        gather(stage("reason", path=rows(tmp_path, TASK, bad)), WORLD, 1)
    for part in ("mine.jsonl:2", *said):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", {"messages": CHAT}),
        (
            "adapters",
            {"messages": CHAT, "tenant": "bank_A"},
        ),
        ("preference", {"prompt": "hi", "chosen": "ho", "rejected": "hu"}),
        ("reason", TASK),
    ],
)
def test_nothing_learns_from_a_row_of_another_split(kind: str, row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mine\.jsonl:2: split: is not train; got 'test'; .*take it out of the file"):
        gather(
            stage(kind, path=rows(tmp_path, {**row, "id": "1", "split": "train"}, {**row, "id": "2", "split": "test"})), WORLD, 1
        )


def test_a_row_that_names_no_split_is_the_train_splits(tmp_path: Path) -> None:
    assert [task.split for task in gather(stage("reason", path=rows(tmp_path, TASK)), WORLD, 1).tasks] == ["train"]


def test_a_field_that_has_no_place_in_a_record_is_named_before_anything_is_trained(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = [*CHAT[:1], {**CHAT[1], "content": [{"type": "reasoning"}, {"type": "text", "text": "ho"}]}]
    path = rows(tmp_path, {"messages": CHAT, "system": "be kind"}, {"messages": shown, "system": "be kind"})
    Path(path).rename(tmp_path / "chat.jsonl")
    rows(tmp_path, {**TASK, "difficulty": 3})
    recipe = parse_recipe(
        {
            "name": "x", "base": str(tiny_base), "output": str(tmp_path / "runs"), "evaluation": {"suite": path},
            "stages": [{"name": "s", "kind": "sft", "data": {"path": str(tmp_path / "chat.jsonl")},
                        "gate": {"targets": [{"metric": "task_success"}]}}],
        }
    )  # fmt: skip
    lines = list(check_recipe(recipe))
    lost = [
        f"{tmp_path}/chat.jsonl: `messages[].content[reasoning]` has no place in a record: left out of 1 of 2 rows",
        f"{tmp_path}/chat.jsonl: `system` has no place in a record: left out of 2 of 2 rows",
    ]
    assert [line for line in lines if "no place" in line] == [
        *lost,
        f"{path}: `difficulty` has no place in a record: left out of 1 of 1 rows",
    ]
    material = gather(recipe.stages[0], WORLD, 1)
    check_material(recipe.stages[0], material, Renderer(Contract.load(tiny_base)), Console())  # as `run` does
    assert "content[reasoning]`" in capsys.readouterr().err.replace("\n", "")


DEMONSTRATION = [
    {
        "role": "assistant",
        "tool_calls": [{"id": "c", "function": {"name": "cash_position", "arguments": {"account": "payroll"}}}],
    },
    {"role": "assistant", "content": '{"decision":"answer"}'},
]
OTHER = [{**DEMONSTRATION[1]}]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([TASK], "stages.it.options.collect.demonstrate: none of its 1 tasks has a demonstration"),
        # what is learned from are the first tasks; another half's demonstrations do not help
        ([TASK, {**TASK, "id": "b", "demonstration": DEMONSTRATION}], "none of its 1 tasks has a demonstration"),
        ([{**TASK, "demonstration": OTHER}], "task a: demonstration: its ver"),
        (
            [{**TASK, "max_turns": 2, "demonstration": [*DEMONSTRATION, {"role": "assistant", "content": "And so on."}]}],
            "task a: demonstration: its episode ends (end_of_turn) after turn 2 of 3",
        ),
        ([{**TASK, "demonstration": [{**turn, "weight": 0} for turn in DEMONSTRATION]}], "train on zero tokens: "),
    ],
)
def test_demonstrations_are_played_before_anything_is_trained(
    lines: list[dict[str, Any]], said: str, tiny_base: Path, tmp_path: Path
) -> None:
    asked = stage("reason", path=rows(tmp_path, *lines)).model_copy(
        update={"options": {"collect": {"tasks": 1, "demonstrate": True}, "grpo": {"steps": 0}, "max_tokens": 2048}}
    )
    material, contract = gather(asked, WORLD, 1), Contract.load(tiny_base)
    with pytest.raises(PosttrainError) as caught:
        check_demonstrations(asked, material, contract, WORLD)
    assert said in str(caught.value)


def test_the_worlds_own_tasks_show_how_only_where_they_are_to_be_learned_from(tiny_base: Path) -> None:
    asked = stage("reason", n=24, kinds=dict.fromkeys(WORLD_KINDS, 1)).model_copy(
        update={"options": {"collect": {"tasks": 24, "demonstrate": True}, "grpo": {"steps": 0}, "max_tokens": 2048}}
    )
    material = gather(asked, WORLD, 1)
    assert all(task.demonstration for task in material.tasks)
    check_demonstrations(asked, material, Contract.load(tiny_base), WORLD)
    assert not any(task.demonstration for task in WORLD.tasks(kinds=WORLD_KINDS, n=12, split="test", seed=1))
