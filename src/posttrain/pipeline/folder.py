"""The run folder: what a run has done so far, as files. A stage is done when its `done.json` exists; everything else can be redone."""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from posttrain.files import ChainLog
from posttrain.files.atomic import storage_errors, write_json, write_text
from posttrain.recipe import Recipe

_LIBRARIES = ("posttrain", "torch", "transformers", "peft", "accelerate", "llguidance", "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`OUTPUT/NAME`. Opening it with a recipe of another hash is an error, and so is going on with other inputs: a run's results belong
    to one recipe and to what it was started with."""

    root: Path

    @classmethod
    def open(cls, recipe: Recipe) -> RunFolder:
        """Nothing is written yet: a run that its checks refuse has not started, and its name stays free."""
        folder = cls(Path(recipe.output) / recipe.name)
        with storage_errors(folder.root):
            folder.root.mkdir(parents=True, exist_ok=True)
        if folder._note().get("recipe_sha256", recipe.hash) != recipe.hash:
            raise RecipeError(
                "this run was started with another recipe",
                where=str(folder.root),
                value=recipe.hash[:12],
                remedy="give the run another name (name=...), or delete its folder",
            )
        return folder

    def start(self, recipe: Recipe, inputs: Mapping[str, Mapping[str, str]]) -> None:
        """Note what the run starts with, or raise RecipeError where it is something else than when it was started. inputs: what the
        recipe only names, by the key that names it: `source` and the `sha256` of its content."""
        import yaml

        note = self._note()
        for key, known in note.get("inputs", {}).items():
            if inputs[key]["sha256"] != known["sha256"]:
                raise RecipeError(
                    f"{inputs[key]['source']} is not what this run was started with",
                    where=key,
                    value=inputs[key]["sha256"][:12],
                    remedy=f"put back what had the hash {known['sha256'][:12]}, or give the run another name (name=...)",
                )
        if not note:
            resolved = yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
            write_text(self.root / "recipe.resolved.yaml", resolved)
        if "inputs" not in note:  # runs of earlier versions did not note them
            started = {"recipe_sha256": recipe.hash, "versions": versions(), **note}
            write_json(self.root / "run.json", {**started, "inputs": {key: dict(value) for key, value in inputs.items()}})

    def _note(self) -> dict[str, Any]:
        path = self.root / "run.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    @property
    def versions(self) -> dict[str, str]:
        return dict(self._note()["versions"])

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def finished(self) -> bool:
        path = self.root / "summary.json"
        return path.exists() and json.loads(path.read_text("utf-8")).get("status") == "finished"

    def stage(self, name: str) -> Path:
        path = self.root / "stages" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def decided(self, name: str) -> dict[str, Any] | None:
        """What the stage's gate decided, while its publishing has not come to its end."""
        return self._read(name, "decided.json")

    def decide(self, name: str, value: Mapping[str, Any]) -> None:
        write_json(self.stage(name) / "decided.json", dict(value))

    def done(self, name: str) -> dict[str, Any] | None:
        return self._read(name, "done.json")

    def finish(self, name: str, value: Mapping[str, Any]) -> None:
        write_json(self.stage(name) / "done.json", dict(value))
        (self.stage(name) / "decided.json").unlink(missing_ok=True)

    def _read(self, name: str, file: str) -> dict[str, Any] | None:
        path = self.root / "stages" / name / file
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def metrics(self) -> ChainLog:
        return ChainLog(self.root / "metrics.jsonl", sync=False)


@dataclass(slots=True)
class Clock:
    """Seconds by part ('data', 'train', 'sample', 'evaluate', ...) of one stage, resumable: earlier seconds can be carried in."""

    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time spent inside counts for `name` and not for the part around it."""
        start, before = time.monotonic(), sum(self.parts.values())
        try:
            yield
        finally:
            inner = sum(self.parts.values()) - before
            self.parts[name] = self.parts.get(name, 0.0) + time.monotonic() - start - inner

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak_memory() -> None:
    """Let the peak start anew from what is held now (Linux; elsewhere it stays the whole process's)."""
    with suppress(OSError):
        _CLEAR.write_text("5")


def peak_memory_mb() -> float:
    """Largest resident set of this process since `forget_peak_memory`, in MiB."""
    with suppress(OSError, StopIteration, ValueError):
        line = next(line for line in _STATUS.read_text("utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 / (1024 if platform.system() == "Darwin" else 1)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}
