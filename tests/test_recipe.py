"""Recipes: what is wrong is named with place, nearest key and remedy; overrides reach stages by name; nothing is guessed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import posttrain
from posttrain.errors import RecipeError
from posttrain.evaluation.scorecard import SUITE_METRICS, TASK_METRICS
from posttrain.recipe import (
    DataOptions,
    EvaluationRecipe,
    Recipe,
    StageKind,
    StageRecipe,
    gate_policy,
    load_recipe,
    options_type,
    parse_recipe,
    stage_options,
)

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SMALL = """
name: small
base: smollm2-135m
stages:
  - name: sft
    kind: sft
    data: {n: 8}
    options: {batch: 4, optimiser: {lr: 1e-3}}
    gate: {targets: [{metric: tool_success, min_gain: 0.1}]}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, "utf-8")
    return path


def refused(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(folder, text), overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_are_valid_and_walk_all_six_stages(path: Path) -> None:
    recipe = load_recipe(path)
    assert {stage.kind for stage in recipe.stages} == {"sft", "tools", "preference", "reason", "distill", "adapters"}
    assert all(gate_policy(stage).targets for stage in recipe.stages)


def test_the_fast_recipe_has_the_stages_and_gates_of_the_demo() -> None:
    demo, fast = (load_recipe(path) for path in RECIPES)
    assert [(s.name, s.kind, s.gate) for s in demo.stages] == [(s.name, s.kind, s.gate) for s in fast.stages]


def test_numbers_words_and_booleans_are_read_as_written(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, SMALL.replace("name: small", "name: no")))
    assert recipe.name == "no"
    assert stage_options(recipe.stages[0]).optimiser.lr == 1e-3


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ("{}", ("without targets",)),
        ("{targets: [{metric: tool_succes}]}", ("targets[0]", "'tool_succes'", "did you mean tool_success?")),
        ("{targets: [{metric: tool_success}], guardrails: [{metric: kl, max_drop: 0}]}", ("guardrails[0]", "known:")),
        ("{targets: [{metric: tool_success}], proxy: reward}", ("gate.proxy", "'reward'")),
        ("{targets: [{metric: tool_success, slice: kind=lookups}]}", ("'lookups'", "did you mean lookup?")),
        ("{targets: [{metric: tool_success, slice: kind=advise}]}", ("no task of this kind is measured",)),  # its count is 0
        ("{targets: [{metric: tool_success, slice: lookup}]}", ("kind=NAME",)),
        ("{targets: [{metric: latency_ratio, slice: kind=lookup}]}", ("not of a slice",)),
        ("{targets: [{metric: kl_to_parent, at_most: 1}]}", ("not measured", "evaluation")),  # drift: 0
        ("{targets: [{metric: tool_success}], confidence: 95}", ("between 0.5 and 1", "95")),
        ("{targets: [{metric: tool_success}], confidence: .nan}", ("confidence",)),
        ("{targets: [{metric: tool_success}], guardrails: [{metric: high_risk_refusal}]}", ("guardrails[0]", "guards nothing")),
        (
            "{targets: [{metric: tool_success}], guardrails: [{metric: high_risk_refusal, max_drop: 3, at_least: 0.2}]}",
            ("guardrails[0].max_drop", "guards nothing", "0.05"),
        ),
        ("{targets: [{metric: tool_success, at_least: 95}]}", ("targets[0].at_least", "between 0 and 1", "95")),
        ("{targets: [{metric: tool_success, min_gain: 15}]}", ("targets[0].min_gain", "between 0 and 1", "15")),
        (
            "{targets: [{metric: tool_success}], guardrails: [{metric: truncated, max_drop: -0.1}]}",
            ("guardrails[0].max_drop", "-0.1"),
        ),
        (
            "{targets: [{metric: tool_success}], guardrails: [{metric: false_refusal, max_drop: 0.1, direction: up}]}",
            ("guardrails[0].direction", "direction: down"),
        ),
        ("{targets: [{metric: mean_length}]}", ("targets[0]", "direction")),
        ("{targets: [{metric: tool_success, min_gain: -0.1}]}", ("targets[0].min_gain", "-0.1")),
    ],
)
def test_a_gate_that_no_scorecard_could_answer_is_refused_before_anything_is_trained(
    gate: str, said: tuple[str, ...], tmp_path: Path
) -> None:
    text = SMALL.replace("{targets: [{metric: tool_success, min_gain: 0.1}]}", gate)
    message = refused(tmp_path, text + "evaluation: {kinds: {lookup: 3, advise: 0}, drift: 0}\n")
    assert "stages[0] (sft).gate" in message
    for part in said:
        assert part in message


def test_metrics_that_gates_may_name_are_those_that_are_measured() -> None:
    """The names a scorecard can hold, read from the code that writes them."""
    source = Path(posttrain.__file__).parent
    for file, names in (("evaluation/run.py", TASK_METRICS), ("pipeline/measure.py", SUITE_METRICS)):
        text = (source / file).read_text("utf-8")
        assert [name for name in names if f'"{name}"' not in text] == []


def test_what_is_not_text_or_not_yaml_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: café".encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    assert "seed={a" in refused(tmp_path, SMALL, "seed={a")
    assert "threads" in refused(tmp_path, SMALL, "threads=-1")
    assert "called base" in refused(tmp_path, SMALL.replace("name: sft", "name: base"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SMALL.replace("world", "w") + "wrold: finance_ops\n", ("wrold", "world?")),
        (SMALL.replace("kind: sft", "kind: sfd"), ("kind",)),
        (SMALL.replace("batch: 4", "bach: 4"), ("'bach'", "batch?", "stages[0] (sft).options")),
        (SMALL.replace("lr: 1e-3", "learning_rate: 1e-3"), ("learning_rate", "options.optimiser")),
        (SMALL.replace("min_gain", "min_gian"), ("'min_gian'", "min_gain?", "gate.targets[0]")),
        (SMALL.replace("n: 8", "n: 0"), ("greater than 0",)),
        (SMALL.replace("n: 8", "n: many"), ("many",)),
        (SMALL.replace("batch: 4", "batch: 0"), ("batch", "greater than or equal to 1", "stages[0] (sft).options")),
        (SMALL.replace("lr: 1e-3", "lr: -1e-3"), ("optimiser.lr", "greater than 0")),
        (SMALL + "seed: 1\nseed: 2\n", ("twice", "seed")),
        ("- a\n- b\n", ("not a mapping",)),
        ("name: [", ("not YAML",)),
        (SMALL.replace("base: smollm2-135m\n", ""), ("base",)),
        ("name: x\nbase: y\nstages: []\n", ("stages",)),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: tuple[str, ...]) -> None:
    message = refused(tmp_path, text)
    assert all(part in message for part in (*said, "recipe.yaml")), message


def test_two_stages_of_one_name_are_refused(tmp_path: Path) -> None:
    stage = SMALL.split("stages:\n")[1]
    assert "same name: sft" in refused(tmp_path, SMALL + stage)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "missing.yaml")


def test_overrides_reach_stages_by_name_and_number(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL)
    recipe = load_recipe(path, ["seed=9", "stages.sft.data.n=3", "stages.0.options.optimiser.lr=2e-4", "evaluation.free=2"])
    assert (recipe.seed, recipe.stages[0].data.n, recipe.evaluation.free) == (9, 3, 2)
    assert stage_options(recipe.stages[0]).optimiser.lr == 2e-4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "key.sub=value"),
        ("=3", "key.sub=value"),
        ("stages.sfd.data.n=3", "did you mean sft?"),
        ("name.deeper=3", "below a plain value"),
        ("sede=3", "seed?"),
    ],
)
def test_overrides_that_name_nothing_are_refused(tmp_path: Path, override: str, said: str) -> None:
    assert said in refused(tmp_path, SMALL, override)


def test_the_hash_is_of_what_decides_the_result(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL)
    plain = load_recipe(path)
    assert plain.hash == load_recipe(path, ["name=other", "output=elsewhere", "threads=1"]).hash
    assert plain.hash != load_recipe(path, ["seed=2"]).hash
    assert plain.hash != load_recipe(path, ["stages.sft.options.batch=8"]).hash


def test_plain_data_is_enough() -> None:
    gate = {"targets": [{"metric": "tool_success"}]}
    recipe = parse_recipe({"name": "x", "base": "b", "stages": [{"name": "s", "kind": "sft", "gate": gate}]})
    assert recipe.stages == [StageRecipe(name="s", kind="sft", gate=gate)]


def option_names(cls: Any) -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        yield name
        if is_dataclass(hint):
            yield from option_names(hint)


def test_the_page_about_recipes_names_every_key() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text("utf-8")
    page = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    named = set(re.findall(r"[a-z_0-9]+", " ".join(re.findall(r"`([^`]+)`", page))))
    keys = {key for model in (Recipe, EvaluationRecipe, StageRecipe, DataOptions) for key in model.model_fields}
    keys |= {name for kind in get_args(StageKind) for name in option_names(options_type(kind))}
    assert len(keys) > 50
    assert keys - named == set()
