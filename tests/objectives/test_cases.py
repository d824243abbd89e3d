"""Every conformance key against a second, plain-numpy writing of its formula: loops over rows and tokens, no masks, no torch.

A reference function draws random inputs and returns the case with what it expects; gradients come from central differences of
the reference loss. So a slip would have to be made twice, in two styles, to pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference_losses as losses
import reference_policies as policies
from numpy.random import Generator
from reference_terms import Made

from posttrain.objectives import conform
from posttrain.objectives.cases import ADAPTERS

SEEDS = range(6)
REFERENCES: list[Callable[[Generator], Made]] = [
    losses.sft_ce,
    losses.sft_accum,
    losses.packing,
    losses.lora,
    losses.multi_lora,
    losses.vote_preference,
    losses.reward_bt,
    losses.reward_kwise,
    losses.kl_rlhf,
    losses.kl_exact,
    losses.kl_estimators,
    losses.dpo,
    losses.dpo_from_logits,
    losses.orpo,
    losses.kto,
    losses.kd_logits,
    losses.kd_probs,
    losses.proxy_kd,
    losses.rag,
    losses.constrained_step,
    losses.prm_ce,
    policies.rloo,
    policies.gae,
    policies.kl_reward_shaping,
    policies.ppo_clip,
    policies.ppo_value,
    policies.grpo_advantage,
    policies.group_policy_loss,
    policies.overlong_penalty,
    policies.gspo,
    policies.luffy,
]


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("reference", REFERENCES, ids=lambda function: function.__name__)
def test_the_objective_agrees_with_its_plain_reference(reference: Callable[[Generator], Made], seed: int) -> None:
    inputs, params, expected = (_jsonable(part) for part in reference(np.random.default_rng(seed)))
    case = conform.Case(f"{reference.__name__}/{seed}", reference.__name__, inputs, params, expected, atol=1e-6, rtol=1e-6)
    assert case.objective in ADAPTERS
    assert conform.check(case) == []
