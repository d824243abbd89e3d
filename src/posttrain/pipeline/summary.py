"""`summary.json` from what the run folder holds: the base and every stage in the recipe's order."""

from __future__ import annotations

import dataclasses
from typing import Any

from posttrain.evaluation import RunSummary, StageSummary
from posttrain.pipeline.folder import RunFolder
from posttrain.recipe import Recipe, stage_options
from posttrain.releases import Channels


def summarise(recipe: Recipe, folder: RunFolder, channels: Channels, status: str) -> RunSummary:
    """Write and return the summary of what is done so far."""
    base = folder.done("base") or {}
    stages = []
    final = None
    for stage in recipe.stages:
        done = folder.done(stage.name)
        if done is None:
            continue
        if done["accepted"] and "main" in done["releases"]:
            final = done["releases"]["main"]
        stages.append(
            _stage(stage.name, stage.kind, done, {"data": stage.data.model_dump(exclude_defaults=True), **_options(stage)})
        )
    base_view = {"name": recipe.base, "metrics": base.get("scorecard", {}).get("metrics", {})}
    parts = [base, *(folder.done(stage.name) or {} for stage in recipe.stages)]
    summary = RunSummary(
        run=recipe.name, status=status,
        base=base_view | {key: base.get(key, empty) for key, empty in (("seconds", 0.0), ("dtype", ""), ("device", ""))},
        stages=tuple(stages), final_release=final, channels=dict(channels.pointers()),
        seconds=sum(part.get("seconds", 0.0) for part in parts),
        peak_memory_mb=max((part.get("peak_memory_mb", 0.0) for part in parts), default=0.0),
        peak_device_memory_mb=max((part.get("peak_device_memory_mb", 0.0) for part in parts), default=0.0),
        versions=folder.versions, recipe_sha256=recipe.hash,
    )  # fmt: skip
    summary.save(folder.root / "summary.json")
    return summary


def _stage(name: str, kind: str, done: dict[str, Any], options: dict[str, Any]) -> StageSummary:
    verdict = done["verdict"]
    return StageSummary(
        name=name, kind=kind, verdict=verdict["outcome"], accepted=done["accepted"], releases=done["releases"], parent=done["parent"],
        metrics=done["scorecard"]["metrics"], checks=tuple(verdict["checks"]), reasons=tuple(verdict["reasons"]), seconds=done["seconds"],
        seconds_by_part=done["seconds_by_part"], peak_memory_mb=done["peak_memory_mb"], options=options, data=done["data"],
        stopped=done["stopped"], parity=done["parity"],
    )  # fmt: skip


def _options(stage: Any) -> dict[str, Any]:
    return dict(dataclasses.asdict(stage_options(stage)))
