"""Supervised loss and packing: shift by one, exact masks, accumulation, packed equals separate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from posttrain.objectives.packing import (
    attention,
    cumulative_lengths,
    ignore_segment_starts,
    left_pad_positions,
    packed_attention_mask,
    packed_positions,
    segment_ids,
)
from posttrain.objectives.supervised import scaled_micro_losses, sft_ce, token_logprobs


def _batch(rows: int = 3, width: int = 6, vocabulary: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows)
    labels = torch.randint(0, vocabulary, (rows, width))
    labels[0, :3] = -100
    labels[1, 2:] = -100
    return torch.randn(rows, width, vocabulary, dtype=torch.float64), labels


def test_two_targets_of_known_probability_give_their_log() -> None:
    # softmax rows (1/2, 1/4, 1/4) and (1/8, 3/4, 1/8); targets 0 and 1
    logits = torch.tensor([[[2.0, 1.0, 1.0], [1.0, 6.0, 1.0], [9.0, 0.0, 0.0]]]).log()
    logp, mask = token_logprobs(logits, torch.tensor([[2, 0, 1]]))
    assert logp[0].tolist() == pytest.approx([math.log(0.5), math.log(0.75)])
    loss, metrics = sft_ce(logp, mask)
    assert loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.75)) / 2)
    assert (metrics["loss_sum"].item(), metrics["tokens"].item()) == (pytest.approx(loss.item() * 2), 2)


def test_the_gradient_is_softmax_minus_onehot_over_the_count_and_zero_at_the_last_position() -> None:
    logits, labels = _batch()
    logits.requires_grad_()
    logp, mask = token_logprobs(logits, labels)
    sft_ce(logp, mask)[0].backward()
    onehot = torch.nn.functional.one_hot(labels[:, 1:].clamp(min=0), 5)
    expected = mask[..., None] * (logits.detach()[:, :-1].softmax(-1) - onehot) / mask.sum()
    assert logits.grad is not None
    assert torch.allclose(logits.grad[:, :-1], expected)
    assert not logits.grad[:, -1].any()


def test_the_loss_agrees_with_the_frameworks_cross_entropy() -> None:
    logits, labels = _batch()
    logp, mask = token_logprobs(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert sft_ce(logp, mask)[0].item() == pytest.approx(expected.item())


def test_sixteen_bit_logits_are_scored_in_float32() -> None:
    logits, labels = _batch()
    assert token_logprobs(logits.bfloat16(), labels)[0].dtype == torch.float32


def test_rows_that_are_not_supervised_may_hold_nan_and_get_exactly_zero_gradient() -> None:
    logits, labels = _batch()
    ignored = torch.cat([labels[:, 1:] == -100, torch.ones(3, 1, dtype=torch.bool)], dim=1)
    poisoned = torch.where(ignored[..., None], math.nan, logits).requires_grad_()
    logp, mask = token_logprobs(poisoned, labels)
    loss, _ = sft_ce(logp, mask)
    loss.backward()
    assert loss.item() == sft_ce(*token_logprobs(logits, labels))[0].item()
    assert poisoned.grad is not None
    assert not poisoned.grad[ignored].any()
    assert poisoned.grad[~ignored].all()


def test_a_batch_without_supervision_has_loss_zero_and_zero_gradient() -> None:
    logits, labels = _batch()
    logits.requires_grad_()
    loss, metrics = sft_ce(*token_logprobs(logits, torch.full_like(labels, -100)))
    loss.backward()
    assert (loss.item(), metrics["tokens"].item()) == (0.0, 0)
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_log_probability_of_minus_infinity_hurts_only_where_it_is_learned() -> None:
    logp = torch.tensor([[-1.0, -math.inf]], requires_grad=True)
    loss, _ = sft_ce(logp, torch.tensor([[1.0, 0.0]]))
    loss.backward()
    assert loss.item() == 1.0
    assert logp.grad.tolist() == [[-1.0, 0.0]]


def test_accumulated_micro_batches_equal_the_single_batch_in_loss_and_gradient() -> None:
    logits, labels = _batch()
    single, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    sft_ce(*token_logprobs(single, labels))[0].backward()
    total = (labels[:, 1:] != -100).sum().item()
    for row in range(3):
        sft_ce(*token_logprobs(parts[row : row + 1], labels[row : row + 1]), normaliser=total)[0].backward()
    assert torch.allclose(parts.grad, single.grad)


def test_scaled_micro_losses_add_up_to_the_global_mean_not_to_the_mean_of_means() -> None:
    assert scaled_micro_losses([4.0, 9.0], [2, 18]) == pytest.approx([0.2, 0.45])
    assert scaled_micro_losses([0.0], [0]) == [0.0]


LENGTHS = torch.tensor([3, 1, 4])


def test_indices_of_a_packed_row() -> None:
    assert segment_ids(LENGTHS).tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert packed_positions(LENGTHS).tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert cumulative_lengths(LENGTHS).tolist() == [0, 3, 4, 8]
    assert cumulative_lengths(LENGTHS).dtype == torch.int32
    assert ignore_segment_starts(torch.arange(8), LENGTHS).tolist() == [-100, 1, 2, -100, -100, 5, 6, 7]


def test_an_empty_segment_takes_no_place() -> None:
    lengths = torch.tensor([2, 0, 1])
    assert segment_ids(lengths).tolist() == [0, 0, 2]
    assert packed_positions(lengths).tolist() == [0, 1, 0]


def test_packed_attention_loss_and_gradient_equal_separate_sequences() -> None:
    torch.manual_seed(1)
    x = torch.randn(8, 4, dtype=torch.float64)
    labels = torch.randint(0, 4, (8,))
    packed, alone = x.clone().requires_grad_(), x.clone().requires_grad_()
    logits = attention(packed, packed, packed, packed_attention_mask(LENGTHS))
    sft_ce(*token_logprobs(logits[None], ignore_segment_starts(labels, LENGTHS)[None]))[0].backward()
    starts = cumulative_lengths(LENGTHS).tolist()
    for start, end in itertools.pairwise(starts):
        part = alone[start:end]
        logits = attention(part, part, part, torch.ones(end - start, end - start, dtype=torch.bool).tril())
        sft_ce(*token_logprobs(logits[None], labels[None, start:end]), normaliser=5)[0].backward()
    assert torch.allclose(packed.grad, alone.grad)


def test_left_padding_gives_positions_from_zero() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert left_pad_positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 0, 0]]


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AssertionError, match="do not fit"):
        token_logprobs(torch.zeros(1, 3, 2), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(AssertionError, match="7 labels for 8 tokens"):
        ignore_segment_starts(torch.zeros(7), LENGTHS)
