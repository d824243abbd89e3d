"""The chunked head equals the plain softmax over all logits, in value and gradient, with every option a model family uses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteConfig

from posttrain.policy import Head, Pack, Policy
from tiny_models import tiny_model


def head(*, bias: bool = False, scale: float = 1.0, cap: float | None = None, vocabulary: int = 50) -> Head:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, 16, generator=generator)
    return Head(weight, torch.randn(vocabulary, generator=generator) if bias else None, scale, cap)


def rows(count: int = 23) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(count, 16, generator=generator, requires_grad=True)
    return hidden, torch.randint(0, 50, (count,), generator=generator)


def plain(it: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ it.weight.T + (0 if it.bias is None else it.bias)
    logits = logits * it.scale
    if it.cap is not None:
        logits = it.cap * torch.tanh(logits / it.cap)
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


VARIANTS = {
    "plain": head(),
    "bias": head(bias=True),
    "scaled": head(scale=1 / 8),
    "soft cap": head(cap=3.0),
    "all": head(bias=True, scale=0.5, cap=5.0),
}


@pytest.mark.parametrize("chunk", [1, 7, 23, 256])
@pytest.mark.parametrize("name", VARIANTS)
def test_chunked_log_probabilities_and_gradients_equal_the_plain_ones(name: str, chunk: int) -> None:
    it = VARIANTS[name]
    hidden, targets = rows()
    upstream = torch.randn(len(targets), generator=torch.Generator().manual_seed(2))
    got = it.logprobs(hidden, targets, chunk)
    want = plain(it, hidden, targets)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    (got_grad,) = torch.autograd.grad(got, hidden, upstream)
    (want_grad,) = torch.autograd.grad(want, hidden, upstream)
    torch.testing.assert_close(got_grad, want_grad, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_with_zero_upstream_gradient_gets_exactly_none(name: str) -> None:
    hidden, targets = rows()
    upstream = torch.ones(len(targets))
    upstream[5] = 0.0
    (grad,) = torch.autograd.grad(VARIANTS[name].logprobs(hidden, targets, 4), hidden, upstream)
    assert not grad[5].any() and grad[4].any()


def test_log_probabilities_of_all_targets_sum_to_one() -> None:
    it = VARIANTS["all"]
    hidden = rows(1)[0].detach().expand(50, 16)
    total = it.logprobs(hidden, torch.arange(50), 8).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_rows_give_no_values_and_no_error(name: str) -> None:
    hidden = torch.zeros(0, 16, requires_grad=True)
    out = VARIANTS[name].logprobs(hidden, torch.zeros(0, dtype=torch.int64))
    assert out.shape == (0,) and out.dtype == torch.float32


def test_bfloat16_hidden_states_give_float32_log_probabilities() -> None:
    it = head()
    half = Head(it.weight.bfloat16(), None, 1.0, None)
    hidden, targets = rows()
    out = half.logprobs(hidden.detach().bfloat16().requires_grad_(True), targets, 8)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, plain(it, hidden, targets).detach(), atol=0.2, rtol=0)
    out.sum().backward()


@pytest.mark.parametrize("rows", [1, 16, 19])
@pytest.mark.parametrize("cap", [None, 5.0])  # the written gradient, and the one of any function
def test_rows_that_round_a_bfloat16_product_up_leave_no_trace(rows: int, cap: float | None) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(40, 24, generator=generator).to(torch.bfloat16)
    hidden, targets = torch.randn(rows, 24, generator=generator), torch.arange(rows) % 40
    found, wanted = hidden.to(torch.bfloat16).requires_grad_(True), hidden.to(torch.bfloat16).float().requires_grad_(True)
    values = Head(weight, None, 1.0, cap).logprobs(found, targets, chunk=17)
    plain = Head(weight.float(), None, 1.0, cap).logprobs(wanted, targets)
    assert values.shape == (rows,)
    torch.testing.assert_close(values, plain, atol=0.05, rtol=0)
    values.sum().backward()
    plain.sum().backward()
    assert found.grad is not None and wanted.grad is not None
    torch.testing.assert_close(found.grad.float(), wanted.grad, atol=0.06, rtol=0.05)


def test_a_trained_head_gets_its_own_gradient() -> None:
    weight = torch.randn(50, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    hidden, targets = rows()
    Head(weight, None, 1.0, None).logprobs(hidden, targets, 6).sum().backward()
    got, weight.grad = weight.grad, None
    plain(Head(weight, None, 1.0, None), hidden, targets).sum().backward()
    assert got is not None and weight.grad is not None
    torch.testing.assert_close(got, weight.grad, atol=1e-4, rtol=0)


def crossed(own: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy against another distribution and a target, as distillation has them."""
    log_p = own.log_softmax(-1)
    return -(teacher.softmax(-1) * log_p).sum(-1) - log_p.gather(1, target[:, None])[:, 0]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_function_of_two_heads_logits_is_that_of_the_whole_with_its_gradient(name: str) -> None:
    """Over several chunks and several rows in cache at once; zero upstream rows stay zero."""
    it, teacher = VARIANTS[name], VARIANTS["all"]
    hidden, targets = rows()
    other = torch.randn(len(targets), 16, generator=torch.Generator().manual_seed(3))
    upstream = torch.randn(len(targets), generator=torch.Generator().manual_seed(2))
    upstream[4] = 0.0
    want = crossed(it.logits(hidden), teacher.logits(other), targets)
    (want_grad,) = torch.autograd.grad(want, hidden, upstream)
    for chunk in (6, 18):
        got = it.tokenwise(crossed, hidden, [(teacher, other)], [targets], chunk=chunk)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        (got_grad,) = torch.autograd.grad(got, hidden, upstream)
        torch.testing.assert_close(got_grad, want_grad, atol=1e-4, rtol=0)
        assert not got_grad[4].any()
    with torch.no_grad():
        torch.testing.assert_close(it.tokenwise(crossed, hidden, [(teacher, other)], [targets], chunk=6), want, atol=1e-5, rtol=0)


def test_a_trained_head_learns_from_a_function_of_its_logits_beside_anothers() -> None:
    teacher = VARIANTS["all"]
    weight = torch.randn(50, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    it = Head(weight, None, 1.0, None)
    hidden, targets = rows()
    other = torch.randn(len(targets), 16, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad(it.tokenwise(crossed, hidden, [(teacher, other)], [targets], chunk=6).sum(), (hidden, weight))
    want = torch.autograd.grad(crossed(it.logits(hidden), teacher.logits(other), targets).sum(), (hidden, weight))
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def test_what_would_get_no_gradient_is_refused() -> None:
    hidden, targets = rows()
    with pytest.raises(AssertionError, match="no gradient"):
        head().tokenwise(crossed, hidden, [(head(), hidden)], [targets])


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    hidden, targets = rows()
    (slope,) = torch.autograd.grad(head(cap=3.0).logprobs(hidden, targets, 8).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        slope.sum().backward()


def test_a_functions_rows_are_computed_once() -> None:
    it, calls = head(cap=3.0), []
    hidden, targets = rows()

    def counted(logits: Tensor, target: Tensor) -> Tensor:
        calls.append(len(logits))
        return logits.gather(1, target[:, None])[:, 0]

    it.tokenwise(counted, hidden, aligned=[targets], chunk=10).sum().backward()
    assert sum(calls) == len(hidden) and max(calls) <= 10


def test_the_head_of_a_model_with_soft_capped_logits_gives_that_models_log_probabilities() -> None:
    capped = {"final_logit_softcapping": 2.0}
    policy, model = Policy(tiny_model("gemma3", **capped)), tiny_model("gemma3", **capped)
    check_against_model(policy, model)
    assert policy.head.cap == 2.0


def test_the_head_of_a_model_with_scaled_logits_gives_that_models_log_probabilities() -> None:
    def granite() -> torch.nn.Module:
        config = GraniteConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.15, logits_scaling=4.0, attention_multiplier=0.3,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).float().eval()

    policy = Policy(granite())
    check_against_model(policy, granite())
    assert policy.head.scale == 0.25


@torch.no_grad()
def check_against_model(policy: Policy, model: torch.nn.Module) -> None:
    from tiny_models import logprobs_of_row, sequence

    ids = list(range(20, 45))
    want = logprobs_of_row(model, ids)[torch.arange(24), torch.tensor(ids[1:])]
    torch.testing.assert_close(policy.logprobs(Pack.of([sequence(ids)])), want, atol=2e-5, rtol=0)
