"""QLoRA: NF4 weights under an adapter give the numbers of the weights they stand for, and the release stays on the dense parent."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.errors import BaseModelError, BindingError
from posttrain.objectives.nf4 import quantise as nf4
from posttrain.objectives.nf4 import quantise_scales
from posttrain.policy import LoraOptions, Policy
from posttrain.policy.pack import Pack
from posttrain.policy.weights import base_parameters, merge_adapter
from posttrain.stages.sft import token_cross_entropy
from posttrain.training import Learner, OptimiserOptions
from tiny_models import random_ids, sequence
from tiny_models import tiny_model as thin_model

pytest.importorskip("bitsandbytes")

QLORA = LoraOptions(rank=4, alpha=8, base="nf4")


def tiny_model() -> Any:
    """Rows of whole blocks of 64 weights."""
    return thin_model(hidden_size=64, intermediate_size=128, head_dim=16)


def pack() -> Pack:
    rng = random.Random(0)
    trunk = random_ids(6, rng)
    return Pack.of([sequence([*trunk, *random_ids(9, rng)]) for _ in range(3)])


def logprobs(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.logprobs(pack())


def blocks_bytes(model: Any) -> int:
    parameters = [p for name, p in model.base_model.layers.named_parameters() if "norm" not in name and "lora_" not in name]
    return sum(p.numel() * p.element_size() for p in parameters)


def restored(weight: Tensor) -> Tensor:
    """The NF4 values of a weight, its scales quantised too, by the project's own arithmetic (objectives.md 2.2)."""
    flat = nf4(weight.detach().reshape(-1))
    scales = quantise_scales(flat.absmax).reconstructed().float()
    levels = flat.dequantised() / flat.absmax.repeat_interleave(64)
    return (levels * scales.repeat_interleave(64)).view_as(weight)


@pytest.fixture
def policy() -> Policy:
    found = Policy(tiny_model())
    found.add_adapter("main", QLORA, seed=1)
    return found


def test_a_pass_equals_one_over_the_weights_the_four_bits_stand_for(policy: Policy) -> None:
    dense = tiny_model()
    with torch.no_grad():
        for name, weight in base_parameters(dense).items():
            if "_proj" in name:
                weight.copy_(restored(weight))
    want = Policy(dense)
    want.add_adapter("main", LoraOptions(rank=4, alpha=8), seed=1)
    torch.testing.assert_close(logprobs(policy), logprobs(want), rtol=1e-3, atol=5e-3)  # a scale may fall between two codes
    for each in (policy, want):
        for parameter in each.adapter_parameters("main").values():
            parameter.requires_grad_(True)
        each.logprobs(pack()).sum().backward()
    gradients = want.adapter_parameters("main")
    for name, parameter in policy.adapter_parameters("main").items():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-2, atol=5e-2, msg=name)


def test_the_blocks_take_half_a_byte_a_weight_and_the_rest_stays_as_it_was(policy: Policy) -> None:
    dense = tiny_model()
    assert blocks_bytes(policy.base) * 8 == blocks_bytes(dense)  # float32; the scales are kept apart from the weights
    kept = base_parameters(policy.base)
    for name, weight in base_parameters(dense).items():
        if "_proj" not in name:
            assert torch.equal(kept[name], weight), name


def test_the_reference_is_the_quantised_base(policy: Policy) -> None:
    start = logprobs(policy)
    for parameter in policy.adapter_parameters("main").values():
        parameter.data.add_(0.05)
    assert not torch.equal(logprobs(policy), start)
    with policy.only_base():
        assert torch.equal(policy.logprobs(pack()), start)


def test_a_pass_without_gradients_does_not_take_them_from_the_next(policy: Policy) -> None:
    def gradients() -> dict[str, Tensor]:
        policy.base.zero_grad()
        policy.logprobs(pack()).sum().backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in policy.adapter_parameters("main").items()
            if parameter.grad is not None
        }

    for parameter in policy.adapter_parameters("main").values():
        parameter.requires_grad_(True)
    before = gradients()
    logprobs(policy)  # as a reference is measured, or a sample drawn
    after = gradients()
    assert before.keys() == after.keys() == policy.adapter_parameters("main").keys()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, msg=name)


def test_it_learns_and_its_adapter_loads_on_the_dense_parent(policy: Policy, tmp_path: Path) -> None:
    learner = Learner.for_adapter(policy, "main", OptimiserOptions(lr=2e-2, warmup=0), 8)
    losses = []
    for _ in range(8):
        learned = pack()
        metrics = learner.forward_backward([learned], token_cross_entropy(float(learned.padded_weights().sum())))
        losses.append(metrics["loss_sum"])
        learner.step()
    learner.freeze()
    assert losses[-1] < 0.8 * losses[0]
    dense = Policy(tiny_model())
    assert policy.fingerprint == dense.fingerprint
    policy.save_adapter("main", tmp_path / "adapter", "owner/base")
    dense.load_adapter("main", tmp_path / "adapter", expected_parent=policy.fingerprint)
    for name, parameter in policy.adapter_parameters("main").items():
        assert torch.equal(parameter.bfloat16(), dense.adapter_parameters("main")[name].bfloat16()), name


def test_nothing_is_merged_into_four_bits(policy: Policy) -> None:
    with pytest.raises(BindingError, match="never merged into quantised"):
        merge_adapter(policy, "main")


def test_adapters_of_the_dense_base_and_of_the_quantised_one_do_not_meet() -> None:
    policy = Policy(tiny_model())
    policy.add_adapter("dense", LoraOptions(rank=2), seed=1)
    with pytest.raises(BindingError, match="adapters of the dense base"):
        policy.add_adapter("main", QLORA, seed=1)


def test_rows_that_do_not_fill_blocks_are_refused() -> None:
    with pytest.raises(BaseModelError, match="do not fill whole blocks"):
        Policy(thin_model()).add_adapter("main", QLORA, seed=1)
