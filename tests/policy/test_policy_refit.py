"""A cut student's layers, refitted by least squares: the closed form, what it leaves alone, and what it refuses."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from posttrain.errors import BaseModelError
from posttrain.policy import Pack, Policy, cut_layers
from posttrain.policy.refit import _worth_most, check_refit, refit
from tiny_models import random_ids, sequence, tiny_model

RNG = random.Random(3)
PACK = Pack.of([sequence(ids, [len(ids) - 1]) for ids in (random_ids(60, RNG) for _ in range(6))])
KEPT = (0, 2)


def student_of(teacher: Policy) -> Policy:
    return Policy(cut_layers(teacher.base, KEPT))


@torch.no_grad()
def miss(student: Policy, teacher: Policy, pack: Pack) -> float:
    """Mean relative squared distance of the states after the second kept layer."""
    own, other = student.states(pack, [1])[1][0], teacher.states(pack, [2])[1][0]
    return float(((own - other).square().sum(-1) / other.square().sum(-1)).mean())


def test_a_refitted_layer_comes_nearer_and_the_distance_reported_is_the_one_left() -> None:
    teacher = Policy(tiny_model("llama"))
    student = student_of(teacher)
    before = miss(student, teacher, PACK)
    (left,) = refit(student, teacher, KEPT, PACK, 1e-4)
    assert left < 0.7 * before
    assert miss(student, teacher, PACK) == pytest.approx(left, rel=1e-3)


@torch.no_grad()
def test_the_projection_is_the_ridge_solution_of_the_normal_equations() -> None:
    teacher, ridge = Policy(tiny_model("llama")), 0.3
    student = student_of(teacher)
    layer = student.base.base_model.layers[1]
    first = layer.mlp.down_proj.weight.clone().double()
    inner: list[Tensor] = []
    # a plain forward pass of the layer's parts, before the refit
    hook = layer.mlp.register_forward_hook(lambda mlp, x, _: inner.append(mlp.act_fn(mlp.gate_proj(x[0])) * mlp.up_proj(x[0])))
    own, target = student.states(PACK, [1])[1][0].double(), teacher.states(PACK, [2])[1][0].double()
    hook.remove()
    m = inner[0][0, : PACK.tokens].double()
    weight = target.square().sum(-1).reciprocal()
    wanted = target - own + m @ first.t()
    damp = ridge * float((m.square() * weight[:, None]).sum(0).mean()) * torch.eye(m.shape[1], dtype=torch.float64)
    gram, cross = m.t() @ (m * weight[:, None]) + damp, m.t() @ (wanted * weight[:, None]) + damp @ first.t()
    refit(student, teacher, KEPT, PACK, ridge)
    assert torch.allclose(layer.mlp.down_proj.weight.double(), torch.linalg.solve(gram, cross).t(), atol=1e-4)


def test_layers_that_stand_where_they_stood_and_the_teacher_are_left_alone() -> None:
    teacher = Policy(tiny_model("qwen3"))
    student, locked = student_of(teacher), teacher.fingerprint
    before = {name: p.clone() for name, p in student.base.named_parameters()}
    refit(student, teacher, KEPT, PACK, 0.1)
    changed = {name for name, p in student.base.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split("layers.")[1] for name in changed} == {"1.mlp.down_proj.weight"}
    teacher._fingerprint = None
    assert teacher.fingerprint == locked
    assert not any(layer._forward_hooks or layer.mlp._forward_hooks for layer in student.base.base_model.layers)


def test_layers_that_norm_what_the_mlp_adds_are_refused_by_name() -> None:
    teacher = Policy(tiny_model("gemma3"))
    with pytest.raises(BaseModelError, match="cannot be refitted"):
        refit(student_of(teacher), teacher, KEPT, PACK, 0.1)


def test_layers_that_scale_what_the_mlp_adds_and_policies_that_run_row_by_row_are_refused_too() -> None:
    scaled, apart = Policy(tiny_model("llama")), Policy(tiny_model("llama"))
    scaled.base.base_model.layers[0].residual_multiplier = 0.22  # as Granite's layers have it
    apart.packs = False
    for policy in (scaled, apart):
        with pytest.raises(BaseModelError, match="cannot be refitted"):
            check_refit(policy)


def test_the_width_that_is_there_already_leaves_layers_in_their_place_alone() -> None:
    teacher = Policy(tiny_model("llama"))
    student = Policy(cut_layers(teacher.base, (0, 1, 2)))
    assert refit(student, teacher, (0, 1, 2), PACK, 0.1, width=48) == []


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_neurons_that_do_nothing_are_the_ones_that_go(family: str) -> None:
    teacher = Policy(tiny_model(family))
    idle = torch.arange(0, 48, 2)
    for layer in teacher.base.base_model.layers:
        layer.mlp.up_proj.weight.data[idle] = 0.0
    student = Policy(cut_layers(teacher.base, (0, 1, 2)))
    left = refit(student, teacher, (0, 1, 2), PACK, 1e-3, width=24)
    assert left == pytest.approx([0.0] * 3, abs=1e-6) and student.config.intermediate_size == 24
    with torch.no_grad():
        assert torch.allclose(student.hidden(PACK), teacher.hidden(PACK), atol=1e-4)
    for own, other in zip(student.base.base_model.layers, teacher.base.base_model.layers, strict=True):
        assert torch.equal(own.mlp.gate_proj.weight, other.mlp.gate_proj.weight[1::2])


def test_removal_by_worth_leaves_less_than_removal_at_random() -> None:
    """One layer at a time: a least-squares fit over the chosen neurons against fits over drawn ones."""
    teacher = Policy(tiny_model("llama"))
    layer = teacher.base.base_model.layers[0]
    seen: list[Tensor] = []
    hook = layer.mlp.register_forward_hook(lambda mlp, x, _: seen.append(mlp.act_fn(mlp.gate_proj(x[0])) * mlp.up_proj(x[0])))
    with torch.no_grad():
        _, (state,) = teacher.states(PACK, [0])
    hook.remove()
    scale = state.norm(dim=-1, keepdim=True).reciprocal()
    m = (seen[0][0, : PACK.tokens] * scale).double()
    y = m @ layer.mlp.down_proj.weight.double().t()
    (left, *_) = refit(Policy(cut_layers(teacher.base, (0, 1, 2))), teacher, (0, 1, 2), PACK, 1e-4, width=12)
    rng = torch.Generator().manual_seed(0)

    def at_random() -> float:
        own = m[:, torch.randperm(48, generator=rng)[:12]]
        return float((y - own @ torch.linalg.lstsq(own, y).solution).square().sum() / len(y))

    assert left < 0.9 * min(at_random() for _ in range(20))


@pytest.mark.parametrize("width", [12, 30, 47, 48])
def test_one_inverse_for_all_rounds_chooses_as_an_inverse_a_round(width: int) -> None:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(200, 48, generator=rng, dtype=torch.float64) @ torch.randn(48, 48, generator=rng, dtype=torch.float64)
    gram, wanted = x.t() @ x + torch.eye(48), x.t() @ torch.randn(200, 7, generator=rng, dtype=torch.float64)
    want = torch.arange(48)
    for turn in range(1, 9):
        inverse = torch.linalg.inv(gram[want][:, want])
        worth = (inverse @ wanted[want]).square().sum(1) / inverse.diagonal()
        want = want[worth.topk(48 - (48 - width) * turn // 8).indices.sort().values]
    assert torch.equal(_worth_most(gram, wanted, width), want)


def test_a_narrow_student_is_stored_and_loaded_as_any_model(tmp_path: Path) -> None:
    teacher = Policy(tiny_model("llama"))
    student = student_of(teacher)
    refit(student, teacher, KEPT, PACK, 0.1, width=16)
    student.base.save_pretrained(tmp_path)
    again = Policy.load(tmp_path, torch.float32)
    assert again.config.intermediate_size == 16
    with torch.no_grad():
        assert torch.allclose(again.hidden(PACK), student.hidden(PACK), atol=1e-5)
