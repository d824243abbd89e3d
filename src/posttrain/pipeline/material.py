"""What a stage learns from: the world's generators or a file, by kind of stage. All of it is read and hashed before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.agents.world import World
from posttrain.data import dataset_hash, read_conversations, read_preferences, read_tasks
from posttrain.data.records import Conversation, Preference, Task
from posttrain.errors import RecipeError
from posttrain.recipe import DataOptions, StageRecipe
from posttrain.stages.bench import derive

_TRAJECTORIES = {"tool_trajectory": 1.0}
_FOUR_SHAPES = {"single_turn": 0.2, "multi_turn": 0.2, "tool_trajectory": 0.4, "safety_style": 0.2}


@dataclass(frozen=True, slots=True)
class Material:
    """Records for one stage; only the fields its kind needs are filled. `hashes` names each part's SHA-256."""

    conversations: Sequence[Conversation] = ()
    preferences: Sequence[Preference] = ()
    tasks: Sequence[Task] = ()
    tenants: dict[str, list[Conversation]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


def gather(stage: StageRecipe, world: World, seed: int) -> Material:
    """The stage's records, from the train split only. Raises RecipeError where data options do not fit the kind of stage."""
    data = stage.data
    seed = data.seed if data.seed is not None else derive(seed, stage.name, "data") % 2**31
    if stage.kind == "adapters":
        tenants = {tenant: _conversations(data, world, seed, _FOUR_SHAPES, tenant) for tenant in world.tenants}
        return Material(tenants=tenants, hashes={tenant: dataset_hash(records) for tenant, records in tenants.items()})
    if stage.kind == "preference":
        pairs = _read(read_preferences, data) if data.path else world.preferences(n=data.n, split="train", seed=seed)
        return Material(preferences=pairs, hashes={"preferences": dataset_hash(pairs)})
    if stage.kind == "reason":
        tasks = _read(read_tasks, data) if data.path else world.tasks(kinds=_kinds(stage), n=data.n, split="train", seed=seed)
        return Material(tasks=tasks, hashes={"tasks": dataset_hash(tasks)})
    if stage.kind == "distill":
        own = round(data.n * data.own_share)
        tasks = world.tasks(kinds=_kinds(stage), n=own, split="train", seed=seed) if own else []
        given = _conversations(data.model_copy(update={"n": data.n - own}), world, seed, _FOUR_SHAPES) if own < data.n else []
        return Material(given, tasks=tasks, hashes={"tasks": dataset_hash(tasks), "conversations": dataset_hash(given)})
    shapes = _TRAJECTORIES if stage.kind == "tools" else _FOUR_SHAPES
    conversations = _conversations(data, world, seed, shapes)
    return Material(conversations, hashes={"conversations": dataset_hash(conversations)})


def _conversations(
    data: DataOptions, world: World, seed: int, shapes: dict[str, float], tenant: str | None = None
) -> list[Conversation]:
    if data.path:
        records = _read(read_conversations, data)
        return [record for record in records if tenant in (None, record.tenant)]
    return world.conversations(shapes=data.shapes or shapes, n=data.n, split="train", seed=seed, tenant=tenant)


def _kinds(stage: StageRecipe) -> list[str]:
    if not stage.data.kinds:
        raise RecipeError(
            "the stage needs kinds of tasks", where=f"stages.{stage.name}.data.kinds", remedy="for example kinds: {reconcile: 1}"
        )
    return [kind for kind, share in stage.data.kinds.items() for _ in range(max(1, round(share)))]


def _read(reader: Any, data: DataOptions) -> Any:
    assert data.path is not None
    return reader(Path(data.path))[0]
