"""FinanceOps: the world behind the running case. Every generator is a pure function of its arguments."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from posttrain.agents.world import Environment
from posttrain.data.records import Conversation, Message, Preference, Shape, Task, ToolSpec
from posttrain.errors import DataError
from posttrain.verifying.judgement import Verifier
from posttrain.worlds.finance_ops import policies
from posttrain.worlds.finance_ops.answers import SCHEMA
from posttrain.worlds.finance_ops.environment import WORLD, FinanceEnvironment
from posttrain.worlds.finance_ops.names import check_split
from posttrain.worlds.finance_ops.prompts import system_prompt
from posttrain.worlds.finance_ops.scenarios import KINDS, Bench, Scenario, preference, scenario_of_kind, scenario_of_shape
from posttrain.worlds.finance_ops.toolspecs import TOOLS
from posttrain.worlds.finance_ops.verifiers import VERIFIERS

LICENCE = "Apache-2.0"
DEFAULT_KINDS = ("lookup", "advise", "high_risk", "benign", "reconcile", "tenant_style")


class FinanceOps:
    """Ledger, tools, policies, scenarios and judges of the finance-operations assistant.

    `searcher` replaces the built-in policy ranking, `(tenant, query) -> passages, best first`.
    """

    name = WORLD
    tenants = tuple(policies.TENANTS)

    def __init__(self, searcher: policies.Searcher | None = None) -> None:
        self._searcher = searcher

    def tools(self, tenant: str | None = None) -> tuple[ToolSpec, ...]:
        """The same eight tools for every tenant, so that prompts share their prefix; what a call may do is the guard's matter."""
        if tenant is not None:
            policies.tenant_of(tenant)
        return TOOLS

    def system_prompt(self, tenant: str | None) -> str:
        return system_prompt(tenant)

    def answer_schema(self, tenant: str | None) -> Mapping[str, Any]:
        return SCHEMA

    def conversations(
        self, *, shapes: Mapping[str, float], n: int, split: str, seed: int, tenant: str | None = None
    ) -> list[Conversation]:
        """`n` dialogues, shapes drawn by weight.

        With a tenant all are its own, in its own style; without one, tenants alternate and the style is the house's."""
        unknown = set(shapes) - set(Shape)
        if unknown or not shapes or min(shapes.values()) < 0 or sum(shapes.values()) <= 0:
            raise DataError(
                "unknown shapes or weights that are not positive",
                where="shapes",
                value=dict(shapes),
                remedy=f"use {', '.join(Shape)}",
            )
        drawn = []
        purpose = f"conversations|{tenant}"
        for index, bench in enumerate(_benches(purpose, n, split, seed, tenant, style=tenant)):
            shape = Shape(bench.rng.choices(list(shapes), weights=list(shapes.values()))[0])
            found = scenario_of_shape(bench, shape)
            drawn.append(
                Conversation(
                    f"{purpose}|{split}|{seed}|{index}",
                    found.prompt + found.gold,
                    TOOLS,
                    found.tenant,
                    shape,
                    f"{WORLD}:{found.kind}",
                    LICENCE,
                    split,
                )
            )
            bench.live.close()
        return drawn

    def preferences(self, *, n: int, split: str, seed: int) -> list[Preference]:
        """`n` pairs: two fifths on advice (evidence and ordered actions against vague ones), the rest on calls and refusals."""
        pairs = []
        for index, bench in enumerate(_benches("preferences", n, split, seed, None, style=None)):
            found, better, worse = preference(bench, index)
            pairs.append(
                Preference(
                    f"preferences|{split}|{seed}|{index}",
                    found.prompt,
                    (better,),
                    (worse,),
                    TOOLS,
                    found.tenant,
                    f"{WORLD}:{found.kind}",
                    LICENCE,
                    split,
                )
            )
            bench.live.close()
        return pairs

    def tasks(self, *, kinds: Sequence[str] = DEFAULT_KINDS, n: int, split: str, seed: int) -> list[Task]:
        """`n` checkable requests, kinds taken in turn; those of the train split with a demonstration. Any integer seed works."""
        solved = self.solved_tasks(kinds=kinds, n=n, split=split, seed=seed)
        return [replace(task, demonstration=gold) if split == "train" else task for task, gold in solved]

    def solved_tasks(self, *, kinds: Sequence[str], n: int, split: str, seed: int) -> list[tuple[Task, tuple[Message, ...]]]:
        """The tasks of `tasks` with their gold continuations, for audits of the verifiers."""
        unknown = set(kinds) - set(KINDS)
        if unknown or not kinds:
            raise DataError("unknown task kinds", where="kinds", value=sorted(unknown), remedy=f"use {', '.join(KINDS)}")
        return [
            _task(scenario_of_kind(bench, kinds[index % len(kinds)]), f"{split}|{seed}|{index}", split)
            for index, bench in enumerate(_benches(f"tasks|{','.join(kinds)}", n, split, seed, None, style=None))
        ]

    def environment(self, reference: Mapping[str, Any], *, tenant: str | None = None) -> FinanceEnvironment:
        """A private copy of the company that a reference names: {"world": "finance_ops", "split": ..., "seed": ...}."""
        if reference.get("world", WORLD) != WORLD or not isinstance(reference.get("seed"), int):
            raise DataError(
                "not a reference to this world",
                where="environment",
                value=dict(reference),
                remedy='give {"world": "finance_ops", "seed": N}',
            )
        return FinanceEnvironment(str(reference.get("split", "test")), reference["seed"], tenant=tenant, searcher=self._searcher)

    def verifiers(self) -> Mapping[str, Verifier]:
        return VERIFIERS

    def permissions(self) -> str:
        return policies.read("permissions.cedar")

    def permissions_schema(self) -> str:
        """Cedar schema (human-readable form) that `permissions` validates against."""
        return policies.read("permissions.cedarschema")

    def guard_context(self, name: str, arguments: Mapping[str, Any], environment: Environment) -> Mapping[str, Any]:
        """Facts for the permission guard, read from the environment; every attribute of the schema is always present."""
        if not isinstance(environment, FinanceEnvironment):
            raise DataError("guard context needs this world's environment", where=name, value=type(environment).__name__)
        return environment.facts(name, arguments)

    def corpus(self, tenant: str | None) -> Sequence[Mapping[str, str]]:
        """Policy passages {id, tenant, title, text} of a tenant, or of all tenants."""
        names = (tenant,) if tenant is not None else self.tenants
        return [found for name in names for found in policies.passages(name)]


def _benches(purpose: str, n: int, split: str, seed: int, tenant: str | None, *, style: str | None) -> Iterator[Bench]:
    """One bench per index: its own random stream, its own company, tenants in turn."""
    check_split(split)
    names = (policies.tenant_of(tenant).name,) if tenant is not None else tuple(policies.TENANTS)
    for index in range(n):
        key = f"{WORLD}|{purpose}|{split}|{seed}|{index}"
        company = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
        rng = random.Random(key)
        yield Bench(split, company, rng.choice(names), style, rng)


def _task(found: Scenario, identity: str, split: str) -> tuple[Task, tuple[Message, ...]]:
    task = Task(
        f"{found.kind}|{identity}",
        found.prompt,
        TOOLS,
        found.tenant,
        found.kind,
        found.verifier,
        found.arguments,
        found.environment,
        SCHEMA,
        found.high_risk,
        found.max_turns,
        split,
    )
    return task, found.gold
