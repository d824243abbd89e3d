"""The model behind the server: one set of dense weights with the adapters of all channels resident on it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from starlette.applications import Starlette

from posttrain.errors import RegistryError
from posttrain.pipeline.parents import Parents
from posttrain.pipeline.runtime import Runtime
from posttrain.releases import Channels, Kind, Registry
from posttrain.serving.app import build_app
from posttrain.serving.audit import Audit
from posttrain.serving.engine import ContractEngine
from posttrain.serving.keys import AccessFile, issue_key
from posttrain.serving.router import Router


class ServedModel:
    """Implements serving.router.ServingModel over a Runtime. An adapter's name is its release id, so two never share one."""

    def __init__(self, registry: Registry, runtime: Runtime) -> None:
        self.registry, self.runtime = registry, runtime
        self._contract = runtime.contract.lock().fingerprint

    @property
    def weights(self) -> str:
        return self.runtime.policy.fingerprint

    @property
    def contract(self) -> str:
        return self._contract

    def adapter_for(self, release_id: str) -> str | None:
        release = self.registry.get(release_id)
        if release.lineage.kind is Kind.DENSE:
            return None
        if release_id not in self.runtime.policy.adapters:
            self.runtime.policy.load_adapter(release_id, release.folder, expected_parent=release.runs_on)
        return release_id


def load_served(
    registry: Registry, channels: Channels, base: str, cache: Path, device: torch.device | None = None
) -> ServedModel:
    """Load the weights that most channels' releases run on (equal numbers: the first by name). One process holds one set of weights: the
    router refuses the other channels, which `left_out` names. `device` None: see `find_device`."""
    groups = _by_weights(channels)
    if not groups:
        raise RegistryError(
            "no channel points at a release", where=str(registry.root), remedy="run a recipe, or promote a release first"
        )
    first = channels.release(groups[0][0])
    parents = Parents(registry, base, cache, None)
    runtime = Runtime.load(parents.runs_on(first).folder, device=device)
    runtime.contract.verify(first.contract, where=first.id)
    return ServedModel(registry, runtime)


def left_out(channels: Channels) -> list[str]:
    """The channels that `load_served` does not serve, because their releases run on other weights."""
    return [name for group in _by_weights(channels)[1:] for name in group]


def _by_weights(channels: Channels) -> list[list[str]]:
    """Channels that run on the same weights, the largest group first."""
    groups: dict[str, list[str]] = {}
    for name in channels.names():
        groups.setdefault(channels.release(name).runs_on, []).append(name)
    return sorted(groups.values(), key=lambda names: (-len(names), names))


def application(
    registry: Registry, channels: Channels, base: str, cache: Path, keys: Path, audit: Path, device: torch.device | None = None
) -> Starlette:
    """The ready ASGI application. A missing key file is an error: keys are issued on purpose, never by default. The key of the
    metrics by tenant is POSTTRAIN_METRICS_KEY of the environment."""
    model = load_served(registry, channels, base, cache, device)
    engine = ContractEngine(model.runtime.contract, model.runtime.sampler, model.runtime.policy.context)
    router = Router(channels, AccessFile(keys), model)
    return build_app(engine, router, Audit(audit), metrics_key=os.environ.get("POSTTRAIN_METRICS_KEY", "").strip())


def ensure_keys(path: Path, channels: Channels) -> dict[str, str]:
    """Issue one key for each channel, as a tenant of its name, when there is no key file yet. Returns the new keys, shown once."""
    if path.exists():
        return {}
    return {channel: issue_key(path, channel, channel) for channel in channels.names()}
