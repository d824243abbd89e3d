"""Pulling a lever: one stage's material and options through its loop, to a folder of weights that can be measured and released."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.contract import Sequence as Rendered
from posttrain.data.records import Task
from posttrain.errors import DataError
from posttrain.pipeline.material import Material
from posttrain.pipeline.play import Player
from posttrain.pipeline.runtime import Runtime
from posttrain.policy.weights import save_dense
from posttrain.recipe import StageRecipe, stage_options
from posttrain.stages import adapters, distill, preference, reason, sft, tools
from posttrain.stages.bench import Workbench, derive
from posttrain.training import team

MAIN = "main"


@dataclass(frozen=True, slots=True)
class Pulled:
    """What came out: `folders` of weights by adapter name ('main', or a tenant's); a student has its own Runtime."""

    runtime: Runtime
    folders: Mapping[str, Path]
    stopped: Mapping[str, str] = field(default_factory=dict)
    dense: bool = False

    def adapter_for(self, task: Task) -> str | None:
        """The adapter that answers a task: its tenant's where there is one, else 'main'; None for a dense student."""
        if self.dense:
            return None
        if MAIN in self.folders:
            return MAIN
        if task.tenant not in self.folders:
            raise DataError(
                "no adapter was trained for the task's tenant",
                where=task.id,
                value=task.tenant,
                remedy="measure tenants' adapters on tenants' tasks",
            )
        return task.tenant


def pull(stage: StageRecipe, material: Material, bench: Workbench, player: Player, runtime: Runtime, base_name: str) -> Pulled:
    """Run the stage's loop and save what it made below the bench's folder (of several processes, the first does)."""
    options: Any = stage_options(stage)
    if stage.kind == "distill":
        return _distil(options, material, bench, player, runtime)
    if (sharding := team().sharding) is not None:
        runtime.policy.shard(sharding.reshard)
    stops: Mapping[str, str | None]
    if stage.kind == "adapters":
        stops = adapters.run(options, material.tenants, bench)
    elif stage.kind == "preference":
        stops = {MAIN: preference.run(options, material.preferences, bench)}
    elif stage.kind == "reason":
        stops = {
            MAIN: reason.run(
                options,
                material.tasks,
                lambda tasks, copies, seed, name: player.draw(tasks, copies, seed, name, options.temperature),
                bench,
                show=player.show,
            )
        }
    else:
        loop = tools.run if stage.kind == "tools" else sft.run
        stops = {MAIN: loop(options, material.conversations, bench)}
    folders = {}
    for name in stops:
        folder = folders[name] = bench.folder / "weights" / name
        if team().first:
            runtime.policy.save_adapter(name, folder, base_name)
            runtime.contract.save(folder)
    if runtime.policy.quantised or runtime.policy.sharded:
        runtime = _on_dense(runtime, folders, Path(base_name))
    return Pulled(runtime, folders, {name: why for name, why in stops.items() if why})


def _on_dense(trained: Runtime, folders: Mapping[str, Path], parent: Path) -> Runtime:
    """The adapters on the dense parent they are released on: what was trained on NF4 or shared weights is measured where it will serve.
    Only the first process measures."""
    if not team().first:
        return trained
    runtime = Runtime.load(parent, trained.policy.dtype, trained.policy.device)
    for name, folder in folders.items():
        runtime.policy.load_adapter(name, folder, expected_parent=trained.policy.fingerprint)
    return runtime


def _distil(options: distill.DistillOptions, material: Material, bench: Workbench, player: Player, runtime: Runtime) -> Pulled:
    taught = [*_own_answers(material.tasks, bench, player), *bench.renderer.conversations(material.conversations)]
    if not taught:
        raise DataError(
            "the teacher passed none of its own answers and no records were given",
            where="distill.data",
            remedy="raise data.n, or lower data.own_share below 1",
        )
    student = Runtime.of(distill.run(options, taught, bench), runtime.contract)
    folder = bench.folder / "weights" / MAIN
    if team().first:
        folder.mkdir(parents=True, exist_ok=True)
        save_dense(student.policy.base, folder)
        runtime.contract.save(folder)
    return Pulled(student, {MAIN: folder}, dense=True)


def _own_answers(tasks: Sequence[Task], bench: Workbench, player: Player) -> list[Rendered]:
    """The teacher's greedy answers, unconstrained so that every token is its own choice; only those its verifier passed."""
    if not tasks:
        return []
    with bench.clock("sample"):
        played = player.draw(tasks, 1, derive(bench.seed, "teacher"), None, 0.0)
    kept = [episode for episode, judgement in played if judgement is not None and judgement.passed]
    bench.log("teacher", -1, 1, {"teacher_pass_share": len(kept) / len(played), "teacher_kept": float(len(kept))})
    return [bench.contract.render_episode(episode) for episode in kept]
