"""Recipes: what is wrong is named with place, nearest key and remedy; overrides reach stages by name; nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.errors import RecipeError
from posttrain.recipe import StageRecipe, gate_policy, load_recipe, parse_recipe, stage_options

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
    ("text", "said"),
    [
        (SMALL.replace("world", "w") + "wrold: finance_ops\n", ("wrold", "'world'")),
        (SMALL.replace("kind: sft", "kind: sfd"), ("kind",)),
        (SMALL.replace("batch: 4", "bach: 4"), ("'bach'", "'batch'", "stages[0] (sft).options")),
        (SMALL.replace("lr: 1e-3", "learning_rate: 1e-3"), ("learning_rate", "options.optimiser")),
        (SMALL.replace("min_gain", "min_gian"), ("'min_gian'", "'min_gain'", "gate.targets[0]")),
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
        ("stages.sfd.data.n=3", "did you mean 'sft'"),
        ("name.deeper=3", "below a plain value"),
        ("sede=3", "'seed'"),
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
    recipe = parse_recipe({"name": "x", "base": "b", "stages": [{"name": "s", "kind": "sft"}]})
    assert recipe.stages == [StageRecipe(name="s", kind="sft")]
