"""The model behind the server: one set of dense weights with the adapters of all channels resident on it."""

from __future__ import annotations

from pathlib import Path

import torch
from starlette.applications import Starlette

from posttrain.errors import BindingError, RegistryError
from posttrain.pipeline.parents import Parents
from posttrain.pipeline.runtime import Runtime
from posttrain.releases import Channels, Kind, Registry, Release
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
    """Load the weights that all channels' releases run on. One process holds one set of weights: channels that need another are an
    error that says which. `device` None: see `find_device`."""
    releases = {name: channels.release(name) for name in channels.names()}
    if not releases:
        raise RegistryError(
            "no channel points at a release", where=str(registry.root), remedy="run a recipe, or promote a release first"
        )
    needed: dict[str, list[str]] = {}
    for name, release in releases.items():
        needed.setdefault(release.runs_on, []).append(name)
    if len(needed) > 1:
        groups = "; ".join(f"{fingerprint[:12]}: {', '.join(names)}" for fingerprint, names in needed.items())
        raise BindingError(
            "the channels' releases run on different weights",
            where="serve",
            value=groups,
            remedy="serve them from separate registries or processes (--channel), or promote releases of one parent",
        )
    parents = Parents(registry, base, cache, None)
    first: Release = next(iter(releases.values()))
    runtime = Runtime.load(parents.runs_on(first).folder, device=device)
    runtime.contract.verify(first.contract, where=first.id)
    return ServedModel(registry, runtime)


def application(
    registry: Registry, channels: Channels, base: str, cache: Path, keys: Path, audit: Path, device: torch.device | None = None
) -> Starlette:
    """The ready ASGI application. A missing key file is an error: keys are issued on purpose, never by default."""
    model = load_served(registry, channels, base, cache, device)
    context = int(getattr(model.runtime.policy.config, "max_position_embeddings", 4096))
    engine = ContractEngine(model.runtime.contract, model.runtime.sampler, context)
    return build_app(engine, Router(channels, AccessFile(keys), model), Audit(audit))


def ensure_keys(path: Path, channels: Channels) -> dict[str, str]:
    """Issue one key for each channel, as a tenant of its name, when there is no key file yet. Returns the new keys, shown once."""
    if path.exists():
        return {}
    return {channel: issue_key(path, channel, channel) for channel in channels.names()}
