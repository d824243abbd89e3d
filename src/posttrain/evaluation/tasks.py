"""Tasks that users write, for a suite or to learn from: completed from their world, and refused where nobody could play or judge
them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.agents.world import World, load_world
from posttrain.data import Defaults, ReadReport, read_tasks
from posttrain.data.records import Message, Task
from posttrain.errors import DataError, GrammarError, RecipeError, VerifierError, nearest_of
from posttrain.grammar import bound_answer, bound_tools, shown, turn_grammar
from posttrain.verifying.expected import check_expected

DEFAULT_WORLD = "finance_ops"
_ENVIRONMENT = 'give an environment, such as {"world": "finance_ops", "seed": 7}'


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
        self._compiled: set[str] = set()
        self._opened: set[str] = set()

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
        self._check_turn(task)
        if task.verifier == "expected":
            _check_expected(task, world)
        self._check_environment(task, world)
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

    def _check_turn(self, task: Task) -> None:
        """The grammar of the first turn, once for equal tools and schemas; what must have been said, for each task."""
        parts = json.dumps([[(tool.name, tool.parameters) for tool in task.tools], task.response_schema])
        try:
            if parts not in self._compiled:
                turn_grammar(task.tools, task.response_schema)
                bound_tools(task.tools, shown(task.messages))  # also says which keyword cannot be enforced
                self._compiled.add(parts)
            if task.response_schema is not None:
                bound_answer(task.response_schema, shown(task.messages))
        except GrammarError as error:
            raise DataError(error.what, where=error.where, value=error.value, remedy=error.remedy) from error

    def _check_environment(self, task: Task, world: World) -> None:
        """The task's copy of the world opens, and answers the queries that are to judge it."""
        queries = task.arguments.get("state", ()) if task.verifier == "expected" else ()
        copy = json.dumps([task.environment, task.tenant], sort_keys=True)
        if not task.environment or (copy in self._opened and not queries):
            return
        try:
            environment = world.environment(task.environment, tenant=task.tenant)
        except Exception as error:  # whatever a world says to a reference that it does not know
            remedy = getattr(error, "remedy", None) or _ENVIRONMENT
            what = f"no copy of {world.name} can be opened: {getattr(error, 'what', error)}"
            raise DataError(what, where="environment", value=dict(task.environment), remedy=remedy) from error
        self._opened.add(copy)
        with closing(environment):
            for index, query in enumerate(queries):
                try:
                    environment.query(query["sql"], tuple(query.get("parameters", ())))
                except Exception as error:  # whatever the world's database raises
                    what, where = f"cannot be queried ({getattr(error, 'what', error)})", f"expected.state[{index}].sql"
                    raise DataError(what, where=where, value=query["sql"], remedy="correct the SQL: it may only read") from error


def _check_names(task: Task, world: World) -> None:
    if task.tenant is not None and task.tenant not in world.tenants:
        known = ", ".join(world.tenants)
        raise DataError(f"{world.name} has no such tenant", where="tenant", value=task.tenant, remedy=f"known: {known}")
    verifiers = ("expected", *sorted(world.verifiers()))
    if task.verifier not in verifiers:
        raise DataError("no such verifier", where="verifier", value=task.verifier, remedy=f"known: {', '.join(verifiers)}")


def _check_expected(task: Task, world: World) -> None:
    try:
        check_expected(task.arguments, "expected")
    except VerifierError as error:
        raise DataError(error.what, where="expected", value=error.value, remedy=error.remedy) from error
    for key, what in (("state", "a state is expected of no world"), ("calls", "calls are expected in no world")):
        if task.arguments.get(key) and not task.environment:
            raise DataError(what, where="environment", remedy=_ENVIRONMENT)
    tools = {tool.name: tool for tool in task.tools}
    real = [tool.name for tool in world.tools(task.tenant)]
    for index, call in enumerate(task.arguments.get("calls", ())):
        name, where = call["name"], f"expected.calls[{index}]"
        if name not in tools:
            raise DataError("is not offered", where=f"{where}.name", value=name, remedy=nearest_of(name, list(tools), "offered"))
        if name not in real:
            remedy = f"a tool of your own may be offered, never expected; {world.name} has {', '.join(real)}"
            raise DataError(
                f"a tool that {world.name} does not have never runs", where=f"{where}.name", value=name, remedy=remedy
            )
        _check_arguments(call, tools[name].parameters, bool(task.arguments.get("extra_arguments")), f"{where}.arguments")
    for index, name in enumerate(task.arguments.get("forbidden", ())):
        if name not in tools and name not in real:
            where, known = f"expected.forbidden[{index}]", [*tools, *(set(real) - tools.keys())]
            raise DataError("is no known tool", where=where, value=name, remedy=nearest_of(name, known))


def _check_arguments(call: Mapping[str, Any], parameters: Mapping[str, Any], extra: bool, where: str) -> None:
    """DataError for arguments with which the call cannot be made. extra: others may come beside them."""
    given = call.get("arguments") or {}
    known = list(parameters.get("properties", ()))
    closed = parameters.get("additionalProperties") is False and "patternProperties" not in parameters
    for name in given:
        if closed and name not in known:
            raise DataError(f"{call['name']} has no such argument", where=where, value=name, remedy=nearest_of(name, known))
    missing = [name for name in parameters.get("required", ()) if name not in given]
    if missing and not extra:
        what, remedy = (
            f"a call needs {', '.join(missing)}",
            'give it ({"$any": true} where its value is open), or extra_arguments: true',
        )
        raise DataError(what, where=where, value=dict(given), remedy=remedy)
