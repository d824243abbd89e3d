"""Clipped surrogates and their reductions: worked numbers, where the gradient stops, masks, accumulation, identities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain.objectives import policy_loss as loss_of
from posttrain.objectives import sequence_policy as seq
from posttrain.objectives.tensors import Objective

LN2 = math.log(2)
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.float64)
GROUPS = torch.tensor([0, 0, 1, 1])
ADVANTAGES = torch.tensor([0.7, -0.7, -0.2, 0.2], dtype=torch.float64)
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Objective]


def _logps(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    old = -torch.rand(4, 3, dtype=torch.float64) - 0.2
    return old + 0.3 * torch.randn(4, 3, dtype=torch.float64), old, old + 0.3 * torch.randn(4, 3, dtype=torch.float64)


def _with_reference(function: Callable[..., Objective], *more: object) -> Loss:
    return lambda logp, old, mask, adv: function(logp, old, mask, adv, *more, ref_logp_bt=_logps()[2], beta=0.1)


LOSSES: dict[str, Loss] = {
    "grpo": _with_reference(loss_of.grpo),
    "dr_grpo": lambda logp, old, mask, adv: loss_of.dr_grpo(logp, old, mask, adv, 5),
    "dapo": loss_of.dapo,
    "dapo_by_group": lambda logp, old, mask, adv: loss_of.dapo_by_group(logp, old, mask, adv, GROUPS),
    "ppo": lambda logp, old, mask, adv: loss_of.ppo(logp, old, mask, adv, dual_clip=3.0),
    "gspo": lambda logp, old, mask, adv: seq.gspo(logp, old, mask, adv, eps_low=0.1, eps_high=0.1),
    "gspo_token": lambda logp, old, mask, adv: seq.gspo_token(logp, old, mask, adv[:, None].expand_as(mask)),
    "luffy": lambda logp, old, mask, adv: seq.luffy(logp, old, mask, adv, torch.tensor([0, 0, 1, 0])),
}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "slope"),
    [
        (1.0, 2.0, -2.0, 0, -2.0),
        (1.5, 1.0, -1.2, 1, 0.0),  # pushed up far enough: no gradient
        (0.5, 1.0, -0.5, 0, -0.5),  # a good token that became rare keeps its gradient
        (0.5, -1.0, 0.8, 1, 0.0),
        (1.5, -1.0, 1.5, 0, 1.5),
        (1.1, 0.0, 0.0, 0, 0.0),
    ],
)
def test_the_surrogate_clips_only_on_the_side_the_advantage_asks_for(
    ratio: float, advantage: float, loss: float, clipped: int, slope: float
) -> None:
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    found, metrics = loss_of.ppo(logp, zero, one, torch.tensor([[advantage]], dtype=torch.float64))
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert metrics["clipped_tokens"].item() == clipped
    assert logp.grad.item() == pytest.approx(slope)


def test_the_four_reductions_of_one_token_loss_by_hand() -> None:
    # on policy: token losses are -A; rows of lengths 3, 1, 2, 0
    logp = torch.zeros(4, 3, dtype=torch.float64)
    terms = (logp, logp, MASK, ADVANTAGES)
    assert loss_of.grpo(*terms)[0].item() == pytest.approx(-(0.7 - 0.7 - 0.2 + 0) / 4)  # the empty row stays in B
    assert loss_of.dapo(*terms)[0].item() == pytest.approx(-(3 * 0.7 - 0.7 - 2 * 0.2) / 6)
    assert loss_of.dapo_by_group(*terms, GROUPS)[0].item() == pytest.approx(-((3 * 0.7 - 0.7) / 4 - 0.2) / 2)
    assert loss_of.dr_grpo(*terms, 5)[0].item() == pytest.approx(-(3 * 0.7 - 0.7 - 2 * 0.2) / (4 * 5))


def test_the_kl_term_adds_beta_k3_inside_the_token_loss() -> None:
    logp, one = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    ref = torch.tensor([[LN2, -LN2]], dtype=torch.float64)  # k3 = 2 - 1 - ln 2 and 1/2 - 1 + ln 2
    found, metrics = loss_of.grpo(logp, logp, one, torch.zeros(1), ref_logp_bt=ref, beta=0.5)
    assert found.item() == pytest.approx(0.5 * (1 - LN2 + LN2 - 0.5) / 2)
    assert metrics["kl_sum"].item() == pytest.approx(0.5)
    assert loss_of.grpo(logp, logp, one, torch.zeros(1), ref_logp_bt=ref)[0].item() == 0
    with pytest.raises(AssertionError, match="reference"):
        loss_of.grpo(logp, logp, one, torch.zeros(1), beta=0.5)


def test_clip_higher_leaves_room_upwards_only() -> None:
    logp = torch.tensor([[math.log(1.25)]], dtype=torch.float64)
    terms = (logp, torch.zeros_like(logp), torch.ones_like(logp), torch.ones(1, dtype=torch.float64))
    assert loss_of.dapo(*terms)[0].item() == pytest.approx(-1.25)
    assert loss_of.dapo(*terms, eps_high=0.2)[0].item() == pytest.approx(-1.2)
    assert loss_of.grpo(*terms)[0].item() == pytest.approx(-1.2)


def test_the_dual_clip_caps_the_loss_of_bad_tokens_that_became_likely() -> None:
    logp = torch.tensor([[math.log(10.0)]], dtype=torch.float64, requires_grad=True)
    terms = (logp, torch.zeros_like(logp), torch.ones_like(logp), -torch.ones(1, 1, dtype=torch.float64))
    assert loss_of.ppo(*terms)[0].item() == pytest.approx(10)
    capped, _ = loss_of.ppo(*terms, dual_clip=3.0)
    capped.backward()
    assert (capped.item(), logp.grad.item()) == (3.0, 0.0)


def test_on_policy_the_value_is_zero_while_the_gradient_is_not() -> None:
    logp = _logps()[0].requires_grad_()
    advantages = torch.tensor([0.5, -0.5, 0.25, -0.25], dtype=torch.float64)
    mask = torch.ones(4, 3, dtype=torch.float64)
    found, metrics = loss_of.grpo(logp, logp.detach(), mask, advantages)
    found.backward()
    assert found.item() == pytest.approx(0)
    assert torch.allclose(logp.grad, -advantages[:, None].expand(4, 3) / 12)
    assert metrics["ratio_sum"].item() == 12


@pytest.mark.parametrize(
    "name", [name for name in LOSSES if name != "gspo_token"]
)  # that one holds a stopped gradient: see below
def test_gradients_agree_with_finite_differences(name: str) -> None:
    logp, old, _ = _logps(1)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, old, MASK, ADVANTAGES)[0], (logp.requires_grad_(),))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_places_may_hold_anything_and_get_exactly_zero_gradient(name: str, poison: float) -> None:
    logp, old, _ = _logps(2)
    plain = logp.clone().requires_grad_()
    expected, metrics = LOSSES[name](plain, old, MASK, ADVANTAGES)
    expected.backward()
    poisoned = torch.where(MASK > 0, logp, poison).requires_grad_()
    found, poisoned_metrics = LOSSES[name](poisoned, torch.where(MASK > 0, old, poison), MASK, ADVANTAGES)
    found.backward()
    assert found.item() == expected.item()
    assert torch.equal(poisoned.grad, plain.grad)
    assert not poisoned.grad[MASK == 0].any()
    assert {key: value.item() for key, value in poisoned_metrics.items()} == {key: value.item() for key, value in metrics.items()}


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "grpo"])
@pytest.mark.parametrize("pads", [(0, 3), (2, 0)])
def test_more_padding_on_either_side_changes_nothing(name: str, pads: tuple[int, int]) -> None:
    logp, old, _ = _logps(3)
    wider = [torch.nn.functional.pad(x, pads, value=value) for x, value in ((logp, -9.0), (old, -1.0), (MASK, 0.0))]
    assert LOSSES[name](*wider, ADVANTAGES)[0].item() == pytest.approx(LOSSES[name](logp, old, MASK, ADVANTAGES)[0].item())


NORMALISED = {
    "grpo": (loss_of.grpo, (), 4.0),
    "dr_grpo": (loss_of.dr_grpo, (5,), 4.0),
    "dapo": (loss_of.dapo, (), 6.0),
    "ppo": (loss_of.ppo, (), 6.0),
    "gspo": (seq.gspo, (), 4.0),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_micro_batches_with_the_global_count_add_up_in_loss_gradient_and_metrics(name: str) -> None:
    function, more, count = NORMALISED[name]
    logp, old, _ = _logps(4)
    whole, parts = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    expected, metrics = function(whole, old, MASK, ADVANTAGES, *more)
    expected.backward()
    found = [
        function(parts[rows], old[rows], MASK[rows], ADVANTAGES[rows], *more, normaliser=count)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    sum((part for part, _ in found), torch.zeros(())).backward()
    assert sum(part.item() for part, _ in found) == pytest.approx(expected.item())
    assert torch.allclose(parts.grad, whole.grad)
    for key, value in metrics.items():
        assert sum(part[key].item() for _, part in found) == pytest.approx(value.item())


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_empty_completions_is_finite_without_gradient(name: str) -> None:
    logp = torch.full((4, 3), math.nan, dtype=torch.float64, requires_grad=True)
    found, _ = LOSSES[name](logp, logp.detach(), torch.zeros(4, 3, dtype=torch.float64), ADVANTAGES)
    found.backward()
    assert found.item() == pytest.approx(0)  # these advantages sum to 0
    assert not logp.grad.any()


def test_zero_advantages_leave_only_the_kl_gradient() -> None:
    logp, old, ref = _logps(5)
    logp.requires_grad_()
    loss_of.grpo(logp, old, MASK, torch.zeros(4))[0].backward()
    assert not logp.grad.any()
    loss_of.grpo(logp, old, MASK, torch.zeros(4), ref_logp_bt=ref, beta=0.1)[0].backward()
    assert logp.grad[MASK > 0].all()


@pytest.mark.parametrize("gap", [-500.0, 500.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_absurd_ratios_stay_finite_in_float32(gap: float, advantage: float) -> None:
    logp = torch.tensor([[gap]], requires_grad=True)
    zero = torch.zeros(1, 1)
    found, _ = loss_of.grpo(logp, zero, torch.ones(1, 1), torch.tensor([advantage]), ref_logp_bt=zero, beta=0.1)
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(logp.grad).all()


def test_sixteen_bit_log_probabilities_are_worked_in_float32() -> None:
    logp = torch.full((1, 2), -1.0, dtype=torch.bfloat16)
    assert loss_of.grpo(logp, logp, torch.ones(1, 2), torch.ones(1))[0].dtype == torch.float32


def test_the_value_loss_is_the_larger_of_plain_and_clipped() -> None:
    values, old, returns = torch.tensor([[2.0, 0.1]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 1.0]])
    found, metrics = loss_of.ppo_value(values, old, returns, torch.ones(1, 2), 0.2)
    assert found.item() == pytest.approx((1.8**2 + 0.9**2) / 4)
    assert metrics["loss_unclipped"].item() == pytest.approx(0.9**2 / 4)
    assert metrics["clipped_tokens"].item() == 1


def test_the_value_loss_ignores_masked_places() -> None:
    values = torch.tensor([[2.0, math.nan]], requires_grad=True)
    found, _ = loss_of.ppo_value(
        values, torch.tensor([[1.9, math.inf]]), torch.tensor([[1.0, math.nan]]), torch.tensor([[1.0, 0.0]])
    )
    found.backward()
    assert found.item() == 0.5
    assert values.grad.tolist() == [[1.0, 0.0]]


def test_reinforce_weighs_whole_sequences_and_its_clipped_form_starts_with_the_same_gradient() -> None:
    logp = torch.tensor([-3.0, -5.0], requires_grad=True)
    advantages = torch.tensor([0.5, -1.0])
    found, _ = loss_of.reinforce(logp, advantages)
    assert found.item() == pytest.approx(-(0.5 * -3 + -1.0 * -5) / 2)
    (plain,) = torch.autograd.grad(found, logp)
    (clipped,) = torch.autograd.grad(loss_of.reinforce_clipped(logp, logp.detach(), advantages)[0], logp)
    assert plain.tolist() == pytest.approx([-0.25, 0.5])
    assert torch.allclose(plain, clipped)


# -- sequence ratios -------------------------------------------------------------------------------------------------------


def test_the_sequence_ratio_is_the_geometric_mean_of_token_ratios() -> None:
    logp = torch.tensor([[math.log(4.0), 0.0, math.nan], [0.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.float64)
    assert seq.sequence_ratio(logp, torch.zeros(2, 3), mask).tolist() == pytest.approx([2.0, 1.0])


def test_gspo_clips_whole_sequences() -> None:
    logp = torch.tensor([[0.4, 0.2], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    found, metrics = seq.gspo(logp, torch.zeros(2, 2), torch.ones(2, 2), torch.tensor([1.0, 2.0]), eps_low=0.2, eps_high=0.2)
    found.backward()
    assert found.item() == pytest.approx(-(1.2 + 2.0) / 2)
    assert logp.grad.tolist() == [[0.0, 0.0], [-0.5, -0.5]]
    assert (metrics["clipped_rows"].item(), metrics["rows"].item()) == (1, 2)


@pytest.mark.parametrize("eps", [3e-4, 0.2])
def test_gspo_token_equals_gspo_for_constant_advantages(eps: float) -> None:
    mask = torch.ones(4, 3, dtype=torch.float64)
    mask[2, 1:] = 0
    found = []
    for function, advantages in ((seq.gspo, ADVANTAGES), (seq.gspo_token, ADVANTAGES[:, None].expand(4, 3))):
        logp, old, _ = _logps(6)
        loss, _ = function(logp.requires_grad_(), old, mask, advantages, eps_low=eps, eps_high=eps)
        loss.backward()
        found.append((loss.item(), logp.grad))
    assert found[0][0] == pytest.approx(found[1][0])
    assert torch.allclose(found[0][1], found[1][1])


def test_luffy_shapes_external_tokens_and_learns_most_where_p_is_gamma() -> None:
    p = torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64)
    assert seq.shaped_probability(p.log(), 0.1).tolist() == pytest.approx([0.5, 0.75, 0.9])
    grid = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    assert grid[seq.shaped_gradient(grid.log(), 0.1).argmax()].item() == pytest.approx(0.1, abs=2e-3)
    logp = p.log()[None].requires_grad_()
    advantages, mask = torch.ones(1, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    old = torch.full((1, 3), math.nan)  # external traces have no behaviour policy of ours
    loss, _ = seq.luffy(logp, old, mask, advantages, torch.ones(1))
    loss.backward()
    assert loss.item() == pytest.approx(-(0.5 + 0.75 + 0.9) / 3)
    assert torch.allclose(logp.grad, -seq.shaped_gradient(p.log(), 0.1) / 3)


def test_luffys_own_tokens_are_clipped_only_when_asked() -> None:
    logp = torch.tensor([[math.log(2.0)]], dtype=torch.float64)
    terms = (logp, torch.zeros_like(logp), torch.ones_like(logp), torch.ones(1), torch.zeros(1))
    assert seq.luffy(*terms)[0].item() == pytest.approx(-2)
    assert seq.luffy(*terms, seq.Luffy(clip=(0.2, 0.3)))[0].item() == pytest.approx(-1.3)
