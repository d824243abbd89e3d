"""`posttrain evaluate` and `posttrain gate`: measure any base or release on any suite; compare two scorecard files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain.agents.world import load_world
from posttrain.data.records import Task
from posttrain.errors import DataError, RegistryError
from posttrain.evaluation import GatePolicy, Scorecard, Suite, Verdict, decide
from posttrain.evaluation.gate import check_policy
from posttrain.pipeline.console import Console
from posttrain.pipeline.measure import AdapterFor, Measurer
from posttrain.pipeline.parents import Parents
from posttrain.pipeline.registry import open_registry
from posttrain.pipeline.runtime import Runtime, prepare_process
from posttrain.policy.base import EMBEDDED, resolve_base
from posttrain.policy.device import find_device
from posttrain.recipe import EvaluationRecipe, build, read_yaml
from posttrain.releases import Channels, Kind, Registry, Release
from posttrain.releases.registry import unknown

_DEFAULT_WORLD = "finance_ops"


def evaluate_target(
    target: str, *, suite: str, split: str, seed: int, n: int, base: str, runs: Path, quiet: bool, device: str = "auto"
) -> Scorecard:
    """Scorecard of a release id, a channel (all tenants' channels: 'tenants'), or a base. RecipeError for a device that is not there,
    before anything is loaded."""
    prepare_process(None)
    place = find_device(device)
    console = Console(quiet)
    loaded = Suite.load(suite, split=split, seed=seed, n=n)
    console.notes(loaded.notes)
    found = load_target(target, base, runs, place)
    options = EvaluationRecipe(split=split if split in ("train", "dev", "test") else "test", seed=seed, free=max(8, n // 4))  # type: ignore[arg-type]
    world = load_world(loaded.world or _DEFAULT_WORLD)
    return Measurer(options, world, loaded, console).measure(found.runtime, found.adapter_for, target, found.parent)


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured: a runtime, the adapter that answers each task on it, and the runtime that a dense release came from, as whose
    share its latency is given."""

    runtime: Runtime
    adapter_for: AdapterFor
    parent: Runtime | None = None


def load_target(target: str, base: str, runs: Path, device: torch.device | None = None) -> Target:
    """A release, a channel, 'tenants' or a base, ready to be measured. `device` None: see `find_device`."""
    if not (runs / "registry").is_dir() and _is_base(target):
        return _base(target, device)
    registry, channels = open_registry(runs)
    parents = Parents(registry, base, runs / "weights", None)
    if target == "tenants":
        return _tenants(registry, channels, parents, device)
    release = _release(target, registry, channels)
    if release is None:
        if not _is_base(target):
            raise unknown("release, channel or base", target, ("tenants", *channels.names(), *EMBEDDED))
        return _base(target, device)
    runtime = Runtime.load(parents.runs_on(release).folder, device=device)
    name = _resident(runtime, release)
    if release.lineage.kind is not Kind.DENSE:
        return Target(runtime, lambda task: name)
    return Target(runtime, lambda task: name, Runtime.load(parents.origin(release).folder, device=device))


def _is_base(target: str) -> bool:
    """Whether a name looks like a base: an embedded one, a folder, or a hub id."""
    return target in EMBEDDED or "/" in target or Path(target).is_dir()


def _base(target: str, device: torch.device | None) -> Target:
    return Target(Runtime.load(resolve_base(target), device=device), lambda task: None)


def _release(target: str, registry: Registry, channels: Channels) -> Release | None:
    if target in channels.names():
        return channels.release(target)
    try:
        return registry.get(target)
    except RegistryError:
        if target.startswith("r-"):
            raise
        return None


def _tenants(registry: Registry, channels: Channels, parents: Parents, device: torch.device | None) -> Target:
    """Every tenant on its own channel, as the server would route it."""
    releases = {name: channels.release(name) for name in channels.names()}
    runtime = Runtime.load(parents.runs_on(next(iter(releases.values()))).folder, device=device)
    names = {
        name: _resident(runtime, release) for name, release in releases.items() if release.runs_on == runtime.policy.fingerprint
    }

    def adapter_for(task: Task) -> str | None:
        if task.tenant not in names:
            raise DataError(
                "no channel serves the task's tenant",
                where=task.id,
                value=task.tenant,
                remedy=f"channels: {', '.join(sorted(names))}",
            )
        return names[task.tenant]

    return Target(runtime, adapter_for)


def _resident(runtime: Runtime, release: Release) -> str | None:
    if release.lineage.kind is Kind.DENSE:
        return None
    if release.id not in runtime.policy.adapters:
        runtime.policy.load_adapter(release.id, release.folder, expected_parent=release.runs_on)
    return release.id


def metric_lines(card: Scorecard) -> list[str]:
    """A scorecard for a person."""
    lines = [f"{card.candidate} on {card.suite}, {card.split} seed {card.seed}, {card.n} tasks"]
    lines += [f"  {name:30} {m.value:8.3f}  [{m.low:.3f}, {m.high:.3f}]  n={m.n}  {m.unit}" for name, m in card.metrics.items()]
    return lines


def decide_files(parent: Path, candidate: Path, policy: Path) -> Verdict:
    """The gate's verdict on two scorecard files. Raises RecipeError for a policy, DataError for a scorecard, that is none."""
    rules = build(GatePolicy, read_yaml(policy, "policy") or {}, str(policy))
    cards = _card(parent), _card(candidate)
    check_policy(rules, str(policy), others=[name for card in cards for name in card.metrics])
    return decide(*cards, rules)


def _card(path: Path) -> Scorecard:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"the scorecard cannot be read ({error})", where=str(path), remedy="write one with `posttrain evaluate ... --json`"
        ) from error
    return Scorecard.from_json(value, str(path))


def verdict_lines(verdict: Verdict) -> list[str]:
    lines = [verdict.outcome.value.replace("_", " ")]
    for check in verdict.checks:
        place = check.metric + (f" ({check.slice})" if check.slice else "")
        lines.append(f"  {'pass' if check.passed else 'FAIL'}  {check.role:9} {place}: {check.requirement}")
    return lines + [f"  {reason}" for reason in verdict.reasons]
