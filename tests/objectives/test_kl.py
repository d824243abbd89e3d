"""KL: estimators against exact values, what their gradients really are, the optimum of regularised reward."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.objectives import kl

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)


def test_exact_kl_by_hand() -> None:
    expected = 0.5 * math.log(2) + 0.3 * math.log(1.2) + 0.2 * math.log(0.4)
    assert kl.kl_divergence(P, Q).item() == pytest.approx(expected)
    e_k1, e_k2, e_k3 = kl.estimator_expectations(P, Q)
    assert e_k1.item() == pytest.approx(expected)
    assert e_k3.item() == pytest.approx(expected)
    assert e_k2.item() != pytest.approx(expected, rel=1e-3)


def test_zero_probabilities_are_zero_or_infinite_never_nan() -> None:
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    assert kl.kl_divergence(p, q).item() == pytest.approx(math.log(2))
    assert kl.kl_divergence(q, p).item() == math.inf


def test_estimators_on_one_token() -> None:
    logp, ref = torch.tensor([-1.0]), torch.tensor([-1.0 - math.log(2)])  # d = ln 2
    assert kl.k1(logp, ref).item() == pytest.approx(math.log(2))
    assert kl.k2(logp, ref).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl.k3(logp, ref).item() == pytest.approx(0.5 - 1 + math.log(2))


@given(st.floats(-60, 60), st.floats(-60, 60))
def test_k3_is_never_negative_nor_infinite(logp: float, ref: float) -> None:
    value = kl.k3(torch.tensor(logp), torch.tensor(ref)).item()
    assert 0 <= value < math.inf


def test_expected_gradients_as_losses_k1_none_k2_forward_k3_backward() -> None:
    torch.manual_seed(0)
    logits, ref = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64).log_softmax(0)
    x = logits.clone().requires_grad_()
    logp = x.log_softmax(0)
    weights = logp.exp().detach()  # tokens sampled from the policy, treated as constants

    def expected_gradient(values: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad((weights * values).sum(), x, retain_graph=True)[0]

    (forward,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), x, retain_graph=True)
    (backward,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), x, retain_graph=True)
    assert torch.allclose(expected_gradient(kl.k1(logp, ref)), torch.zeros(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(expected_gradient(kl.k2(logp, ref)), forward)
    assert torch.allclose(expected_gradient(kl.k3(logp, ref)), backward)
    straight = kl.k3_with_k2_gradient(logp, ref)
    assert torch.allclose(straight, kl.k3(logp, ref))
    assert torch.allclose(expected_gradient(straight), forward)


def test_the_regularised_optimum_is_worth_beta_log_z_and_nothing_beats_it() -> None:
    rewards, beta = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64), 0.7
    best, log_z = kl.optimal_policy(Q, rewards, beta)
    assert torch.allclose(best, Q * (rewards / beta).exp() / (Q * (rewards / beta).exp()).sum())
    top = kl.regularised_value(best, Q, rewards, beta).item()
    assert top == pytest.approx(beta * log_z.item())
    gap = beta * kl.kl_divergence(P, best).item()
    assert kl.regularised_value(P, Q, rewards, beta).item() == pytest.approx(top - gap)
    assert torch.allclose(kl.implicit_reward(best, Q, beta, log_z), rewards)


def test_net_gain_subtracts_the_price_of_drift() -> None:
    assert kl.kl_net_gain(2.0, 0.5, 0.4) == pytest.approx(1.8)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AssertionError, match="shapes differ"):
        kl.k3(torch.zeros(2, 3), torch.zeros(3))
