"""Tasks that users write, for a suite or to learn from: completed from their world, and refused where nobody could play or judge
them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from posttrain.agents.world import World, load_world
from posttrain.data import Defaults, ReadReport, read_tasks
from posttrain.data.records import Message, Task
from posttrain.errors import DataError, RecipeError, VerifierError
from posttrain.verifying.expected import check_expected

DEFAULT_WORLD = "finance_ops"


@dataclass(frozen=True, slots=True)
class OwnTasks:
    """The tasks of one file, ready to be played in `world`."""

    tasks: tuple[Task, ...]
    world: World
    report: ReadReport


def read_own_tasks(path: Path, world: World | None = None, split: str | None = None) -> OwnTasks:
    """Every task of a file, each with what it leaves out. `world`: the one they must be of; None: the one that the first row names.
    `split`: the one that rows must be of, and are of where they do not say. Raises DataError naming file, row, field, cause and
    remedy."""
    desk = _Desk(world)
    catalogue = {tool.name: tool for tool in (world or load_world(DEFAULT_WORLD)).tools()}
    tasks, report = read_tasks(path, Defaults(catalogue=catalogue), split, desk.complete)
    assert desk.world is not None  # a file without rows is refused
    return OwnTasks(tuple(tasks), desk.world, report)


class _Desk:
    """Takes one file's tasks in turn."""

    def __init__(self, world: World | None) -> None:
        self.world = world
        self._name = DEFAULT_WORLD if world is None else world.name

    def complete(self, task: Task) -> Task:
        """What a short row leaves out comes from its world: the tenant's system text, tools and answer schema. Raises DataError for a
        task that nobody could play or judge, with the field that says so."""
        world = self._world_of(task)
        _check_names(task, world)
        messages = task.messages
        if messages and messages[0].role != "system":
            messages = (Message("system", world.system_prompt(task.tenant)), *messages)
        task = replace(
            task,
            messages=messages,
            tools=task.tools or world.tools(task.tenant),
            response_schema=task.response_schema if task.response_schema is not None else world.answer_schema(task.tenant),
        )
        if task.verifier == "expected":
            _check_expected(task)
        return task

    def _world_of(self, task: Task) -> World:
        name = str(task.environment.get("world", self._name))
        if self.world is None:
            try:
                self.world, self._name = load_world(name), name
            except RecipeError as error:
                what = "no such world is installed"
                raise DataError(what, where="environment", value=error.value, remedy=error.remedy) from error
        if name != self._name:
            what, remedy = "is not the world of these tasks", f"they are of {self._name}: keep the tasks of another world apart"
            raise DataError(what, where="environment.world", value=name, remedy=remedy)
        return self.world


def _check_names(task: Task, world: World) -> None:
    if task.tenant is not None and task.tenant not in world.tenants:
        known = ", ".join(world.tenants)
        raise DataError(f"{world.name} has no such tenant", where="tenant", value=task.tenant, remedy=f"known: {known}")
    verifiers = ("expected", *sorted(world.verifiers()))
    if task.verifier not in verifiers:
        raise DataError("no such verifier", where="verifier", value=task.verifier, remedy=f"known: {', '.join(verifiers)}")


def _check_expected(task: Task) -> None:
    try:
        check_expected(task.arguments, "expected")
    except VerifierError as error:
        raise DataError(error.what, where="expected", value=error.value, remedy=error.remedy) from error
    if "state" in task.arguments and not task.environment:
        remedy = 'give an environment, such as {"world": "finance_ops", "seed": 7}'
        raise DataError("a state is expected of no world", where="environment", remedy=remedy)
