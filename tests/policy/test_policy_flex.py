"""FlexAttention over a pack's tree has the values and gradients of attention node by node."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from posttrain.policy.attention import TreeAttention
from posttrain.policy.flex import block_mask, subtree_ends
from posttrain.policy.pack import Pack
from tiny_models import random_ids, sequence

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def tree(seed: int = 3) -> Pack:
    """Branches off branches, two roots, and one sequence that is the start of another."""
    rng = random.Random(seed)
    trunk, branch = random_ids(40, rng), random_ids(30, rng)
    tails = [[*branch, *random_ids(9, rng)], [*branch, *random_ids(70, rng)], branch, random_ids(11, rng)]
    return Pack.of([sequence(each) for each in (*([*trunk, *tail] for tail in tails), random_ids(25, rng))])


def inputs(tokens: int, heads: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, count, tokens, 16, generator=generator) for count in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_one_kernel_for_the_tree_is_attention_node_by_node(kv_heads: int, window: int | None) -> None:
    pack = tree()
    tensors = inputs(pack.tokens, 4, kv_heads)
    plain, flexed = (TreeAttention(pack, flex=flex).attend(0, *tensors, scale=0.3, window=window) for flex in (False, True))
    torch.testing.assert_close(flexed, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_its_gradients_are_those_of_attention_node_by_node(
    kv_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch refuses gradients on a CPU, where it has no compiled kernel for them; the backward pass it has otherwise runs there too
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    pack, found = tree(), []
    for flex in (False, True):
        tensors = [tensor.requires_grad_(True) for tensor in inputs(pack.tokens, 4, kv_heads)]
        out = TreeAttention(pack, flex=flex).attend(0, *tensors, scale=0.3, window=window)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found.append(torch.autograd.grad(out, tensors, direction))
    for name, plain, flexed in zip("qkv", *found, strict=True):
        torch.testing.assert_close(flexed, plain, atol=5e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("window", [None, 17])
def test_a_token_sees_its_sequence_up_to_itself_and_nothing_else(window: int | None) -> None:
    pack = tree()
    mask = block_mask(pack, window, torch.device("cpu")).mask_mod
    rows, columns = torch.meshgrid(torch.arange(pack.tokens), torch.arange(pack.tokens), indexing="ij")
    seen = mask(torch.tensor(0), torch.tensor(0), rows, columns)
    want = torch.zeros_like(seen)
    for b in range(len(pack.leaves)):
        own = pack.sequence_rows(b)
        place = torch.arange(len(own))
        near = place[:, None] - place[None] < (window or pack.tokens)
        want[own[:, None], own[None]] |= (place[:, None] >= place[None]) & near
    assert torch.equal(seen, want)


def test_a_subtree_ends_where_its_last_descendant_does() -> None:
    pack = tree()
    ends = subtree_ends(pack).tolist()
    for b, leaf in enumerate(pack.leaves):
        rows = pack.sequence_rows(b).tolist()
        assert all(ends[row] > rows[-1] for row in rows)
        others = {row for other in range(len(pack.leaves)) if other != b for row in pack.sequence_rows(other).tolist()}
        own = [row for row in rows if row not in others]
        assert not own or ends[own[-1]] == pack.nodes[leaf].end
