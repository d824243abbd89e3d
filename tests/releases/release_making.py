"""Small, real release folders for tests: a few safetensors numbers, a lock, a verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from posttrain.contract import ContractLock
from posttrain.data.records import ToolSpec
from posttrain.evaluation.scorecard import Metric, Scorecard
from posttrain.evaluation.verdict import Check, Outcome, Verdict
from posttrain.files.hashing import canonical_json
from posttrain.releases import Kind, Lineage, Parent, Parts, Registry, grammar_record

BASE = "b" * 64  # fingerprint of the base weights


def contract_lock(name: str = "template/1") -> ContractLock:
    return ContractLock(name, "1" * 64, "2" * 64, (("<|im_end|>", 2),), 64, (("probe", (1, 2, 3), "3" * 64),))


def verdict(outcome: Outcome = Outcome.REAL_GAIN) -> Verdict:
    check = Check(
        "tool_success", "target", "all", 0.2, 0.9, 0.7, 0.6, 0.8, 100, "improve beyond chance", outcome is Outcome.REAL_GAIN
    )
    return Verdict(outcome, (check,), ("tool_success rose",), {"method": "paired bootstrap"})


def scorecard() -> Scorecard:
    return Scorecard("finance_ops", "dev", 7, 100, "candidate", {"tool_success": Metric(0.9, 0.83, 0.95, 100)})


@dataclass(frozen=True)
class Made:
    """How to make the parts of one release; `fill` makes its weights its own."""

    folder: Path
    kind: Kind = Kind.ADAPTER
    stage: str = "sft"
    fill: float = 1.0
    parent: Parent = field(default_factory=lambda: Parent(BASE))
    outcome: Outcome = Outcome.REAL_GAIN
    tenant: str | None = None
    lock: ContractLock = field(default_factory=contract_lock)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def parts(self) -> Parts:
        dense = self.kind is Kind.DENSE
        source = self.folder / f"{self.stage}-{self.tenant}-{self.fill}"
        source.mkdir(parents=True, exist_ok=True)
        name, config = ("model", {"model_type": "llama"}) if dense else ("adapter_model", {"peft_type": "LORA", "r": 4})
        save_file({"w": np.full((2, 3), self.fill, np.float32)}, source / f"{name}.safetensors")
        (source / ("config.json" if dense else "adapter_config.json")).write_text(json.dumps(config))
        (source / "tokenizer.json").write_text("{}")
        (source / "contract.lock.json").write_bytes(canonical_json(self.lock.to_json()) + b"\n")
        for file, data in self.files.items():
            (source / file).write_bytes(data)
        weights = f"{self.fill:064.0f}" if dense else None
        lineage = Lineage(
            self.kind, self.stage, "smollm2-135m", BASE, self.parent, weights, self.tenant,
            {"train.jsonl": "d" * 64}, {"data": 1, "init": 2}, {"torch": "2.13.0"}, "e" * 64,
        )  # fmt: skip
        tool = ToolSpec("query_erp", "Reads.", {"type": "object", "properties": {"sql": {"type": "string"}}})
        return Parts(
            source,
            lineage,
            verdict(self.outcome),
            scorecard(),
            grammar_record({"type": "object"}, (tool,), {"llguidance": "1.9"}),
        )


def add_release(registry: Registry, folder: Path, **how: object) -> str:
    """Build a release into a registry and return its id."""
    return registry.build(Made(folder, **how).parts()).id  # type: ignore[arg-type]
