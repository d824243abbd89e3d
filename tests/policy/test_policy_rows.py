"""Architectures that mix tokens outside attention: found out, said in the log, and run row by row with the same numbers."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM

from posttrain.objectives.supervised import sft_ce
from posttrain.policy import LoraOptions, Pack, Policy
from posttrain.policy.importance import layer_importance
from posttrain.sampling import EngineOptions, LocalSampler, SampleOptions, SampleRequest
from posttrain.training import Learner, OptimiserOptions, Scored
from tiny_models import random_ids, sequence, tiny_model

VOCABULARY, END = 97, 2
RNG = random.Random(3)
TRUNK = random_ids(12, RNG)
ROWS = [TRUNK + random_ids(length, RNG) for length in (5, 9, 1)] + [random_ids(7, RNG)]


def mamba() -> Any:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.3)
    return MambaForCausalLM(config).eval()


def lfm2() -> Any:
    config = Lfm2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, conv_L_cache=3, layer_types=["conv", "full_attention", "conv"], initializer_range=0.3,
        max_position_embeddings=256,
    )  # fmt: skip
    return Lfm2ForCausalLM(config).eval()


@pytest.fixture(params=[mamba, lfm2], ids=["mamba", "lfm2"])
def policy(request: pytest.FixtureRequest) -> Policy:
    torch.manual_seed(0)
    return Policy(request.param())


@pytest.mark.parametrize(("build", "kind"), [(mamba, "linear_attention"), (lfm2, "conv")])
def test_the_log_says_which_layers_and_what_follows(build: Any, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not Policy(build()).packs
    assert kind in caplog.text and "row by row" in caplog.text


@pytest.mark.parametrize("kind", ["linear_attention", "conv", "mamba2", "recurrent"])
def test_a_hybrid_is_known_by_its_other_layers(kind: str) -> None:
    model = tiny_model()
    assert Policy(tiny_model()).packs
    model.config.layer_types = ["full_attention", kind, "full_attention"]
    assert not Policy(model).packs


@torch.no_grad()
def test_a_layers_importance_is_that_of_its_rows_one_by_one(policy: Policy) -> None:
    together = layer_importance(policy, Pack.of([sequence(row) for row in ROWS]))
    alone = [layer_importance(policy, Pack.of([sequence(row)])) for row in ROWS]
    weights = [len(row) - 1 for row in ROWS]
    wanted = [sum(w * nats for w, nats in zip(weights, layer, strict=True)) / sum(weights) for layer in zip(*alone, strict=True)]
    assert together == pytest.approx(wanted, rel=1e-4) and min(together) > 1e-4


@torch.no_grad()
def test_a_pack_gives_what_separate_rows_give(policy: Policy) -> None:
    pack = Pack.of([sequence(row, range(1, len(row))) for row in ROWS])
    assert pack.tokens < sum(map(len, ROWS))  # the trunk is in the pack once
    hidden = policy.hidden(pack)
    for b, row in enumerate(ROWS):
        alone = policy.base.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(hidden[pack.sequence_rows(b)], alone, atol=1e-5, rtol=1e-4)


def gradients(policy: Policy, packs: list[Pack]) -> dict[str, torch.Tensor]:
    learner = Learner.for_adapter(policy, "main", OptimiserOptions(), 1)
    total = sum(float(pack.weights.sum()) for pack in packs)

    def objective(scored: Scored) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return sft_ce(scored.padded_logprobs(), scored.pack.padded_weights(), normaliser=total)

    learner.forward_backward(packs, objective)
    found = {name: p.grad.clone() for name, p in learner.parameters.items() if p.grad is not None}
    for parameter in learner.parameters.values():
        parameter.grad = None
    return found


def test_gradients_of_a_pack_are_those_of_separate_rows(policy: Policy) -> None:
    policy.add_adapter("main", LoraOptions(rank=4), seed=1)
    for name, parameter in policy.adapter_parameters("main").items():
        parameter.data = torch.randn_like(parameter) * 0.1 if "lora_B" in name else parameter.data
    rows = [sequence(row, range(3, len(row))) for row in ROWS if len(row) > 3]
    packed, apart = gradients(policy, [Pack.of(rows)]), gradients(policy, [Pack.of([row]) for row in rows])
    assert packed.keys() == apart.keys() and packed
    for name, found in packed.items():
        torch.testing.assert_close(found, apart[name], atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_samples_are_the_learners_whatever_shares_the_batch(policy: Policy) -> None:
    how = [SampleOptions(9), SampleOptions(7, 1.0), SampleOptions(12, 0.8, top_k=20)]
    asked = [SampleRequest(tuple(row), i, how[i % 3]) for i, row in enumerate(ROWS)]
    sampler = LocalSampler(policy, END, options=EngineOptions(max_rows=2))
    for request, got in zip(asked, sampler.sample(asked), strict=True):
        (alone,) = LocalSampler(policy, END).sample([request])
        assert got.ids == alone.ids
        ids = [*request.prompt, *got.ids]
        with torch.no_grad():
            own = policy.logprobs(Pack.of([sequence(ids, range(len(request.prompt), len(ids)))]))
        torch.testing.assert_close(torch.tensor(got.logprobs), own, atol=1e-4, rtol=1e-3)


def test_a_stream_gives_what_a_batch_gives(policy: Policy) -> None:
    asked = [SampleRequest(tuple(row), i, SampleOptions(8, 1.0)) for i, row in enumerate(ROWS)]
    sampler, found = LocalSampler(policy, END), dict[int, Any]()
    stream = sampler.open(2)
    for request in asked:  # each enters a running batch
        stream.admit([request])
        found.update(stream.step())
    while len(found) < len(asked):
        found.update(stream.step())
    assert [found[ticket].ids for ticket in range(len(asked))] == [sample.ids for sample in sampler.sample(asked)]
