"""Gradients of attention in bfloat16 on CPUs, beside float64 and beside PyTorch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.contract import Sequence
from posttrain.policy import half
from posttrain.policy.attention import TreeAttention
from posttrain.policy.pack import Pack

SIZE, HEADS, KV_HEADS = 24, 6, 2  # 24: a scale that is no power of two


def pack_of(*branches: tuple[int, ...]) -> Pack:
    """Sequences of runs of ten tokens each; equal starts are shared."""
    sequences = [np.concatenate([np.arange(10) + 100 * run for run in branch]) for branch in branches]
    return Pack.of(
        [Sequence(ids, (np.arange(len(ids)) > 0).astype(np.float32), np.zeros(len(ids), np.int16)) for ids in sequences]
    )


NESTED = pack_of((1, 2, 3), (1, 2, 4), (1, 5), (1, 2, 3, 6, 7), (8,))


def tensors(pack: Pack, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradient of the output, all of them bfloat16 numbers; scores reach from -20 to 20."""
    generator = torch.Generator().manual_seed(5)
    made = [torch.randn(1, heads, pack.tokens, SIZE, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [(2 * tensor).to(torch.bfloat16).to(dtype).requires_grad_(place < 3) for place, tensor in enumerate(made)]


def visible(pack: Pack, window: int | None) -> Tensor:
    """[T, T] bool: which pairs of a query and a key some sequence holds."""
    seen = torch.zeros(pack.tokens, pack.tokens, dtype=torch.bool)
    for b in range(len(pack.members)):
        rows = pack.sequence_rows(b)
        age = pack.positions[rows][:, None] - pack.positions[rows][None]
        seen[rows[:, None], rows[None]] |= (age >= 0) & (age < (window or pack.tokens))
    return seen


def truth(pack: Pack, window: int | None) -> tuple[Tensor, ...]:
    """Gradients in float64, through one mask over all pairs of tokens."""
    q, k, v, given = tensors(pack)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(pack, window), scale=SIZE**-0.5, enable_gqa=True)
    return torch.autograd.grad(out, (q, k, v), given)


def errors(found: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    return [float((own.double() - true).norm() / true.norm()) for own, true in zip(found, want, strict=True)]


@pytest.mark.parametrize("pairs", [half._PAIRS, 7 * 10 * HEADS], ids=["whole", "in runs of seven tokens"])
@pytest.mark.parametrize("window", [None, 60, 17, 4])
def test_gradients_are_the_true_ones_up_to_rounding(window: int | None, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "_PAIRS", pairs)
    q, k, v, given = tensors(NESTED, torch.bfloat16)
    out = TreeAttention(NESTED).attend(0, q, k, v, SIZE**-0.5, window)
    assert out.grad_fn is not None and type(out.grad_fn).__name__ == "HalfAttentionBackward"
    found = torch.autograd.grad(out, (q, k, v), given)
    assert [own.dtype for own in found] == [torch.bfloat16] * 3
    assert max(errors(found, truth(NESTED, window))) < 0.01


def test_rounding_costs_no_more_than_in_pytorchs_kernel() -> None:
    q, k, v, given = tensors(NESTED, torch.bfloat16)
    tree = TreeAttention(NESTED)
    theirs = torch.autograd.grad(tree.node_by_node(q, k, v, SIZE**-0.5, None), (q, k, v), given)
    ours = torch.autograd.grad(tree.attend(0, q, k, v, SIZE**-0.5, None), (q, k, v), given)
    want = truth(NESTED, None)
    for own, other in zip(errors(ours, want), errors(theirs, want), strict=True):
        assert own < 1.3 * other


def test_every_visible_pair_is_asked_for_once() -> None:
    for window in (None, 17):
        counts = torch.zeros(NESTED.tokens, NESTED.tokens)
        for rows, keys, blind in TreeAttention(NESTED).by_key(window, 1, 50):
            seen = torch.ones(rows.stop - rows.start, keys.stop - keys.start)
            if blind is not None:
                seen[: len(blind)][blind] = 0
            counts[rows, keys] += seen
        assert torch.equal(counts, visible(NESTED, window).float())
