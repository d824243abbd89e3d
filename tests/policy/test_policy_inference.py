"""The pass of decoding against the model itself, adapter by adapter."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.policy import LoraOptions, Pack, Policy, inference
from posttrain.policy.attention import TreeAttention
from posttrain.policy.inference import Inference
from tiny_models import random_ids, sequence, tiny_model

FITTING = ["llama", "qwen2", "qwen3", "mistral"]
RNG = random.Random(3)
PACK = Pack.of([sequence(random_ids(n, RNG), [n - 1]) for n in (40, 3, 17)])
FEW = Pack.of([sequence(random_ids(n, RNG), [n - 1]) for n in (3, 2, 2)])  # as many tokens as a step of few rows


def with_adapters(family: str, dtype: torch.dtype = torch.float32) -> Policy:
    policy = Policy(tiny_model(family).to(dtype))
    for seed, (name, top) in enumerate((("one", None), ("two", 1))):
        policy.add_adapter(name, LoraOptions(rank=3, top=top), seed)
        for _, parameter in sorted(policy.adapter_parameters(name).items()):
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return policy


def through(policy: Policy, shares: list[tuple[str | None, Tensor | None]], pack: Pack = PACK) -> Tensor:
    fast = policy.inference()
    assert fast is not None
    own = [(fast.factors(name), tokens) for name, tokens in shares if name is not None]
    return fast.infer(pack.ids, pack.positions, TreeAttention(pack), own)


@torch.no_grad()
def plain(policy: Policy, name: str | None, pack: Pack = PACK) -> Tensor:
    policy.use(name)
    return policy.hidden(pack)


@pytest.mark.parametrize("family", FITTING)
@pytest.mark.parametrize("name", [None, "one", "two"])
def test_hidden_states_and_logits_are_the_models(family: str, name: str | None) -> None:
    policy = with_adapters(family)
    got, want = through(policy, [(name, None)]), plain(policy, name)
    torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)
    fast = policy.inference()
    assert fast is not None
    torch.testing.assert_close(policy.head.logits(got, fast.head), policy.head.logits(want), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", FITTING)
@pytest.mark.parametrize("pack", [PACK, FEW], ids=["many", "few"])
def test_every_token_is_computed_with_its_own_adapter(family: str, pack: Pack) -> None:
    """Tokens of one sequence each: what an adapter changes must not leak into the others' rows."""
    policy = with_adapters(family)
    rows = {name: pack.sequence_rows(b) for b, name in enumerate((None, "one", "two"))}
    got = through(policy, list(rows.items()), pack)
    with policy.mixed(list(rows.items())):
        through_the_model = plain_pass(policy, pack)
    for name, own in rows.items():
        want = plain(policy, name, pack)[own]
        torch.testing.assert_close(got[own], want, atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(through_the_model[own], want, atol=5e-5, rtol=1e-4)


@torch.no_grad()
def plain_pass(policy: Policy, pack: Pack) -> Tensor:
    return policy.hidden(pack)


@pytest.mark.parametrize("pack", [PACK, FEW], ids=["many", "few"])
@pytest.mark.parametrize("every", [True, False])
def test_bfloat16_stays_close(pack: Pack, every: bool) -> None:
    policy = with_adapters("llama", torch.bfloat16)
    own = None if every else torch.arange(pack.tokens)  # the same tokens, named
    exact = plain(with_adapters("llama"), "one", pack)
    got = through(policy, [("one", own)], pack)
    assert got.dtype == torch.bfloat16
    error = (got.float() - exact).abs().mean()
    assert error < 2 * (plain(policy, "one", pack).float() - exact).abs().mean() + 1e-3
    without = (plain(policy, None, pack).float() - exact).abs().mean()
    assert error < without / 3  # the adapter is in it


def test_an_update_of_an_adapter_needs_new_factors_and_nothing_else() -> None:
    policy = with_adapters("llama")
    before = policy.inference()
    for parameter in policy.adapter_parameters("one").values():
        parameter.data.mul_(1.5)
    assert policy.inference() is before
    torch.testing.assert_close(through(policy, [("one", None)]), plain(policy, "one"), atol=1e-4, rtol=1e-4)


def test_a_training_pass_takes_the_room_back() -> None:
    policy = with_adapters("llama")
    before = policy.inference()
    plain(policy, "one")
    assert policy.inference() is before
    policy.hidden(PACK)
    assert policy.inference() is not before


def test_adapters_that_come_and_go_are_found() -> None:
    policy = with_adapters("llama")
    policy.inference()
    policy.remove_adapters()
    torch.testing.assert_close(through(policy, []), plain(policy, None), atol=5e-5, rtol=1e-4)
    policy.add_adapter("again", LoraOptions(rank=2), 5)
    for parameter in policy.adapter_parameters("again").values():
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(through(policy, [("again", None)]), plain(policy, "again"), atol=5e-5, rtol=1e-4)


def test_base_weights_that_were_written_to_are_arranged_anew() -> None:
    policy = Policy(tiny_model())
    policy.inference()
    with torch.no_grad():
        policy.base.base_model.layers[0].mlp.up_proj.weight.mul_(1.3)
    torch.testing.assert_close(through(policy, []), plain(policy, None), atol=5e-5, rtol=1e-4)


def other_activation(model: Any) -> None:
    for layer in model.base_model.layers:
        layer.mlp.act_fn = torch.nn.GELU()


@pytest.mark.parametrize("model", [tiny_model("gemma3"), other_activation], ids=["gemma3", "activation"])
def test_what_does_not_fit_goes_through_the_model(model: Any) -> None:
    if callable(model) and not isinstance(model, torch.nn.Module):
        changed, model = model, tiny_model()
        changed(model)
    assert Policy(model).inference() is None


def test_a_build_without_arranged_products_multiplies_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_mkl", lambda weight, bias: None)
    policy = with_adapters("qwen2")
    torch.testing.assert_close(through(policy, [("one", None)]), plain(policy, "one"), atol=1e-4, rtol=1e-4)


def test_an_arrangement_with_other_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_mkl", lambda weight, bias: lambda x: x @ weight.t() * 1.01)
    policy = Policy(tiny_model())
    torch.testing.assert_close(through(policy, []), plain(policy, None), atol=5e-5, rtol=1e-4)
    assert isinstance(Inference.of(policy.base), Inference)
