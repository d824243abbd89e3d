"""What a stage learns from: shares are kept, and data options that would decide nothing, or fail only later, are refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.agents.world import load_world
from posttrain.data import write_jsonl
from posttrain.errors import RecipeError
from posttrain.pipeline.material import gather
from posttrain.recipe import DataOptions, StageRecipe

WORLD = load_world("finance_ops")


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


def test_a_file_gives_what_it_holds_and_a_student_plays_tasks_beside_it(file: str) -> None:
    assert len(gather(stage("sft", path=file), WORLD, 1).conversations) == 12
    both = gather(stage("distill", path=file, n=8, own_share=0.5, kinds={"lookup": 1}), WORLD, 1)
    assert (len(both.tasks), len(both.conversations)) == (4, 12)


@pytest.mark.parametrize("kinds", [{"lookup": 3, "benign": 1}, {"lookup": 0.3, "benign": 0.1}, {"lookup": 0.75, "benign": 0.25}])
def test_shares_of_kinds_are_kept_whatever_they_add_up_to(kinds: dict[str, float]) -> None:
    tasks = gather(stage("reason", n=40, kinds={**kinds, "reconcile": 0.0}), WORLD, 1).tasks
    assert Counter(task.kind for task in tasks) == {"lookup": 30, "benign": 10}
