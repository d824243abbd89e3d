"""The registry of a runs folder, as people and programs read it, and the moves they make in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.errors import RegistryError, nearest_of
from posttrain.releases import Channels, Override, Registry
from posttrain.serving.keys import Access, issue_key, revoke_key

KEYS = "keys.json"


def open_registry(runs: Path) -> tuple[Registry, Channels]:
    """`RUNS/registry`. RegistryError when there is none yet."""
    root = runs / "registry"
    if not root.is_dir():
        raise RegistryError(
            "there is no registry here", where=str(root), remedy="run a recipe first, or name its folder with --runs"
        )
    registry = Registry(root)
    return registry, Channels(registry)


def registry_view(runs: Path) -> dict[str, Any]:
    """Releases, candidates, channels and history as plain data."""
    registry, channels = open_registry(runs)
    return {
        "releases": [
            {
                "id": release.id, "stage": release.lineage.stage, "kind": release.lineage.kind.value, "tenant": release.lineage.tenant,
                "parent": release.lineage.parent.release, "runs_on": release.runs_on, "overridden": release.override is not None,
            }
            for release in registry.list()
        ],
        "candidates": [
            {"id": item.id, "stage": item.lineage.stage, "verdict": item.verdict.outcome.value, "weights_kept": item.weights}
            for item in registry.candidates()
        ],
        "channels": dict(channels.pointers()),
        "history": [
            {name: getattr(move, name) for name in ("at", "channel", "release", "previous", "by", "why")} | {"action": move.action.value}
            for move in channels.history()
        ],
    }  # fmt: skip


def registry_lines(view: dict[str, Any]) -> list[str]:
    """The same for people."""
    pointed: dict[str, list[str]] = {}
    for channel, release in view["channels"].items():
        pointed.setdefault(release, []).append(channel)
    lines = ["releases"]
    for item in view["releases"]:
        where = f"  <- {', '.join(pointed[item['id']])}" if item["id"] in pointed else ""
        parent = item["parent"] or "base"
        lines.append(
            f"  {item['id']}  {item['kind']:7}  {item['stage']:12}  parent {parent}{'  overridden' if item['overridden'] else ''}{where}"
        )
    lines.append("candidates that did not pass")
    lines += [f"  {item['id']}  {item['stage']:12}  {item['verdict']}" for item in view["candidates"]] or ["  none"]
    lines.append("history")
    lines += [
        f"  {move['at']}  {move['action']:8}  {move['channel']} -> {move['release']}  by {move['by']}: {move['why']}"
        for move in view["history"]
    ]
    return lines


def promote_release(runs: Path, channel: str, release: str, *, by: str, why: str, override: bool) -> list[str]:
    """Promote; with `override` a kept candidate becomes a release on a person's name first. Returns lines to print."""
    registry, channels = open_registry(runs)
    if override:
        release = registry.accept(release, Override.now(by, why)).id
    before = channels.pointers().get(channel)
    # before the move: what fails here moves nothing
    stale = registry.stale_adapters(before, release) if before is not None else ()
    channels.promote(channel, release, by, why)
    return [
        f"{channel}: {before or 'nothing'} -> {release}",
        *(
            f"must be made again on the new parent: {item.id} ({', '.join(filter(None, (item.lineage.stage, item.lineage.tenant)))})"
            for item in stale
        ),
    ]


def issue_tenant_key(runs: Path, tenant: str, channel: str | None) -> tuple[str, str]:
    """A new key of a tenant and the channel it leads to: the one named, else `Access.channel_of`. RegistryError for a channel that is not
    there."""
    path, names = runs / KEYS, open_registry(runs)[1].names()
    access = Access.read(path) if path.exists() else Access({}, ())
    wanted = channel or access.channel_of(tenant)
    if wanted not in names:
        raise RegistryError(
            "there is no such channel", where=str(runs), value=wanted,
            remedy=f"{nearest_of(wanted, names)}; name one with --channel, or promote a release to it first",
        )  # fmt: skip
    return issue_key(path, tenant, wanted), wanted


def key_lines(runs: Path) -> list[str]:
    """Whose keys there are, by their ids, and where they lead."""
    access = Access.read(runs / KEYS)
    return [f"{caller.key_id}  {caller.tenant} -> {access.tenants[caller.tenant]}" for caller in access.listed()] or ["no keys"]


def revoke_tenant_key(runs: Path, key_id: str) -> str:
    """See `serving.keys.revoke_key`."""
    return revoke_key(runs / KEYS, key_id)
