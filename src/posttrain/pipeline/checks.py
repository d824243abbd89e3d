"""`posttrain check`: everything that can be wrong before training, found without training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from posttrain.agents.world import load_world
from posttrain.contract import Contract, preflight
from posttrain.data.records import Conversation
from posttrain.errors import StorageError
from posttrain.evaluation import Suite
from posttrain.pipeline.material import Material, gather
from posttrain.policy.base import free_bytes, resolve_base
from posttrain.recipe import Recipe, StageRecipe, stage_options
from posttrain.stages.reason import ReasonOptions, check_tasks

# merged parents, releases and checkpoints of one stage, as multiples of the base's own files
_COPIES_PER_STAGE = 3


def check_recipe(recipe: Recipe) -> Iterator[str]:
    """Yields a line for each thing found in order; raises at the first that is not."""
    folder = resolve_base(recipe.base)
    contract = Contract.load(folder)
    yield f"base: {folder} ({contract.template.name}, {contract.vocabulary_size} tokens)"
    check_disk(recipe, folder)
    yield f"disk: {free_bytes(Path(recipe.output)) / 1e9:.1f} GB free"
    world = load_world(recipe.world)
    for stage in recipe.stages:
        yield f"stage {stage.name}: {check_material(stage, gather(stage, world, recipe.seed), contract)}"
    wanted = recipe.evaluation
    suite = Suite.load(wanted.suite or recipe.world, split=wanted.split, seed=wanted.seed, kinds=wanted.kinds or None, n=96)
    longest = max((len(contract.prompt_ids(task.messages, task.tools)) for task in suite.tasks), default=0)
    yield f"suite: {len(suite.tasks)} tasks, longest prompt {longest} tokens"


def check_disk(recipe: Recipe, base: Path) -> None:
    """Raise StorageError when the run would not fit."""
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    needed, free = size * _COPIES_PER_STAGE * len(recipe.stages), free_bytes(Path(recipe.output))
    if needed > free:
        raise StorageError(
            f"the run may need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free",
            where=recipe.output,
            remedy="free some space, or name another folder with output=...",
        )


def check_material(stage: StageRecipe, material: Material, contract: Contract) -> str:
    """Render and check every record of a stage; a line that says what there is."""
    options = stage_options(stage)
    if isinstance(options, ReasonOptions):
        check_tasks(options, material.tasks, where=f"stages.{stage.name}.data")
    limit = int(getattr(options, "max_tokens", 1 << 20))
    conversations: list[Conversation] = [*material.conversations, *(c for records in material.tenants.values() for c in records)]
    named = [(c.id, contract.render(c)) for c in conversations]
    for pair in material.preferences:
        named += [
            (f"{pair.id} ({side})", sequence)
            for side, sequence in zip(("chosen", "rejected"), contract.render_preference(pair), strict=True)
        ]
    if not named:
        return f"{len(material.tasks)} tasks to play"
    found = preflight(named, max_tokens=limit, end_of_turn=contract.end_of_turn)
    tasks = f", {len(material.tasks)} tasks to play" if material.tasks else ""
    return f"{found.records} records, {found.tokens} tokens, {found.learned} learned, longest {found.longest}{tasks}"
