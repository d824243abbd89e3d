"""The World protocol: a plug-in that supplies data, tools and judges. No room imports a world; it is loaded by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

from posttrain.data.records import Conversation, Preference, Task, ToolSpec
from posttrain.errors import RecipeError
from posttrain.verifying.judgement import EnvironmentView, Verifier


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool returned. `ok=False` is an error the model should read and react to."""

    content: str
    ok: bool = True


class Environment(EnvironmentView, Protocol):
    """One live, private copy of the world for one episode. Tools act on it; `close` frees it."""

    def call(self, name: str, arguments: Mapping[str, Any], *, tenant: str | None) -> ToolResult: ...

    def close(self) -> None: ...


class World(Protocol):
    """What the pipeline, the suites and the server ask of a world. Every generator is a pure function of its arguments."""

    name: str
    tenants: tuple[str, ...]

    def tools(self, tenant: str | None = None) -> tuple[ToolSpec, ...]: ...

    def system_prompt(self, tenant: str | None) -> str: ...

    def answer_schema(self, tenant: str | None) -> Mapping[str, Any]: ...

    def conversations(
        self, *, shapes: Mapping[str, float], n: int, split: str, seed: int, tenant: str | None = None
    ) -> list[Conversation]: ...

    def preferences(self, *, n: int, split: str, seed: int) -> list[Preference]: ...

    # those to learn from may carry a demonstration, those to measure on need none
    def tasks(self, *, kinds: Sequence[str], n: int, split: str, seed: int) -> list[Task]: ...

    def environment(self, reference: Mapping[str, Any], *, tenant: str | None = None) -> Environment: ...

    def verifiers(self) -> Mapping[str, Verifier]: ...

    def permissions(self) -> str: ...  # Cedar policy text: who may call what

    def corpus(self, tenant: str | None) -> Sequence[Mapping[str, str]]: ...  # policy passages {id, tenant, text}


def load_world(name: str) -> World:
    """The world registered under `name` in the entry-point group `posttrain.worlds`."""
    found = {entry.name: entry for entry in entry_points(group="posttrain.worlds")}
    if name not in found:
        raise RecipeError(
            "unknown world",
            where="world",
            value=name,
            remedy=f"installed worlds: {', '.join(sorted(found)) or 'none'}",
        )
    world: World = found[name].load()()
    return world
