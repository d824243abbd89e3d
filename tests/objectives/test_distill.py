"""Distillation divergences: worked numbers, gradients, temperature, masks, equal models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.objectives import distill

TEACHER = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()


def _random(seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)


def test_both_directions_by_hand() -> None:
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)
    assert distill.forward_kl_tokens(STUDENT, TEACHER).item() == pytest.approx(forward)
    assert distill.reverse_kl_tokens(STUDENT, TEACHER).item() == pytest.approx(reverse)


def test_jsd_by_hand_and_its_ends() -> None:
    mixture = [0.625, 0.375]
    expected = 0.5 * (0.75 * math.log(0.75 / mixture[0]) + 0.25 * math.log(0.25 / mixture[1]))
    expected += 0.5 * (0.5 * math.log(0.5 / mixture[0]) + 0.5 * math.log(0.5 / mixture[1]))
    assert distill.jsd_tokens(STUDENT, TEACHER, 0.5).item() == pytest.approx(expected)
    student, teacher = _random()
    assert torch.equal(distill.jsd_tokens(student, teacher, 0), distill.forward_kl_tokens(student, teacher))
    assert torch.equal(distill.jsd_tokens(student, teacher, 1), distill.reverse_kl_tokens(student, teacher))
    assert distill.jsd_tokens(student, teacher, 1e-9).max().item() < 1e-7  # the curve jumps there
    assert torch.allclose(distill.jsd_tokens(student, teacher, 0.3), distill.jsd_tokens(teacher, student, 0.7))


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_the_forward_gradient_is_student_minus_teacher_over_tau(tau: float) -> None:
    student, teacher = _random()
    student.requires_grad_()
    distill.forward_kl_tokens(student, teacher, tau).sum().backward()
    expected = ((student.detach() / tau).softmax(-1) - (teacher / tau).softmax(-1)) / tau
    assert torch.allclose(student.grad, expected)


@pytest.mark.parametrize(
    "divergence",
    [distill.forward_kl_tokens, distill.reverse_kl_tokens, lambda s, t, tau: distill.jsd_tokens(s, t, 0.3, tau)],
)
def test_gradients_agree_with_finite_differences_and_equal_models_have_none(divergence: object) -> None:
    student, teacher = _random(1)
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, 1.5), (student.requires_grad_(),))  # type: ignore[operator]
    same = (teacher + 3.0).requires_grad_()  # a constant shift is the same distribution
    values = divergence(same, teacher, 1.5)  # type: ignore[operator]
    values.sum().backward()
    assert torch.allclose(values, torch.zeros_like(values), atol=1e-12)
    assert torch.allclose(same.grad, torch.zeros_like(teacher), atol=1e-12)


def test_the_teacher_is_a_constant() -> None:
    student, teacher = (x.requires_grad_() for x in _random())
    distill.forward_kl_tokens(student, teacher).sum().backward()
    assert teacher.grad is None


def test_hinton_mixes_the_soft_term_times_tau_squared_with_the_hard_one() -> None:
    student, teacher = _random()
    targets = torch.tensor([[0, 4, -100], [1, 2, 3]])
    hard = distill.hard_ce_tokens(student, targets)
    assert hard[0, 2].item() == 0
    assert hard[1, 0].item() == pytest.approx(-student[1, 0].log_softmax(0)[1].item())
    expected = 0.25 * 9 * distill.forward_kl_tokens(student, teacher, 3.0) + 0.75 * hard
    assert torch.allclose(distill.hinton_tokens(student, teacher, targets, 3.0, 0.25), expected)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_tokens_may_hold_anything_and_get_exactly_zero_gradient(poison: float) -> None:
    student, teacher = _random()
    weight = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    expected, metrics = distill.forward_kl(student, teacher, weight)
    off = weight == 0
    poisoned = torch.where(off[..., None], poison, student).requires_grad_()
    loss, _ = distill.forward_kl(poisoned, torch.where(off[..., None], poison, teacher), weight)
    loss.backward()
    assert loss.item() == expected.item()
    assert not poisoned.grad[off].any()
    assert torch.isfinite(poisoned.grad).all()
    assert metrics["tokens"].item() == 3
    assert metrics["kl_sum"].item() == pytest.approx(3 * expected.item())


def test_tokens_a_distribution_forbids_are_no_nan() -> None:
    teacher = torch.tensor([[0.0, 0.0, -math.inf]])
    student = torch.tensor([[0.0, 0.0, 0.0]], requires_grad=True)
    loss = distill.forward_kl_tokens(student, teacher)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(1.5))
    assert student.grad[0].tolist() == pytest.approx([1 / 3 - 1 / 2, 1 / 3 - 1 / 2, 1 / 3])
    assert distill.reverse_kl_tokens(student, teacher).item() == math.inf
    assert torch.isfinite(distill.jsd_tokens(student, teacher, 0.5)).all()


def test_micro_batches_with_the_global_count_add_up() -> None:
    student, teacher = _random()
    weight = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    whole, parts = student.clone().requires_grad_(), student.clone().requires_grad_()
    distill.forward_kl(whole, teacher, weight, 2.0)[0].backward()
    for row in range(2):
        distill.forward_kl(parts[row], teacher[row], weight[row], 2.0, normaliser=3)[0].backward()
    assert torch.allclose(parts.grad, whole.grad)


def test_no_supervised_token_is_loss_zero() -> None:
    student, teacher = (x.requires_grad_() for x in _random())
    loss, _ = distill.forward_kl(student, teacher, torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_proxy_weights_are_standardised_and_detached() -> None:
    loglik = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    weights = distill.proxy_weights(loglik)
    assert weights.tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])
    assert not weights.requires_grad
    assert distill.proxy_weights(torch.tensor([-2.0, -2.0])).tolist() == [0.5, 0.5]
    loss, metrics = distill.proxy_kd(loglik.detach(), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 4.0]), 10.0)
    assert metrics["weighted_kl"].item() == pytest.approx(0.5)
    assert loss.item() == pytest.approx(3 + 5)


def test_two_vocabularies_are_refused() -> None:
    with pytest.raises(AssertionError, match="shapes differ"):
        distill.forward_kl_tokens(torch.zeros(2, 5), torch.zeros(2, 6))


def test_a_distance_of_states_is_relative_to_the_teachers() -> None:
    student = torch.tensor([[3.0, 4.0], [1.0, 1.0], [2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    distances = distill.state_distance_tokens(student, teacher)
    assert distances.tolist() == pytest.approx([16 / 9, 0.0, 4.0])  # a state of nothing is compared with nothing divided
    distances.sum().backward()
    assert torch.allclose(student.grad, torch.tensor([[0.0, 8 / 9], [0.0, 0.0], [4.0, 0.0]], dtype=torch.float64))
    assert teacher.grad is None


def test_a_distance_of_bfloat16_states_is_computed_in_float32() -> None:
    student, teacher = (torch.full((1, 512), value, dtype=torch.bfloat16) for value in (1.0078125, 1.0))
    distance = distill.state_distance_tokens(student, teacher)
    assert distance.dtype == torch.float32
    assert distance.item() == pytest.approx(0.0078125**2)
