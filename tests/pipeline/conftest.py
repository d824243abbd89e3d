"""A tiny random base in a folder, and a recipe that walks the whole road over it in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """As little of the process is left to clean up as when it is killed."""


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random Llama and the tiny tokenizer."""
    return make_base(tmp_path_factory.mktemp("base"))


def make_base(folder: Path, **sizes: int) -> Path:
    import torch

    from posttrain.policy.weights import save_dense
    from tiny_models import stored, tiny_model, train_tokenizer

    tokenizer = train_tokenizer()
    model = stored(
        tiny_model("llama", vocabulary=len(tokenizer), max_position_embeddings=4096, num_hidden_layers=4, **sizes), torch.bfloat16
    )
    save_dense(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_recipe(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """All six kinds of stages with next to nothing to do. Its gates ask for what a random model can give, so that the road is walked."""
    kinds = {"lookup": 3, "high_risk": 3, "benign": 3, "reconcile": 3, "tenant_style": 3, "advise": 3}
    easy = {"targets": [{"metric": "schema_validity_constrained", "at_least": 0.0}]}
    hard = {"targets": [{"metric": "tool_success", "at_least": 1.0}]}
    few = {"batch": 2, "optimiser": {"lr": 1.0e-3}, "max_tokens": 4096, "adapter": {"rank": 2, "alpha": 4}}
    reason = {
        "collect": {"tasks": 2, "samples": 2, "demonstrate": True},
        "grpo": {"steps": 1, "tasks": 2, "group": 2, "max_len": 8},
        "max_tokens": 4096,
        "adapter": {"rank": 2},
    }
    stages = [
        {"name": "sft", "kind": "sft", "data": {"n": 4}, "options": few, "gate": easy},
        {"name": "tools", "kind": "tools", "data": {"n": 4}, "options": few, "gate": hard},
        {"name": "preference", "kind": "preference", "data": {"n": 4}, "options": few, "gate": easy},
        {"name": "reason", "kind": "reason", "data": {"n": 4, "kinds": {"reconcile": 1}}, "options": reason, "gate": easy},
        {
            "name": "distill", "kind": "distill", "data": {"n": 4, "own_share": 0.0, "kinds": {"lookup": 1}},
            "options": {"layers": 2, "batch": 2}, "gate": easy,
        },
        {"name": "adapters", "kind": "adapters", "data": {"n": 2}, "options": few, "gate": easy},
    ]  # fmt: skip
    evaluation = {"split": "test", "seed": 3, "kinds": kinds, "max_tokens": 8, "free": 3, "drift": 3, "latency": 1}
    recipe = {
        "name": "tiny",
        "seed": 1,
        "base": str(base),
        "output": str(output),
        "dtype": "float32",
        "threads": 1,
        "pack_tokens": 2048,
    }
    return {**recipe, "evaluation": evaluation, "stages": stages, **changes}
