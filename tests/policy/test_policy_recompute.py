"""Recomputing blocks changes what is kept, not what is computed."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from posttrain.policy import LoraOptions, Pack, Policy, cut_layers
from tiny_models import FAMILIES, random_ids, sequence, tiny_model

RNG = random.Random(6)
TRUNK = random_ids(20, RNG)
PACK = Pack.of([sequence([*TRUNK, *random_ids(9, RNG)], range(20, 29)) for _ in range(3)])


def gradients(policy: Policy) -> tuple[Tensor, dict[str, Tensor], int]:
    """Log-probabilities, gradients, and the bytes that the graph keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for parameter in policy.adapter_parameters("main").values():
        parameter.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        values = policy.logprobs(PACK)
    size = sum(kept.values())
    values.sum().backward()
    return values.detach(), {name: p.grad.clone() for name, p in policy.adapter_parameters("main").items()}, size  # type: ignore[union-attr]


def made(family: str, recompute: bool, top: int | None = None) -> Policy:
    policy = Policy(tiny_model(family))
    policy.recompute = recompute
    policy.add_adapter("main", LoraOptions(rank=4, top=top), 1)
    for _, parameter in sorted(policy.adapter_parameters("main").items()):
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return policy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("top", [None, 1])
def test_values_and_gradients_are_the_same_and_less_is_kept(family: str, top: int | None) -> None:
    plain, again = gradients(made(family, False, top)), gradients(made(family, True, top))
    torch.testing.assert_close(again[0], plain[0])
    assert again[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(again[1][name], gradient, atol=1e-6, rtol=1e-4)
    if top is None:
        assert again[2] < 0.7 * plain[2]


def test_a_student_cut_from_a_recomputing_teacher_has_blocks_of_its_own() -> None:
    teacher = made("llama", True)
    teacher.remove_adapters()
    student = Policy(cut_layers(teacher.base, (0, 2)))
    with torch.no_grad():
        before = student.hidden(PACK)
        for block in teacher.base.base_model.layers:
            block.mlp.up_proj.weight.zero_()
        torch.testing.assert_close(student.hidden(PACK), before)
