"""Advantages: group statistics, leave-one-out, GAE, shaping."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.objectives import advantages as adv
from posttrain.objectives.kl import k3
from posttrain.objectives.tensors import mask_from_lengths

REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.5, 0.0], dtype=torch.float64)
GROUPS = torch.tensor([4, 4, 9, 9, 9, 4])


def test_centred_advantages_are_reward_minus_the_groups_mean() -> None:
    assert adv.centred_advantages(torch.tensor([2.0, 0.0, 1.0])).tolist() == [1.0, -1.0, 0.0]
    expected = [2 / 3, -1 / 3, 0, 0, 0, -1 / 3]
    assert adv.centred_advantages(REWARDS, GROUPS).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("population", "std"), [(False, math.sqrt(1 / 3)), (True, math.sqrt(2 / 9))])
def test_standardised_advantages_divide_by_the_named_std(population: bool, std: float) -> None:
    found = adv.standardised_advantages(REWARDS, GROUPS, eps=0.01, population=population)
    assert found.tolist() == pytest.approx([2 / 3 / (std + 0.01), -1 / 3 / (std + 0.01), 0, 0, 0, -1 / 3 / (std + 0.01)])


@pytest.mark.parametrize("reward", [0.1, 1.0, -0.7, 1e-12, 1e6])
def test_equal_rewards_give_exactly_zero(reward: float) -> None:
    for size in (2, 3, 7):
        rewards = torch.full((size,), reward)
        assert adv.centred_advantages(rewards).tolist() == [0.0] * size
        assert adv.standardised_advantages(rewards, eps=1e-12).tolist() == [0.0] * size


def test_a_group_of_one_gets_zero_and_a_warning() -> None:
    with pytest.warns(RuntimeWarning, match="no baseline"):
        assert adv.centred_advantages(REWARDS[:3], GROUPS[:3]).tolist() == [0.5, -0.5, 0.0]
    with pytest.warns(RuntimeWarning, match="no baseline"):
        assert adv.standardised_advantages(torch.tensor([3.0])).tolist() == [0.0]
    with pytest.warns(RuntimeWarning, match="leave-one-out"):
        assert (torch.tensor([3.0]) - adv.leave_one_out_baselines(torch.tensor([3.0]))).tolist() == [0.0]


@pytest.mark.parametrize("hole", [math.nan, math.inf, 100.0])
def test_what_no_verifier_judged_is_left_out_and_gets_zero(hole: float) -> None:
    rewards, scored = torch.tensor([1.0, hole, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert adv.centred_advantages(rewards, scored_b=scored).tolist() == pytest.approx([2 / 3, 0, -1 / 3, -1 / 3])
    assert adv.standardised_advantages(rewards, scored_b=scored, eps=0)[0].item() == pytest.approx(2 / 3 / math.sqrt(1 / 3))
    assert adv.centred_advantages(rewards, scored_b=torch.zeros(4)).tolist() == [0.0] * 4


_REWARDS = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=8)


@given(_REWARDS)
def test_advantages_of_a_group_sum_to_zero_and_rloo_is_a_multiple_of_centred(rewards: list[float]) -> None:
    rewards_g = torch.tensor(rewards, dtype=torch.float64)
    centred = adv.centred_advantages(rewards_g)
    assert centred.sum().item() == pytest.approx(0, abs=1e-9)
    assert adv.standardised_advantages(rewards_g).sum().item() == pytest.approx(0, abs=1e-6)
    leave_one_out = rewards_g - adv.leave_one_out_baselines(rewards_g)
    size = len(rewards)
    assert torch.allclose(leave_one_out, size / (size - 1) * centred, atol=1e-9)


@given(_REWARDS, _REWARDS, st.randoms())
def test_groups_do_not_see_each_other_whatever_their_order(a: list[float], b: list[float], random: object) -> None:
    items = [(value, 0) for value in a] + [(value, 1) for value in b]
    random.shuffle(items)  # type: ignore[attr-defined]
    rewards, groups = torch.tensor([value for value, _ in items]), torch.tensor([group for _, group in items])
    together = adv.standardised_advantages(rewards, groups)
    for group in (0, 1):
        assert torch.allclose(together[groups == group], adv.standardised_advantages(rewards[groups == group]), atol=1e-5)


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    assert adv.leave_one_out_baselines(torch.tensor([3.0, 0.0, 1.0])).tolist() == [0.5, 2.0, 1.5]


def test_dynamic_sampling_keeps_groups_that_are_neither_all_right_nor_all_wrong() -> None:
    assert adv.keep_informative_groups([[0, 0], [1, 0], [1, 1], [0, 0, 1], []]) == [1, 3]


def test_the_overlong_penalty_is_flat_then_a_slope_then_a_floor() -> None:
    lengths = torch.tensor([0, 80, 85, 90, 100, 101, 500])
    assert adv.overlong_penalty(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.25, -0.5, -1, -1, -1])
    assert adv.overlong_penalty(lengths, 100, 0).tolist() == [0, 0, 0, 0, 0, -1, -1]


def test_gae_by_hand() -> None:
    # d = (1 - .5 = .5, 0 + 0 - ... ) with gamma .5, lambda .5: d2 = 2 - 1 = 1, d1 = 0 + .5 * 1 - .4 = .1, A1 = .1 + .25
    advantages, returns = adv.gae(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.4, 1.0]]), torch.ones(1, 2), 0.5, 0.5)
    assert advantages[0].tolist() == pytest.approx([0.35, 1.0])
    assert returns[0].tolist() == pytest.approx([0.75, 2.0])


def test_gae_carries_over_observation_tokens_and_ignores_padding_on_both_sides() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(1, 4), torch.randn(1, 4)
    plain, plain_returns = adv.gae(rewards, values, torch.ones(1, 4), 0.9, 0.8)
    places = [1, 2, 5, 6]  # two paddings, a gap of two observation tokens
    mask = torch.zeros(1, 9)
    mask[0, places] = 1
    wide_rewards, wide_values = torch.full((1, 9), math.nan), torch.full((1, 9), math.inf)
    wide_rewards[0, places], wide_values[0, places] = rewards[0], values[0]
    found, returns = adv.gae(wide_rewards, wide_values, mask, 0.9, 0.8)
    assert torch.allclose(found[0, places], plain[0])
    assert torch.allclose(returns[0, places], plain_returns[0])
    assert not found[mask == 0].any()
    assert not returns[mask == 0].any()


def test_with_lambda_one_the_return_is_the_discounted_sum_of_rewards() -> None:
    torch.manual_seed(0)
    rewards = torch.randn(2, 5, dtype=torch.float64)
    _, returns = adv.gae(rewards, torch.randn(2, 5, dtype=torch.float64), torch.ones(2, 5), 0.9, 1.0)
    assert returns[1, 0].item() == pytest.approx(sum(0.9**t * rewards[1, t].item() for t in range(5)))


def test_whitened_advantages_have_mean_zero_and_unit_variance_over_real_tokens() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    found = adv.whiten(torch.tensor([[1.0, 2.0, 99.0], [3.0, -4.0, 0.5]]), mask)
    real = found[mask > 0]
    assert real.mean().item() == pytest.approx(0, abs=1e-6)
    assert real.var().item() == pytest.approx(1, abs=1e-6)
    assert found[0, 2].item() == 0
    assert adv.whiten(torch.tensor([[5.0, 1.0]]), torch.tensor([[1.0, 0.0]])).tolist() == [[0.0, 0.0]]


def test_the_score_lands_on_the_last_real_token_and_an_empty_row_gets_nothing() -> None:
    logp, ref = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]]), torch.tensor([[-2.0, -2.0, math.nan], [0.0, 0.0, 0.0]])
    mask = mask_from_lengths(torch.tensor([2, 0]), 3)
    assert adv.kl_reward_shaping(torch.tensor([5.0, 7.0]), logp, ref, mask, 0.5).tolist() == [[-0.5, 5.0, 0.0], [0.0, 0.0, 0.0]]
    shaped = adv.kl_reward_shaping(torch.tensor([0.0, 0.0]), logp, ref, mask, 1.0, k3)
    assert shaped[0, 0].item() == pytest.approx(-(math.exp(-1) - 1 + 1))


def test_no_warning_for_ordinary_groups() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adv.standardised_advantages(REWARDS, GROUPS)
