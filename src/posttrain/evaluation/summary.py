"""`summary.json`: the base and every stage in order. Programs rely on its shape (docs/formats.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.files.atomic import write_json


@dataclass(frozen=True, slots=True)
class StageSummary:
    """One stage: the lever, its evidence and its release. metrics: {name: {value, low, high, n, unit}}."""

    name: str
    kind: str
    verdict: str
    accepted: bool
    releases: Mapping[str, str]
    parent: str | None
    metrics: Mapping[str, Mapping[str, Any]]
    checks: tuple[Mapping[str, Any], ...]
    reasons: tuple[str, ...]
    seconds: float
    seconds_by_part: Mapping[str, float]
    peak_memory_mb: float
    options: Mapping[str, Any]
    data: Mapping[str, str]
    stopped: Mapping[str, str]
    parity: Mapping[str, float]

    @property
    def release(self) -> str | None:
        """Id of the accepted release ('main', or the first tenant's)."""
        return (self.releases.get("main") or next(iter(self.releases.values()), None)) if self.accepted else None


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run: status 'running' or 'finished', the base's metrics, the stages so far, and where the channels point."""

    run: str
    status: str
    base: Mapping[str, Any]
    stages: tuple[StageSummary, ...]
    final_release: str | None
    channels: Mapping[str, str]
    seconds: float
    peak_memory_mb: float
    versions: Mapping[str, str]
    recipe_sha256: str
    peak_device_memory_mb: float = 0.0  # of a GPU

    def to_json(self) -> dict[str, Any]:
        value = json.loads(json.dumps(asdict(self)))
        for stage, row in zip(self.stages, value["stages"], strict=True):
            row["release"] = stage.release
        return dict(value)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "summary.json") -> RunSummary:
        """Raises DataError naming what is missing."""
        try:
            names = [item.name for item in fields(StageSummary)]
            stages = tuple(StageSummary(**{name: _tuple(row[name]) for name in names}) for row in value["stages"])
            plain = [
                item.name for item in fields(cls) if item.name != "stages" and (item.default is MISSING or item.name in value)
            ]
            return cls(**{name: value[name] for name in plain}, stages=stages)
        except (KeyError, TypeError) as error:
            raise DataError(f"not a run summary ({error})", where=where, remedy="let `posttrain run` write it again") from error

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> RunSummary:
        try:
            return cls.from_json(json.loads(path.read_text("utf-8")), str(path))
        except (OSError, json.JSONDecodeError) as error:
            raise DataError(f"the summary cannot be read ({error})", where=str(path), remedy="run the recipe again") from error


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
