"""Suites: a world's tasks for any seed, or a JSONL file of Task records of anyone's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from posttrain.agents.world import World, load_world
from posttrain.data import Defaults, read_tasks
from posttrain.data.records import Message, Task
from posttrain.errors import DataError, RecipeError, VerifierError
from posttrain.verifying.expected import check_expected

_WORLD = "finance_ops"
_KINDS = ("lookup", "advise", "high_risk", "benign", "reconcile", "tenant_style")


@dataclass(frozen=True, slots=True)
class Suite:
    """Named tasks. Two scorecards are compared task by task when name, split and seed are equal."""

    name: str
    split: str
    seed: int
    tasks: tuple[Task, ...]
    world: str | None = None

    @classmethod
    def load(
        cls, source: str, *, split: str = "test", seed: int = 1, n: int = 96, kinds: Mapping[str, int] | None = None
    ) -> Suite:
        """A file that ends in .jsonl or .jsonl.gz, or a world's name. `kinds` gives a number of tasks for each kind of a world;
        without it, n tasks are spread over the world's kinds. Raises DataError for malformed rows and an empty suite."""
        if source.endswith((".jsonl", ".jsonl.gz", ".json")) or Path(source).is_file():
            return cls._from_file(Path(source))
        world = load_world(source)
        known = tuple(getattr(world, "kinds", _KINDS))
        counts = dict(kinds) if kinds else {kind: n // len(known) + (index < n % len(known)) for index, kind in enumerate(known)}
        tasks = [
            task for kind, count in counts.items() if count for task in world.tasks(kinds=[kind], n=count, split=split, seed=seed)
        ]
        if not tasks:
            raise DataError("the suite is empty", where=source, value=n, remedy="ask for at least one task")
        return cls(source, split, seed, tuple(tasks), source)

    @classmethod
    def _from_file(cls, path: Path) -> Suite:
        worlds: dict[str, World] = {}
        defaults = Defaults(catalogue={tool.name: tool for tool in load_world(_WORLD).tools()})
        tasks, _ = read_tasks(path, defaults, lambda task: _check(task, worlds))
        if not tasks:
            raise DataError("the suite is empty", where=str(path), remedy="write one Task record a line (docs/formats.md)")
        complete = tuple(_completed(task, worlds) for task in tasks)
        return cls(path.name, "file", 0, complete, next(iter(worlds), _WORLD))


def _check(task: Task, worlds: dict[str, World]) -> None:
    """DataError for a task that nobody could play or judge, with the field that says so."""
    try:
        world = _world(task, worlds)
    except RecipeError as error:
        raise DataError("no such world is installed", where="environment", value=error.value, remedy=error.remedy) from error
    if len(worlds) > 1:
        raise DataError("a file's tasks are of one world", where="environment", value=sorted(worlds), remedy="write two files")
    if task.tenant is not None and task.tenant not in world.tenants:
        known = ", ".join(world.tenants)
        raise DataError(f"{world.name} has no such tenant", where="tenant", value=task.tenant, remedy=f"known: {known}")
    verifiers = ("expected", *sorted(world.verifiers()))
    if task.verifier not in verifiers:
        raise DataError("no such verifier", where="verifier", value=task.verifier, remedy=f"known: {', '.join(verifiers)}")
    if task.verifier != "expected":
        return
    try:
        check_expected(task.arguments, "expected")
    except VerifierError as error:
        raise DataError(error.what, where="expected", value=error.value, remedy=error.remedy) from error
    if "state" in task.arguments and not task.environment:
        remedy = 'give an environment, such as {"world": "finance_ops", "seed": 7}'
        raise DataError("a state is expected of no world", where="environment", remedy=remedy)


def _world(task: Task, worlds: dict[str, World]) -> World:
    name = str(task.environment.get("world", _WORLD))
    if name not in worlds:
        worlds[name] = load_world(name)
    return worlds[name]


def _completed(task: Task, worlds: dict[str, World]) -> Task:
    """What a short row leaves out comes from its world: the tenant's system text, tools and answer schema."""
    world = _world(task, worlds)
    messages = task.messages
    if messages and messages[0].role != "system":
        messages = (Message("system", world.system_prompt(task.tenant)), *messages)
    return replace(
        task,
        messages=messages,
        tools=task.tools or world.tools(task.tenant),
        response_schema=task.response_schema if task.response_schema is not None else world.answer_schema(task.tenant),
    )
