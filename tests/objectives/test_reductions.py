"""Reductions: worked numbers, global normalisers, exact masks, padding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.objectives import reductions as red
from posttrain.objectives.tensors import lengths_of, mask_from_lengths, wide

VALUES = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [5.0, 5.0, 5.0]])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
GROUPS = torch.tensor([7, 7, 3])
ALL = {
    "token_sum": red.token_sum,
    "token_mean": red.token_mean,
    "seq_mean_token_mean": red.seq_mean_token_mean,
    "group_token_mean": lambda v, m: red.group_token_mean(v, m, GROUPS[: len(v)]),
    "const": lambda v, m: red.const(v, m, 4),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_sum", 16.0),
        ("token_mean", 4.0),
        ("seq_mean_token_mean", (2 + 10 + 0) / 3),  # the empty row stays in B
        ("group_token_mean", (16 / 4 + 0) / 2),
        ("const", 16 / 12),
    ],
)
def test_each_reduction_gives_its_worked_number(name: str, expected: float) -> None:
    assert ALL[name](VALUES, MASK).item() == pytest.approx(expected)


def test_sft_leaves_empty_rows_out_of_row_means() -> None:
    assert red.supervised_rows(MASK) == 2
    assert red.seq_mean_token_mean(VALUES, MASK, normaliser=red.supervised_rows(MASK)).item() == 6.0


def test_row_sums_and_means_keep_one_number_per_row() -> None:
    assert red.row_sums(VALUES, MASK).tolist() == [6.0, 10.0, 0.0]
    assert red.row_means(VALUES, MASK).tolist() == [2.0, 10.0, 0.0]
    assert lengths_of(MASK).tolist() == [3, 1, 0]


def test_fractional_weights_weigh() -> None:
    weights = torch.tensor([[0.5, 0.25]])
    assert red.token_mean(torch.tensor([[2.0, 4.0]]), weights).item() == pytest.approx(2 / 0.75)


@pytest.mark.parametrize("name", ALL)
def test_an_empty_mask_gives_zero_with_zero_gradient(name: str) -> None:
    values = VALUES.clone().requires_grad_()
    loss = ALL[name](values, torch.zeros_like(MASK))
    loss.backward()
    assert loss.item() == 0
    assert values.grad is not None
    assert not values.grad.any()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_a_masked_place_holds_changes_nothing(name: str, poison: float) -> None:
    values = torch.where(MASK > 0, VALUES, poison).requires_grad_()
    loss = ALL[name](values, MASK)
    loss.backward()
    assert loss.item() == ALL[name](VALUES, MASK).item()
    assert values.grad is not None
    assert torch.equal(values.grad[MASK == 0], torch.zeros(5))


@pytest.mark.parametrize("name", ALL)
def test_more_padding_on_either_side_changes_nothing(name: str) -> None:
    plain = ALL[name](VALUES, MASK)
    for pads in ((0, 4), (4, 0), (2, 3)):
        wider = ALL[name](torch.nn.functional.pad(VALUES, pads, value=9.0), torch.nn.functional.pad(MASK, pads))
        assert wider.item() == pytest.approx(plain.item())


def _in_parts(name: str, values: torch.Tensor, mask: torch.Tensor, cut: int) -> torch.Tensor:
    parts = [(values[:cut], mask[:cut], GROUPS[:cut]), (values[cut:], mask[cut:], GROUPS[cut:])]
    tokens, rows = mask.sum().item(), len(mask)
    by_name = {
        "token_mean": lambda v, m, g: red.token_mean(v, m, normaliser=tokens),
        "seq_mean_token_mean": lambda v, m, g: red.seq_mean_token_mean(v, m, normaliser=rows),
        "group_token_mean": lambda v, m, g: red.group_token_mean(v, m, g, normaliser=2),
        "const": lambda v, m, g: red.const(v, m, 4, normaliser=rows),
    }
    return sum((by_name[name](*part) for part in parts), torch.zeros(()))


@pytest.mark.parametrize("name", [name for name in ALL if name != "token_sum"])
def test_micro_batches_with_the_global_count_add_up_to_the_single_batch(name: str) -> None:
    whole, parts = VALUES.clone().requires_grad_(), VALUES.clone().requires_grad_()
    one, two = ALL[name](whole, MASK), _in_parts(name, parts, MASK, 2)
    one.backward()
    two.backward()
    assert two.item() == pytest.approx(one.item())
    assert torch.allclose(parts.grad, whole.grad)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 10_000))
def test_masked_equals_removed(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    rows = [torch.randn(length, dtype=torch.float64) for length in lengths]
    mask = mask_from_lengths(torch.tensor(lengths), 6).double()
    values = torch.full((len(rows), 6), math.nan, dtype=torch.float64)
    for row, found in zip(rows, values, strict=True):
        found[: len(row)] = row
    everything = torch.cat(rows)
    assert red.token_mean(values, mask).item() == pytest.approx(everything.mean().item() if len(everything) else 0.0)
    assert red.row_sums(values, mask).tolist() == pytest.approx([row.sum().item() for row in rows])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AssertionError, match="shapes differ"):
        red.token_mean(VALUES, MASK[:2])
    with pytest.raises(AssertionError, match="expected 2 axes"):
        red.token_mean(VALUES[0], MASK[0])
    with pytest.raises(AssertionError, match="groups"):
        red.group_token_mean(VALUES, MASK, GROUPS[:2])


def test_sixteen_bits_are_widened_and_wider_types_kept() -> None:
    assert wide(VALUES.bfloat16()).dtype == torch.float32
    assert wide(VALUES.double()).dtype == torch.float64
