"""`posttrain check`: everything that can be wrong before training, found without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

from posttrain.agents.demonstration import assistant_turns, play_demonstration
from posttrain.agents.guard import Guard
from posttrain.agents.world import World, load_world
from posttrain.contract import Contract, preflight
from posttrain.contract.rendering import Renderer
from posttrain.data.records import Episode, Task
from posttrain.errors import DataError, RecipeError, StorageError, nearest_of
from posttrain.evaluation import Suite
from posttrain.evaluation.gate import asked
from posttrain.evaluation.run import refusal_metric
from posttrain.pipeline.console import Console
from posttrain.pipeline.material import Material, gather
from posttrain.pipeline.measure import spread
from posttrain.pipeline.publish import channel_of
from posttrain.pipeline.pull import MAIN
from posttrain.policy.base import free_bytes, resolve_base
from posttrain.policy.lora import check_adapter_name
from posttrain.policy.policy import Policy
from posttrain.recipe import Recipe, StageRecipe, gate_policy, stage_options
from posttrain.releases.channels import check_channel_name
from posttrain.stages.distill import DistillOptions, check_layers
from posttrain.stages.distill import check as check_student
from posttrain.stages.reason import ReasonOptions, check_tasks
from posttrain.training import team

# merged parents, releases and checkpoints of one stage, as multiples of the base's own files
_COPIES_PER_STAGE = 3
_MANY = 2000  # records from which rendering shows its progress


def check_recipe(recipe: Recipe) -> Iterator[str]:
    """Yields a line for each thing found in order; raises at the first that is not."""
    folder = resolve_base(recipe.base)
    contract = Contract.load(folder)
    yield f"base: {folder} ({contract.template.name}, {contract.vocabulary_size} tokens)"
    check_students(recipe, folder)
    check_disk(recipe, folder)
    world, suite = check_measured(recipe)
    yield f"disk: {free_bytes(Path(recipe.output)) / 1e9:.1f} GB free"
    for stage in recipe.stages:
        material = gather(stage, world, recipe.seed)
        yield from material.notes
        yield f"stage {stage.name}: {check_material(stage, material, Renderer(contract))}"
        check_demonstrations(stage, material, contract, world)
    yield from suite.notes
    longest = max((len(contract.prompt_ids(task.messages, task.tools)) for task in suite.tasks), default=0)
    yield f"suite: {len(suite.tasks)} tasks, longest prompt {longest} tokens"


def check_measured(recipe: Recipe) -> tuple[World, Suite]:
    """The world, and the suite that every candidate is measured on. Raise RecipeError for a gate that no scorecard of that suite could
    answer, for tasks that no tenant's adapter would, and RegistryError for channels that could not be moved."""
    world, wanted = load_world(recipe.world), recipe.evaluation
    for channel in (recipe.channel, *(channel_of(recipe, tenant) for tenant in world.tenants)):
        check_channel_name(channel)
    suite = Suite.load(wanted.suite or recipe.world, split=wanted.split, seed=wanted.seed, kinds=wanted.kinds or None, n=96)
    if suite.world not in (None, world.name):
        raise RecipeError(
            f"the suite's tasks are of another world than the run, {world.name}",
            where="evaluation.suite",
            value=suite.world,
            remedy="set `world` to the suite's, or choose a suite of this one",
        )
    for stage in recipe.stages:
        where = f"stages.{stage.name}"
        for place, metric, slice in asked(gate_policy(stage), f"{where}.gate"):
            _check_asked(suite, wanted.free, place, metric, slice)
        if stage.kind == "adapters":
            _check_tenants(suite, world, where)
    return world, suite


# metrics that are of some tasks only; of the others, what a verifier finds decides
_OF_SOME = {"high_risk_refusal": "high-risk tasks", "false_refusal": "tasks without high risk"}


def _check_asked(suite: Suite, free: int, where: str, metric: str, slice: str | None) -> None:
    tasks = list(suite.tasks)
    if slice is not None:
        key, _, label = slice.partition("=")
        tasks = [task for task in tasks if getattr(task, key) == label]
        if not tasks:
            known = sorted({str(getattr(task, key)) for task in suite.tasks} - {"None"})
            raise RecipeError("no task of the suite is in this slice", where=where, value=slice, remedy=nearest_of(label, known))
    if metric in _OF_SOME and not any(refusal_metric(task) == metric for task in tasks):
        raise RecipeError(
            f"no task of {slice or 'the suite'} is measured by it",
            where=where,
            value=metric,
            remedy=f"add {_OF_SOME[metric]} to `evaluation`, or leave it out",
        )
    if metric == "schema_validity_free" and not {task.id for task in tasks} & {task.id for task in spread(suite.tasks, free)}:
        raise RecipeError(
            f"none of the {free} turns drawn without a grammar is in this slice",
            where=where,
            value=slice,
            remedy="raise evaluation.free",
        )


def _check_tenants(suite: Suite, world: World, where: str) -> None:
    for task in suite.tasks:
        if task.tenant not in world.tenants:
            raise RecipeError(
                f"no tenant's adapter would answer the suite's task {task.id}",
                where=f"{where}.kind",
                value=task.tenant,
                remedy=f"give every task one of {', '.join(world.tenants)}",
            )


def check_students(recipe: Recipe, base: Path) -> None:
    """Raise RecipeError when a student would keep more than the base has (its teacher, a student itself, may have less), and
    BaseModelError when layers like the base's cannot be fitted or followed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    students = {stage.name: options for stage in recipe.stages if isinstance(options := stage_options(stage), DistillOptions)}
    if not students:
        return
    config = AutoConfig.from_pretrained(base)
    for name, options in students.items():
        check_student(options, config, where=f"stages.{name}.options")
    close = {name: options for name, options in students.items() if options.refit > 0 or options.states > 0}
    if close:
        with torch.device("meta"):  # its layers without their weights
            policy = Policy(AutoModelForCausalLM.from_config(config))
        for name, options in close.items():
            check_layers(options, policy, where=f"stages.{name}.options")


def check_sharding(recipe: Recipe) -> None:
    """Raise RecipeError when the processes share out weights that a stage would keep in four bits."""
    if team().sharding is None:
        return
    for stage in recipe.stages:
        adapter = getattr(stage_options(stage), "adapter", None)
        if adapter is not None and adapter.base == "nf4":
            raise RecipeError(
                "NF4 weights cannot be sharded",
                where=f"stages.{stage.name}.options.adapter.base",
                value="nf4",
                remedy="launch without FSDP, or train on the dense base",
            )


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


def check_tenants(material: Material, where: str) -> None:
    """Raise BindingError when an adapter cannot be called as its tenant is, RecipeError when it would be taken for everyone's."""
    for tenant in material.tenants:
        check_adapter_name(tenant, where)
        if tenant == MAIN:
            raise RecipeError(
                "is what a stage calls the adapter of all tenants", where=where, value=MAIN, remedy="rename the tenant"
            )


def check_material(stage: StageRecipe, material: Material, renderer: Renderer, console: Console | None = None) -> str:
    """Render and check every record of a stage; a line that says what there is. A console is told what was left out of a file."""
    options = stage_options(stage)
    if isinstance(options, ReasonOptions):
        check_tasks(options, material.tasks, where=f"stages.{stage.name}.data")
    if console is not None:
        console.notes(material.notes)
    check_tenants(material, where=f"stages.{stage.name}: tenant")
    limit = int(getattr(options, "max_tokens", 1 << 20))
    sets, pairs = [material.conversations, *material.tenants.values()], material.preferences
    total = sum(map(len, sets)) + len(pairs)
    with console.progress(f"rendering {stage.name}", total) if console and total >= _MANY else nullcontext() as advance:
        named = [
            (record.id, sequence)
            for records in sets
            for record, sequence in zip(records, renderer.conversations(records, advance), strict=True)
        ]
        sides = renderer.preferences(pairs, advance)
        names = [f"{pair.id} ({side})" for pair in pairs for side in ("chosen", "rejected")]
        named += zip(names, sides, strict=True)
    if not named:
        return f"{len(material.tasks)} tasks to play"
    found = preflight(named, max_tokens=limit, end_of_turn=renderer.contract.end_of_turn)
    tasks = f", {len(material.tasks)} tasks to play" if material.tasks else ""
    return f"{found.records} records, {found.tokens} tokens, {found.learned} learned, longest {found.longest}{tasks}"


def check_demonstrations(stage: StageRecipe, material: Material, contract: Contract, world: World) -> None:
    """Raise RecipeError when a half of a stage is to learn from demonstrations and none of its tasks has one, DataError for one that
    its own task's verifier does not pass or that goes on after its episode ended, and what `preflight` raises."""
    options = stage_options(stage)
    if not isinstance(options, ReasonOptions):
        return
    source = str(stage.data.path or world.name)
    for key, tasks in options.demonstrating(material.tasks).items():
        shown = [task for task in tasks if task.demonstration]
        if not shown:
            raise RecipeError(
                f"none of its {len(tasks)} tasks has a demonstration",
                where=f"stages.{stage.name}.options.{key}",
                value=True if key.endswith("demonstrate") else options.grpo.loss_name,
                remedy="give the tasks one, or leave it out",
            )
        guard = Guard.of(world)
        episodes = [(task, _demonstrated(task, contract, world, guard, source)) for task in shown]
        preflight(
            [(f"{source}: {task.id}: demonstration", contract.render_episode(episode)) for task, episode in episodes],
            max_tokens=options.max_tokens,
            end_of_turn=contract.end_of_turn,
        )


def _demonstrated(task: Task, contract: Contract, world: World, guard: Guard, source: str) -> Episode:
    episode, judgement = play_demonstration(task, contract=contract, world=world, guard=guard)
    where = f"{source}: task {task.id}: demonstration"
    played, turns = len(episode.turns), len(assistant_turns(task))
    if played < turns:
        raise DataError(
            f"its episode ends ({episode.stop}) after turn {played} of {turns}: the rest would never be learned",
            where=where,
            remedy="end it with one answer, within the task's max_turns and the calls of an episode",
        )
    if judgement is None or not judgement.passed:
        failed = judgement.failed if judgement else ["no judgement"]
        raise DataError(
            f"its verifier does not pass it: {'; '.join(failed) or 'failed'}",
            where=where,
            remedy="correct the demonstration, or what the task expects",
        )
    return episode
