"""LoRA, NF4 and memory arithmetic: worked numbers and what must hold bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import DataError
from posttrain.objectives import lora, memory, nf4

WEIGHT = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
ADAPTER = lora.Adapter(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0], [-1.0]]), 3.0)
X = torch.tensor([[1.0, 1.0], [2.0, -1.0]])


def test_a_small_adapter_by_hand() -> None:
    assert ADAPTER.delta().tolist() == [[3.0, 6.0], [0.0, 0.0], [-3.0, -6.0]]
    assert lora.lora_forward(X, WEIGHT, ADAPTER).tolist() == [[10.0, 2.0, -7.0], [2.0, -2.0, 1.0]]
    assert torch.equal(X @ lora.merge(WEIGHT, ADAPTER).T, lora.lora_forward(X, WEIGHT, ADAPTER))
    assert lora.parameter_counts(3, 2, 1) == (6, 5)
    assert (lora.scaling(8, 4), lora.scaling(8, 4, rank_stabilised=True)) == (2.0, 4.0)


def test_a_fresh_adapter_changes_nothing_and_only_its_up_matrix_gets_gradient() -> None:
    torch.manual_seed(0)
    down, up = torch.randn(2, 4, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
    weight, x = torch.randn(3, 4), torch.randn(5, 4)
    y = lora.lora_forward(x, weight, lora.Adapter(down, up, 2.0))
    assert torch.equal(y, x @ weight.T)
    y.square().sum().backward()
    assert up.grad.any()
    assert not down.grad.any()


def test_many_adapters_in_one_batch_equal_one_by_one() -> None:
    torch.manual_seed(0)
    adapters = [lora.Adapter(torch.randn(rank, 4), torch.randn(3, rank), 0.5 * rank) for rank in (1, 2, 3)]
    weight, x, ids = torch.randn(3, 4), torch.randn(6, 4), torch.tensor([2, -1, 0, 1, 2, -1])
    found = lora.multi_lora_forward(x, weight, adapters, ids)
    for row, index in enumerate(ids.tolist()):
        alone = x[row : row + 1] @ weight.T if index < 0 else lora.lora_forward(x[row : row + 1], weight, adapters[index])
        assert torch.allclose(found[row], alone[0], atol=1e-6)
    with pytest.raises(AssertionError, match="adapter ids"):
        lora.multi_lora_forward(x, weight, adapters, torch.full((6,), 3))


def test_merging_rounds_once_and_unmerging_bf16_does_not_restore() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64).bfloat16()
    adapter = lora.Adapter(0.1 * torch.randn(4, 64), 0.1 * torch.randn(64, 4), 1.0)
    back = lora.Adapter(adapter.down, adapter.up, -1.0)
    exact = weight.double() + adapter.delta().double()
    once, twice = lora.merge(weight, adapter), lora.merge_cast_first(weight, adapter)
    assert once.dtype == torch.bfloat16
    assert (once.double() - exact).abs().mean() < (twice.double() - exact).abs().mean()
    assert not torch.equal(lora.merge(once, back), weight)
    full = weight.float()
    assert (lora.merge(lora.merge(full, adapter), back) - full).abs().max() < 1e-6


# -- NF4 -------------------------------------------------------------------------------------------------------------------


def test_levels_quantise_to_themselves_and_pack_first_element_high() -> None:
    quantised = nf4.quantise(3.0 * torch.tensor(nf4.LEVELS, dtype=torch.float64), block=16)
    assert quantised.indices.tolist() == list(range(16))
    assert quantised.absmax.tolist() == [3.0]
    assert torch.allclose(quantised.dequantised(), 3.0 * torch.tensor(nf4.LEVELS, dtype=torch.float64))
    assert quantised.packed().tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]


def test_a_zero_block_is_exact_a_short_block_has_its_own_scale_an_odd_one_is_padded() -> None:
    quantised = nf4.quantise(torch.tensor([0.0, 0.0, 4.0, -4.0, -0.5]), block=2)
    assert quantised.indices.tolist() == [7, 7, 15, 0, 0]
    assert quantised.absmax.tolist() == [0.0, 4.0, 0.5]
    assert quantised.dequantised().tolist() == [0.0, 0.0, 4.0, -4.0, -0.5]
    assert quantised.packed().tolist() == [0x77, 0xF0, 0x00]


def test_a_tie_goes_to_the_lower_index() -> None:
    middle = (nf4.LEVELS[8] + nf4.LEVELS[9]) / 2
    assert nf4.quantise(torch.tensor([1.0, middle], dtype=torch.float64)).indices.tolist() == [15, 8]


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40), st.integers(1, 9))
def test_no_other_level_is_nearer(values: list[float], block: int) -> None:
    weights = torch.tensor(values, dtype=torch.float64)
    quantised = nf4.quantise(weights, block)
    levels = torch.tensor(nf4.LEVELS, dtype=torch.float64)
    scale = quantised.absmax.repeat_interleave(block)[: len(weights), None]
    best = (levels * scale - weights[:, None]).abs().min(dim=1).values
    assert torch.allclose((quantised.dequantised() - weights).abs(), best, atol=1e-9)


def test_the_published_levels_follow_from_normal_quantiles() -> None:
    assert torch.allclose(nf4.derived_levels(), torch.tensor(nf4.LEVELS, dtype=torch.float64), atol=3e-7)


def test_the_dynamic_map_has_256_increasing_values_from_minus_to_one() -> None:
    levels = nf4.dynamic_map()
    assert len(levels) == 256
    assert (levels.diff() > 0).all()
    assert levels[-1].item() == 1
    assert levels[0].item() == pytest.approx(-(1 - 0.9 / 128))
    assert 0.0 in levels.tolist()


def test_scales_survive_the_second_level_within_its_step() -> None:
    torch.manual_seed(0)
    absmax = torch.rand(600, dtype=torch.float64)
    scales = nf4.quantise_scales(absmax)
    assert len(scales.absmax2) == 3
    assert (scales.reconstructed() - absmax).abs().max().item() < 0.5 * 0.9 / 64
    constant = nf4.quantise_scales(torch.full((4,), 0.3, dtype=torch.float64))
    assert constant.reconstructed().tolist() == pytest.approx([0.3] * 4)


def test_bits_per_weight() -> None:
    assert nf4.bits_per_weight(32, 128) == (5.0, 4 + 0.25 + 32 / 4096)


# -- memory ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "per_parameter"),
    [
        ("sft_full", 16),
        ("lora", 2 + 0.16),
        ("sft_lora", 2 + 0.16),
        ("qlora", 4.126953125 / 8 + 0.16),
        ("dpo_full", 18),
        ("dpo_lora", 2.16),
        ("orpo_full", 16),
        ("ppo_full", 36),
        ("grpo_full", 20),
        ("grpo_lora", 4.16),
    ],
)
def test_bytes_per_parameter_by_method(method: str, per_parameter: float) -> None:
    account = memory.training_memory(method, 1000.0, memory.Copies(lora_fraction=0.01))
    assert account.total == pytest.approx(1000 * per_parameter)


def test_options_switch_copies_off_and_change_sizes() -> None:
    alone = memory.training_memory("grpo_full", 10.0, memory.Copies(reference=False, reward=False))
    assert alone.total == 160
    assert memory.training_memory("dpo_full", 10.0, memory.Copies(precomputed_reference=True)).reference == 0
    small = memory.training_memory("ppo_full", 10.0, memory.Copies(critic_ratio=0.1, reward_ratio=0.5))
    assert (small.critic, small.reward) == (pytest.approx(16), 10)
    eight_bit_adam = memory.StateBytes(optimiser=2, gradients=4)
    assert memory.training_memory("sft_full", 10.0, state=eight_bit_adam).total == 120
    single = memory.training_memory("qlora", 8.0, state=memory.StateBytes(nf4_double_quant=False))
    assert single.total == 4.5


@pytest.mark.parametrize("method", ["sft", "ppo_half", "zpo_full", ""])
def test_an_unknown_method_is_named(method: str) -> None:
    with pytest.raises(DataError, match="unknown method"):
        memory.training_memory(method, 1.0)


def test_the_cache_of_one_token() -> None:
    assert memory.kv_cache_bytes_per_token(30, 3, 64) == 2 * 30 * 3 * 64 * 2
