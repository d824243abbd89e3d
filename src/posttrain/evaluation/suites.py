"""Suites: a world's tasks for any seed, or a JSONL file of Task records of anyone's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.agents.world import load_world
from posttrain.data import dataset_hash
from posttrain.data.records import Task
from posttrain.errors import DataError
from posttrain.evaluation.tasks import read_own_tasks

_KINDS = ("lookup", "advise", "high_risk", "benign", "reconcile", "tenant_style")


@dataclass(frozen=True, slots=True)
class Suite:
    """Named tasks. Two scorecards are compared task by task when name, split, seed and `sha256` are equal. `notes`: what was left out of
    a file."""

    name: str
    split: str
    seed: int
    tasks: tuple[Task, ...]
    world: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of all that the tasks hold, in their order."""
        return dataset_hash(self.tasks)

    @classmethod
    def load(
        cls, source: str, *, split: str = "test", seed: int = 1, n: int = 96, kinds: Mapping[str, int] | None = None
    ) -> Suite:
        """A file that ends in .jsonl or .jsonl.gz, or a world's name. `kinds` gives a number of tasks for each kind of a world;
        without it, n tasks are spread over the world's kinds. Raises DataError for malformed rows and an empty suite."""
        if source.endswith((".jsonl", ".jsonl.gz", ".json")) or Path(source).is_file():
            return cls._from_file(Path(source))
        world = load_world(source)
        known = tuple(getattr(world, "kinds", _KINDS))
        counts = dict(kinds) if kinds else {kind: n // len(known) + (index < n % len(known)) for index, kind in enumerate(known)}
        tasks = [
            task for kind, count in counts.items() if count for task in world.tasks(kinds=[kind], n=count, split=split, seed=seed)
        ]
        if not tasks:
            raise DataError("the suite is empty", where=source, value=n, remedy="ask for at least one task")
        return cls(source, split, seed, tuple(tasks), source)

    @classmethod
    def _from_file(cls, path: Path) -> Suite:
        own = read_own_tasks(path)
        return cls(path.name, "file", 0, own.tasks, own.world.name, own.report.notes)
