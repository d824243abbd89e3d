"""What the other processes of a run do: pull each lever together with the first one, which alone measures, decides and writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.agents import load_world
from posttrain.pipeline.console import Console
from posttrain.pipeline.material import gather
from posttrain.pipeline.play import Player
from posttrain.pipeline.pull import pull
from posttrain.pipeline.runtime import Runtime, parse_dtype, prepare_process
from posttrain.policy.device import find_device
from posttrain.recipe import Recipe, StageRecipe
from posttrain.stages.bench import Workbench
from posttrain.training import team


@dataclass(frozen=True, slots=True)
class Order:
    """One stage to train: what the first process's workbench is made of. `parent` and `folder` must be visible to every process."""

    stage: StageRecipe
    parent: Path
    folder: Path
    identity: str
    seed: int
    pack_tokens: int
    dtype: str
    renderings: Path


def call(order: Order | None) -> None:
    """From the first process: have the others train this stage too. None: the run is over."""
    team().order(order)


def assist(recipe: Recipe) -> dict[str, Any]:
    """In every other process: do what the first one calls for, until the run is over."""
    prepare_process(recipe.threads)
    world = load_world(recipe.world)
    device = find_device(recipe.device)
    nothing: Order | None = None
    while (order := team().order(nothing)) is not None:
        runtime = Runtime.load(order.parent, parse_dtype(order.dtype), device)
        runtime.policy.recompute = recipe.recompute
        bench = Workbench(
            runtime.policy,
            runtime.contract,
            order.folder,
            order.identity,
            order.seed,
            order.pack_tokens,
            renderings=order.renderings,
        )
        material = gather(order.stage, world, recipe.seed)
        pull(order.stage, material, bench, Player(runtime, world, Console(quiet=True)), runtime, str(order.parent))
    return {}
