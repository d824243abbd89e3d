"""Workbenches over a tiny model, with a log that keeps what it was told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.contract import Contract
from posttrain.policy import LoraOptions, Policy
from posttrain.stages import Workbench
from posttrain.training import OptimiserOptions
from tiny_models import tiny_model

LORA = LoraOptions(rank=8, alpha=16)
FAST = OptimiserOptions(lr=3e-2)


@dataclass
class Notes:
    """What a stage logged: (phase, step, metrics)."""

    lines: list[tuple[str, int, Mapping[str, float]]] = field(default_factory=list)

    def __call__(self, phase: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self.lines.append((phase, step, dict(metrics)))

    def of(self, name: str, phase: str = "train") -> list[float]:
        return [metrics[name] for at, _, metrics in self.lines if at == phase and name in metrics]


@dataclass
class Shop:
    """Makes workbenches on fresh policies, all alike."""

    contract: Contract
    folder: Path
    notes: Notes = field(default_factory=Notes)

    def bench(self, run: str = "run", **changes: Any) -> Workbench:
        policy = Policy(tiny_model(vocabulary=self.contract.vocabulary_size + 12))
        made = {"identity": "test", "seed": 5, "pack_tokens": 200, "log": self.notes, **changes}
        return Workbench(policy, self.contract, self.folder / run, **made)
