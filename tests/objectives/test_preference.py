"""DPO and its options, reward models, ORPO, KTO: worked numbers, gradients, identities."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from posttrain.objectives import preference as pref
from posttrain.objectives import reward

LN2 = math.log(2)


def _softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def _logps(*values: float) -> list[Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def _random(pairs: int = 4) -> list[Tensor]:
    torch.manual_seed(pairs)
    return [-10 * torch.rand(pairs, dtype=torch.float64) - 1 for _ in range(4)]


def test_at_the_start_the_loss_is_ln_2_nothing_is_won_and_the_gradient_is_half_beta() -> None:
    chosen, rejected = (x.requires_grad_() for x in _logps(-4.0, -9.0))
    loss, metrics = pref.dpo(chosen, rejected, chosen.detach(), rejected.detach(), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(LN2)
    assert (metrics["accuracy"].item(), metrics["margin"].item()) == (0, 0)
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.1, 0.1))


# policy (-1, -6), reference (-2, -4): h = 1 + 2 = 3
@pytest.mark.parametrize(
    ("pair_loss", "expected"),
    [
        (pref.sigmoid_pairs, _softplus(-1.5)),
        (partial(pref.cdpo_pairs, label_smoothing=0.25), 0.75 * _softplus(-1.5) + 0.25 * _softplus(1.5)),
        (partial(pref.robust_pairs, label_smoothing=0.25), (0.75 * _softplus(-1.5) - 0.25 * _softplus(1.5)) / 0.5),
        (pref.hinge_pairs, 0.0),
        (pref.ipo_pairs, (3 - 1) ** 2),
    ],
)
def test_each_option_gives_its_worked_number(pair_loss: pref.PairLoss, expected: float) -> None:
    loss, metrics = pref.dpo(*_logps(-1.0, -6.0, -2.0, -4.0), 0.5, pair_loss=pair_loss)
    assert loss.item() == pytest.approx(expected)
    assert (metrics["chosen_reward"].item(), metrics["rejected_reward"].item(), metrics["accuracy"].item()) == (0.5, -1.0, 1.0)
    assert (metrics["chosen_logp"].item(), metrics["rejected_logp"].item()) == (-1.0, -6.0)


def test_length_normalised_options_use_log_ratios_per_token() -> None:
    lengths = _logps(2.0, 4.0) * 2
    means = [pref.per_token(logp, length) for logp, length in zip(_logps(-1.0, -6.0, -2.0, -4.0), lengths, strict=True)]
    assert pref.log_ratio_gap(*means).item() == pytest.approx(0.5 + 0.5)
    assert pref.dpo(*means, 0.5)[0].item() == pytest.approx(_softplus(-0.5))
    assert pref.dpo(*means, 0.5, pair_loss=pref.ipo_pairs)[0].item() == 0
    # means -0.5 and -1.5; 2 * 1 - 0.5
    assert pref.simpo(means[0], means[1], 2.0, 0.5)[0].item() == pytest.approx(_softplus(-1.5))


def test_the_sft_term_is_alpha_times_the_token_mean_of_the_chosen_answers() -> None:
    loss = pref.sft_term(torch.tensor([-2.0, -6.0]), torch.tensor([3.0, 5.0]), 0.5)
    assert loss.item() == pytest.approx(0.5)
    assert pref.sft_term(torch.tensor([-2.0]), torch.tensor([3.0]), 0.5, normaliser=8).item() == pytest.approx(0.125)


@pytest.mark.parametrize(
    "pair_loss", [pref.sigmoid_pairs, partial(pref.cdpo_pairs, label_smoothing=0.1), pref.ipo_pairs, pref.hinge_pairs]
)
def test_gradients_agree_with_finite_differences(pair_loss: pref.PairLoss) -> None:
    chosen, rejected, ref_chosen, ref_rejected = _random()
    assert torch.autograd.gradcheck(
        lambda c, r: pref.dpo(c, r, ref_chosen, ref_rejected, 0.3, pair_loss=pair_loss)[0],
        (chosen.requires_grad_(), rejected.requires_grad_()),
    )


def test_the_reference_is_a_constant() -> None:
    logps = [x.requires_grad_() for x in _random()]
    pref.dpo(*logps, 0.1)[0].backward()
    assert logps[2].grad is None
    assert logps[3].grad is None


def test_micro_batches_of_pairs_add_up_in_loss_and_metrics() -> None:
    logps = _random(5)
    whole, metrics = pref.dpo(*logps, 0.1)
    parts = [pref.dpo(*(x[rows] for x in logps), 0.1, normaliser=5) for rows in (slice(0, 2), slice(2, 5))]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item())
    for name, value in metrics.items():
        assert sum(part[name].item() for _, part in parts) == pytest.approx(value.item())


def test_smoothing_of_zero_is_plain_dpo_and_cdpo_is_smallest_at_its_finite_gap() -> None:
    h = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    assert torch.allclose(pref.cdpo_pairs(h, 0.5, 0.0), pref.sigmoid_pairs(h, 0.5))
    assert torch.allclose(pref.robust_pairs(h, 0.5, 0.0), pref.sigmoid_pairs(h, 0.5))
    assert h[pref.cdpo_pairs(h, 0.5, 0.1).argmin()].item() == pytest.approx(math.log(9) / 0.5, abs=0.01)


def test_the_robust_loss_is_unbiased_under_flipped_labels() -> None:
    h = torch.randn(9, dtype=torch.float64)
    mixed = 0.8 * pref.robust_pairs(h, 0.5, 0.2) + 0.2 * pref.robust_pairs(-h, 0.5, 0.2)
    assert torch.allclose(mixed, pref.sigmoid_pairs(h, 0.5))
    with pytest.raises(AssertionError, match="flip rate"):
        pref.robust_pairs(h, 0.5, 0.5)


def test_a_huge_gap_stays_finite() -> None:
    assert pref.sigmoid_pairs(torch.tensor([-1e4, 1e4]), 1.0).tolist() == [1e4, 0.0]


def test_the_quoted_gap_is_a_log_odds_of_two_probabilities() -> None:
    assert pref.dpo_gap(torch.tensor(0.8).log(), torch.tensor(0.2).log()).item() == pytest.approx(math.log(4))


# -- rewards from votes ----------------------------------------------------------------------------------------------------


def test_votes_become_probabilities_and_gaps() -> None:
    assert reward.vote_probability(3, 4) == 0.75
    assert reward.vote_probability(4, 4, smoothed=True) == 5 / 6
    assert reward.bradley_terry_gap(0.75) == pytest.approx(math.log(3))
    assert (reward.bradley_terry_gap(1.0), reward.bradley_terry_gap(0.0)) == (math.inf, -math.inf)
    with pytest.raises(AssertionError, match="5 of 4"):
        reward.vote_probability(5, 4)


def test_the_soft_vote_loss_is_smallest_at_the_votes_own_gap() -> None:
    gap = torch.tensor(math.log(3), dtype=torch.float64, requires_grad=True)
    reward.soft_preference(gap, torch.tensor(0.75, dtype=torch.float64)).backward()
    assert gap.grad.item() == pytest.approx(0)


def test_reward_loss_with_margin_and_centre() -> None:
    chosen, rejected = torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0])
    loss, metrics = reward.reward_bt(chosen, rejected)
    assert loss.item() == pytest.approx((_softplus(-2) + LN2) / 2)
    assert metrics["accuracy"].item() == 0.5  # a tie is wrong
    loss, _ = reward.reward_bt(chosen, rejected, margin_b=torch.tensor([1.0, 0.0]), center=0.1)
    assert loss.item() == pytest.approx((_softplus(-1) + LN2) / 2 + 0.1 * (4 + 4) / 2)


def test_k_ranked_answers_are_all_their_pairs() -> None:
    loss, _ = reward.reward_kwise(torch.tensor([3.0, 2.0, 0.0]))
    assert loss.item() == pytest.approx((_softplus(-1) + _softplus(-3) + _softplus(-2)) / 3)


# -- ORPO and KTO ----------------------------------------------------------------------------------------------------------


def test_orpo_on_odds_of_three_and_one_third() -> None:
    chosen, rejected = torch.tensor([0.75], dtype=torch.float64).log(), torch.tensor([0.25], dtype=torch.float64).log()
    loss, metrics = reward.orpo(chosen.requires_grad_(), rejected, torch.tensor(0.4), 0.5)
    assert metrics["loss_or"].item() == pytest.approx(_softplus(-math.log(9)))
    assert loss.item() == pytest.approx(0.4 + 0.5 * math.log(10 / 9))
    loss.backward()
    assert chosen.grad.item() == pytest.approx(-0.5 * 0.1 / 0.25)


def test_log1mexp_is_accurate_at_both_ends_and_differentiable() -> None:
    x = torch.tensor([-1e-8, -LN2, -40.0], dtype=torch.float64)
    assert reward.log1mexp(x).tolist() == pytest.approx([math.log(1e-8), -LN2, -math.exp(-40)], rel=1e-7)
    assert torch.autograd.gradcheck(
        reward.log1mexp, (torch.tensor([-0.1, -0.6, -0.8, -5.0], dtype=torch.float64, requires_grad=True),)
    )


def test_a_certain_answer_has_large_but_finite_odds_and_gradient() -> None:
    mean_logp = torch.zeros(1, requires_grad=True)
    odds = reward.log_odds(mean_logp)
    odds.sum().backward()
    assert odds.item() == pytest.approx(-math.log(1e-6), rel=1e-3)
    assert torch.isfinite(mean_logp.grad).all()


def test_kto_pulls_desirable_up_and_undesirable_down_from_a_constant_baseline() -> None:
    mismatched = torch.tensor([0.5, -0.1], requires_grad=True)
    z0 = reward.kto_baseline(mismatched)
    assert (z0.item(), z0.requires_grad) == (pytest.approx(0.2), False)
    assert reward.kto_baseline(torch.tensor([-3.0])).item() == 0
    log_ratio = torch.tensor([1.2, 1.2], requires_grad=True)
    loss, _ = reward.kto(log_ratio, torch.tensor([1.0, 0.0]), z0, 1.0, (2.0, 3.0))
    assert loss.item() == pytest.approx((2 / (1 + math.e) + 3 * math.e / (1 + math.e)) / 2)
    loss.backward()
    assert log_ratio.grad[0] < 0 < log_ratio.grad[1]
