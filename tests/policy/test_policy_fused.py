"""The fused layers against the plain modules: the same numbers, the same gradients, and the plain path wherever they do not fit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posttrain.policy import LoraOptions, Pack, Policy, attention, fused
from tiny_models import FAMILIES, random_ids, sequence, tiny_model

RNG = random.Random(11)
TRUNK = random_ids(40, RNG)
PACK = Pack.of([sequence(TRUNK + random_ids(n, RNG), range(30, 40 + n)) for n in (3, 250, 17)])


def policy(family: str, plain: bool, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> Policy:
    with monkeypatch.context() as patch:
        if plain:
            patch.setattr("posttrain.policy.policy.install", lambda model, mix: None)
        made = Policy(tiny_model(family, seed=seed))
        made.add_adapter("a", LoraOptions(rank=4), seed=3)
        made.add_adapter("b", LoraOptions(rank=2), seed=4)
    torch.manual_seed(seed)
    for name in ("a", "b"):
        for parameter in made.adapter_parameters(name).values():
            parameter.data.normal_(0, 0.05)
    made.use("a")
    return made


def gradients(made: Policy, pack: Pack = PACK) -> tuple[Tensor, dict[str, Tensor]]:
    trained = made.adapter_parameters("a")
    for parameter in trained.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    logp = made.logprobs(pack)
    (-logp.mean()).backward()  # type: ignore[no-untyped-call]
    return logp.detach(), {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_equal_the_plain_modules(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = policy(family, False, monkeypatch), policy(family, True, monkeypatch)
    (got, got_grads), (want, want_grads) = gradients(fast), gradients(slow)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    assert got_grads.keys() == want_grads.keys() and len(got_grads) > 0
    for name, gradient in want_grads.items():
        torch.testing.assert_close(got_grads[name], gradient, atol=2e-6, rtol=2e-3, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_gradients_adapter_other_adapter_and_reference_equal_the_plain_modules(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, slow = policy(family, False, monkeypatch), policy(family, True, monkeypatch)
    for name in ("a", "b", None, "a"):
        fast.use(name)
        slow.use(name)
        with torch.inference_mode():
            torch.testing.assert_close(fast.logprobs(PACK), slow.logprobs(PACK), atol=2e-5, rtol=1e-5)
            with fast.only_base(), slow.only_base():
                torch.testing.assert_close(fast.logprobs(PACK), slow.logprobs(PACK), atol=2e-5, rtol=1e-5)
    assert gradients(fast)[1].keys() == gradients(slow)[1].keys()  # what inference mode made does not hinder training


def test_an_update_of_the_adapter_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = policy("llama", False, monkeypatch), policy("llama", True, monkeypatch)
    for made in (fast, slow):
        gradients(made)
        optimiser = torch.optim.AdamW(list(made.adapter_parameters("a").values()), lr=0.05)
        optimiser.step()
    torch.testing.assert_close(fast.logprobs(PACK), slow.logprobs(PACK), atol=1e-4, rtol=1e-4)
    for made in (fast, slow):
        with torch.no_grad():
            for parameter in made.adapter_parameters("a").values():
                parameter.copy_(parameter * 0.5)
    torch.testing.assert_close(fast.logprobs(PACK), slow.logprobs(PACK), atol=1e-4, rtol=1e-4)


def test_a_graph_outlives_the_update_that_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward after the merged weight was formed anew still uses the weights of its own forward pass."""
    made = policy("llama", False, monkeypatch)
    _, want = gradients(made)
    trained = made.adapter_parameters("a")
    for parameter in trained.values():
        parameter.grad = None
    loss = -made.logprobs(PACK).mean()
    made.use("b")
    with torch.no_grad():
        made.logprobs(PACK)
    made.use("a")
    for parameter in trained.values():
        parameter.requires_grad_(True)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, gradient in want.items():
        torch.testing.assert_close(trained[name].grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_gradients_are_no_further_from_the_truth_than_the_plain_modules(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several models: of one, whose rounding is luckier is chance."""
    calls: set[str] = set()
    far: list[tuple[float, float, float, float]] = []
    for seed in range(4):
        found = []
        for plain, dtype in ((True, torch.float32), (True, torch.bfloat16), (False, torch.bfloat16)):
            made = policy(family, plain, monkeypatch, seed)
            made.base.to(torch.bfloat16).to(dtype)  # the truth: the same rounded weights in float32
            with monkeypatch.context() as patch:
                if plain:  # attention as PyTorch has it
                    patch.setattr(attention.HalfAttention, "apply", lambda *asked: asked[-1].node_by_node(*asked[:-1]))
                else:
                    _count_calls(calls, patch)
                found.append(gradients(made))
        (want, want_grads), (plain_got, plain_grads), (got, got_grads) = found
        assert got_grads.keys() == want_grads.keys()
        values = (float((one - want).norm() ** 2) for one in (got, plain_got))
        slopes = (sum(float((one[n] - want_grads[n]).norm() ** 2) for n in want_grads) for one in (got_grads, plain_grads))
        far.append((*values, *slopes))
    assert {"_ThinLora", "HalfAttention"} <= calls and ("_RmsNorm" in calls) == (family != "gemma3")
    own, plain_own, own_grads, plain_own_grads = map(sum, zip(*far, strict=True))
    assert own <= 1.2**2 * plain_own
    assert own_grads <= 1.2**2 * plain_own_grads


def _count_calls(calls: set[str], patch: pytest.MonkeyPatch) -> None:
    for kind in (fused._ThinLora, fused._RmsNorm, attention.HalfAttention):
        inner = kind.apply
        patch.setattr(kind, "apply", lambda *args, inner=inner, kind=kind: calls.add(kind.__name__) or inner(*args))


def _trained_base(made: Policy) -> None:
    for parameter in made.base.parameters():
        parameter.requires_grad_(True)


def _half_precision(made: Policy) -> None:
    made.base.to(torch.float16)
    for parameter in made.adapter_parameters("a").values():
        parameter.requires_grad_(True)


@pytest.mark.parametrize("change", [_trained_base, _half_precision])
def test_what_does_not_fit_takes_the_plain_path(change: Callable[[Policy], None], monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy("llama", False, monkeypatch)
    change(made)
    monkeypatch.setattr(fused._LoraLinear, "apply", _never)
    monkeypatch.setattr(fused._GatedMlp, "apply", _never)
    monkeypatch.setattr(fused._RmsNorm, "apply", _never)
    monkeypatch.setattr(fused._ThinLora, "apply", _never)
    made.logprobs(PACK).sum().backward()  # type: ignore[no-untyped-call]


def _never(*_: Any) -> Tensor:
    raise AssertionError("the fused path was taken")


@pytest.mark.parametrize("rows", [1, fused._BLOCK, fused._BLOCK + 1, 3 * fused._BLOCK - 5])
def test_blocks_cover_every_row_once(rows: int) -> None:
    seen = torch.zeros(rows)
    for block in fused._blocks(rows):
        seen[block] += 1
    assert bool((seen == 1).all())


def test_the_norms_gradient_agrees_with_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_BLOCK", 2)
    torch.manual_seed(1)
    t = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, norm_weight = t(5, 4), torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: fused._RmsNorm.apply(x, norm_weight, 1e-6), (x,))


def test_modules_of_unknown_kinds_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    fused.install(model, fused.Mix())
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("rows", [703, 704, 1024, 1025, 1343, 1344])
def test_a_product_in_parts_is_the_whole_product(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 48, generator=generator).to(torch.bfloat16)
    weight = torch.randn(40, 48, generator=generator).to(torch.bfloat16)
    torch.testing.assert_close(fused._product(x, weight.t()), torch.nn.functional.linear(x, weight))
