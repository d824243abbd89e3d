"""What a stage learns from: the world's generators or a file, by kind of stage. All of it is read and hashed before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.agents.world import World
from posttrain.data import ReadReport, dataset_hash, read_conversations, read_preferences
from posttrain.data.records import Conversation, Preference, Task
from posttrain.errors import RecipeError
from posttrain.evaluation.tasks import read_own_tasks
from posttrain.recipe import DataOptions, StageRecipe
from posttrain.stages.bench import derive
from posttrain.stages.tools import hold_calls

_SPLIT = "train"  # of a file's rows as of a world's: what a release is measured on, nothing may have learned from
_PARTS = 40  # of which each kind of task gets its share, where shares are not whole numbers
_TRAJECTORIES = {"tool_trajectory": 1.0}
_FOUR_SHAPES = {"single_turn": 0.2, "multi_turn": 0.2, "tool_trajectory": 0.4, "safety_style": 0.2}


@dataclass(frozen=True, slots=True)
class Material:
    """Records for one stage; only the fields its kind needs are filled. `hashes` names each part's SHA-256, `notes` what was left out
    of its file."""

    conversations: Sequence[Conversation] = ()
    preferences: Sequence[Preference] = ()
    tasks: Sequence[Task] = ()
    tenants: dict[str, list[Conversation]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def gather(stage: StageRecipe, world: World, seed: int) -> Material:
    """The stage's records, from the train split only. Raises RecipeError where data options do not fit the kind of stage, and DataError
    for a malformed file."""
    _refuse_unused(stage, f"stages.{stage.name}.data")
    seed = stage.data.seed if stage.data.seed is not None else derive(seed, stage.name, "data") % 2**31
    if stage.data.path is None:
        return _gathered(stage, world, seed, None)
    records, report = _read(stage.kind, Path(stage.data.path), world)
    return replace(_gathered(stage, world, seed, records), notes=report.notes)


def _gathered(stage: StageRecipe, world: World, seed: int, own: list[Any] | None) -> Material:
    """`own`: the records of the stage's file, of the type that its kind learns from."""
    data, where = stage.data, f"stages.{stage.name}.data"
    if stage.kind == "adapters":
        tenants = _by_tenant(data, world, seed, where, own)
        return Material(tenants=tenants, hashes={tenant: dataset_hash(records) for tenant, records in tenants.items()})
    if stage.kind == "preference":
        pairs = world.preferences(n=data.n, split=_SPLIT, seed=seed) if own is None else own
        return Material(preferences=pairs, hashes={"preferences": dataset_hash(pairs)})
    if stage.kind == "reason":
        tasks = world.tasks(kinds=_kinds(stage), n=data.n, split=_SPLIT, seed=seed) if own is None else own
        return Material(tasks=tasks, hashes={"tasks": dataset_hash(tasks)})
    if stage.kind == "distill":
        count = round(data.n * data.own_share)
        tasks = world.tasks(kinds=_kinds(stage), n=count, split=_SPLIT, seed=seed) if count else []
        if own is None:
            rest = data.model_copy(update={"n": data.n - count})
            own = _conversations(rest, world, seed, _FOUR_SHAPES) if count < data.n else []
        return Material(own, tasks=tasks, hashes={"tasks": dataset_hash(tasks), "conversations": dataset_hash(own)})
    shapes = _TRAJECTORIES if stage.kind == "tools" else _FOUR_SHAPES
    conversations = _conversations(data, world, seed, shapes) if own is None else own
    if stage.kind == "tools" and not hold_calls(conversations):
        raise RecipeError("no record holds a tool call", where=where, remedy="give the stage tool trajectories")
    return Material(conversations, hashes={"conversations": dataset_hash(conversations)})


# what decides about a stage's records, beside `path`, `n` and `seed`
_SHAPED: tuple[str, ...] = ("shapes",)
_USED = {
    "sft": _SHAPED, "tools": _SHAPED, "adapters": _SHAPED, "preference": (), "reason": ("kinds",),
    "distill": ("shapes", "kinds", "own_share"),
}  # fmt: skip


def _refuse_unused(stage: StageRecipe, where: str) -> None:
    """RecipeError for a key that would decide nothing: whoever wrote it believes that it does."""
    data = stage.data
    unused = data.model_fields_set - {"path", "n", "seed", *_USED[stage.kind]}
    if data.path is not None and stage.kind != "distill":  # a student plays tasks beside the file's records
        unused |= data.model_fields_set - {"path"}
    if data.path is not None and stage.kind == "distill":
        unused |= data.model_fields_set & {"shapes"}
        if data.own_share == 1:
            raise RecipeError(
                "the file would not be read: the teacher answers all of the tasks itself", where=f"{where}.path", value=data.path,
                remedy="give own_share, the share of n that is the teacher's; 0 learns from the file alone",
            )  # fmt: skip
    if unused:
        beside = f" beside a path, for {stage.kind}" if data.path is not None else f" for {stage.kind}"
        raise RecipeError(f"decides nothing{beside}", where=f"{where}.{sorted(unused)[0]}", remedy="leave it out")


def _by_tenant(
    data: DataOptions, world: World, seed: int, where: str, own: list[Conversation] | None
) -> dict[str, list[Conversation]]:
    """Each tenant's own records. Of a file, every record must be some tenant's, and every tenant must have one."""
    if own is None:
        return {tenant: _conversations(data, world, seed, _FOUR_SHAPES, tenant) for tenant in world.tenants}
    tenants: dict[str, list[Conversation]] = {tenant: [] for tenant in world.tenants}
    known = f"the world's tenants are {', '.join(tenants)}"
    for record in own:
        if record.tenant not in tenants:
            where = f"{data.path}: record {record.id}: tenant"
            raise RecipeError("is none of the world's", where=where, value=record.tenant or "", remedy=known)
        tenants[record.tenant].append(record)
    without = [tenant for tenant, records in tenants.items() if not records]
    if without:
        raise RecipeError(f"holds no record of {', '.join(without)}", where=f"{where}.path", value=data.path, remedy=known)
    return tenants


def _conversations(
    data: DataOptions, world: World, seed: int, shapes: dict[str, float], tenant: str | None = None
) -> list[Conversation]:
    return world.conversations(shapes=data.shapes or shapes, n=data.n, split=_SPLIT, seed=seed, tenant=tenant)


def _kinds(stage: StageRecipe) -> list[str]:
    if not any(share > 0 for share in stage.data.kinds.values()):
        raise RecipeError(
            "the stage needs kinds of tasks", where=f"stages.{stage.name}.data.kinds", remedy="for example kinds: {reconcile: 1}"
        )
    shares = {kind: share for kind, share in stage.data.kinds.items() if share > 0}
    whole = all(share == int(share) for share in shares.values())
    parts = 1.0 if whole else _PARTS / sum(shares.values())
    return [kind for kind, share in shares.items() for _ in range(max(1, round(share * parts)))]


def _read(kind: str, path: Path, world: World) -> tuple[list[Any], ReadReport]:
    """A file's records, of the type that this kind of stage learns from."""
    if kind == "reason":
        own = read_own_tasks(path, world, _SPLIT)
        return list(own.tasks), own.report
    if kind == "preference":
        return read_preferences(path, split=_SPLIT)
    return read_conversations(path, split=_SPLIT)
