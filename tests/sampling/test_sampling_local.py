"""The engine against the slow truth: batches equal single requests, and its log-probabilities are the learner's."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from posttrain.data.records import StopReason
from posttrain.errors import BindingError, PosttrainError
from posttrain.policy import LoraOptions, Pack, Policy
from posttrain.sampling import EngineOptions, LocalSampler, Sample, SampleOptions, SampleRequest, prefixes
from posttrain.sampling.decoder import Decoder
from posttrain.sampling.memory import Memory
from posttrain.sampling.prefixes import trunk_sizes
from tiny_models import FAMILIES, random_ids, sequence, stored, tiny_model

END = 2
RNG = random.Random(5)
TRUNK = random_ids(30, RNG)
SHARED = [tuple(TRUNK + random_ids(RNG.randrange(1, 20), RNG)) for _ in range(11)]
APART = [tuple(random_ids(length, RNG)) for length in (1, 2, 17, 40, 3)]
MIXED = [
    SampleOptions(max_tokens=18),
    SampleOptions(max_tokens=25, temperature=1.0),
    SampleOptions(max_tokens=7, temperature=0.7, top_k=5),
    SampleOptions(max_tokens=20, temperature=1.0, top_p=0.9),
]


def requests(prompts: list[tuple[int, ...]], options: list[SampleOptions] | None = None) -> list[SampleRequest]:
    chosen = options or MIXED
    return [SampleRequest(prompt, seed, chosen[seed % len(chosen)]) for seed, prompt in enumerate(prompts)]


def sampler(family: str = "llama", model: Any = None, **options: Any) -> LocalSampler:
    return LocalSampler(Policy(model or tiny_model(family)), END, options=EngineOptions(**options))


@torch.no_grad()
def learner_logprobs(policy: Policy, request: SampleRequest, sample: Sample) -> torch.Tensor:
    """What the policy's own head says of the sampled tokens, over one unbatched row."""
    ids = [*request.prompt, *sample.ids]
    return policy.logprobs(Pack.of([sequence(ids, range(len(request.prompt), len(ids)))]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompts", [SHARED, APART, SHARED[:4] + APART], ids=["shared", "apart", "both"])
def test_a_batch_gives_what_each_request_gives_alone(family: str, prompts: list[tuple[int, ...]]) -> None:
    engine = sampler(family, max_rows=4)  # fewer rows than requests: finished rows make room for waiting ones
    asked = requests(prompts)
    together = engine.sample(asked)
    for request, got in zip(asked, together, strict=True):
        (alone,) = engine.sample([request])
        assert (got.ids, got.stop, got.forced) == (alone.ids, alone.stop, alone.forced)
        assert got.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_the_learners_on_the_sampled_tokens(family: str) -> None:
    engine = sampler(family)
    asked = requests(SHARED[:6] + APART)
    for request, sample in zip(asked, engine.sample(asked), strict=True):
        want = learner_logprobs(engine.policy, request, sample)
        torch.testing.assert_close(torch.tensor(sample.logprobs), want, atol=5e-5, rtol=0)


def test_at_temperature_one_both_log_probabilities_agree_and_truncation_raises_the_second() -> None:
    engine = sampler()
    warm, top_p = (requests(SHARED, [SampleOptions(20, 1.0, p)]) for p in (1.0, 0.8))
    for sample in engine.sample(warm):
        assert sample.sampled_logprobs == pytest.approx(sample.logprobs, abs=1e-5)
    cut = [(a, b) for s in engine.sample(top_p) for a, b in zip(s.logprobs, s.sampled_logprobs, strict=True)]
    assert all(b >= a - 1e-6 for a, b in cut) and sum(b > a + 0.05 for a, b in cut) > len(cut) / 2


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_greedy_decoding_equals_a_loop_that_recomputes_everything(family: str) -> None:
    plain = tiny_model(family)
    asked = requests(SHARED[:3] + APART[:3], [SampleOptions(max_tokens=15)])
    for request, sample in zip(asked, sampler(family).sample(asked), strict=True):
        ids, steps = list(request.prompt), 0
        with torch.no_grad():
            while steps < 15 and (steps == 0 or ids[-1] != END):
                ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
                steps += 1
        assert list(sample.ids) == ids[len(request.prompt) :]


def test_the_same_seeds_reproduce_and_other_seeds_differ() -> None:
    engine = sampler()
    warm = SampleOptions(max_tokens=20, temperature=1.0)
    first = engine.sample([SampleRequest(SHARED[0], seed, warm) for seed in range(6)])
    again = engine.sample([SampleRequest(SHARED[0], seed, warm) for seed in range(6)])
    assert [s.ids for s in first] == [s.ids for s in again]
    assert len({s.ids for s in first}) == 6


def test_sampling_neither_reads_nor_moves_the_global_random_generator() -> None:
    engine = sampler()
    asked = requests(SHARED[:4])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = engine.sample(asked)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert [s.ids for s in engine.sample(asked)] == [s.ids for s in first]


def ending_model(probability_of_end: float) -> Any:
    """A model that ends its turn with exactly this probability at every step, and draws the other tokens evenly."""
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        for layer in model.base_model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.zero_()
        model.base_model.embed_tokens.weight.fill_(1.0)  # every token alike: the final state is all ones
        model.lm_head.weight.zero_()
        model.lm_head.weight[END, 0] = math.log(probability_of_end * 96 / (1 - probability_of_end))
    return model


def test_the_end_token_stops_a_request_and_is_part_of_it() -> None:
    engine = sampler(model=ending_model(0.2))
    asked = requests(SHARED * 3, [SampleOptions(max_tokens=12, temperature=1.0)])
    samples = engine.sample(asked)
    ended = [s for s in samples if s.stop is StopReason.END_OF_TURN]
    cut = [s for s in samples if s.stop is StopReason.LENGTH]
    assert len(ended) > 10 and cut and len(ended) + len(cut) == len(asked)
    assert all(s.ids[-1] == END and END not in s.ids[:-1] for s in ended)
    assert all(len(s.ids) == 12 and END not in s.ids for s in cut)
    assert ended[0].logprobs[-1] == pytest.approx(math.log(0.2), abs=1e-4)


def test_a_request_may_end_at_once_and_at_its_last_allowed_token() -> None:
    engine = sampler(model=ending_model(1 - 1e-6))
    (sample,) = engine.sample([SampleRequest(SHARED[0], 0, SampleOptions(max_tokens=1))])
    assert sample.ids == (END,) and sample.stop is StopReason.END_OF_TURN


@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_length_limit_is_exact(length: int) -> None:
    options = SampleOptions(max_tokens=length, temperature=1.0)
    (sample,) = sampler(model=ending_model(1e-9)).sample([SampleRequest(SHARED[0], 0, options)])
    assert len(sample.ids) == len(sample.logprobs) == len(sample.sampled_logprobs) == len(sample.forced) == length
    assert sample.stop is StopReason.LENGTH and not any(sample.forced)


def test_a_prompt_that_is_a_prefix_of_the_others_and_equal_prompts_share_a_trunk_too() -> None:
    engine = sampler()
    prompts = [tuple(TRUNK), tuple(TRUNK), (*TRUNK, 5), (*TRUNK, 5, 6, 7)]
    asked = requests(prompts)
    for request, got in zip(asked, engine.sample(asked), strict=True):
        assert got.ids == engine.sample([request])[0].ids


def test_an_unrelated_prompt_in_the_call_has_no_trunk_and_changes_no_token() -> None:
    engine = sampler()
    asked = requests(SHARED[:5])
    with_stranger = engine.sample([*asked, SampleRequest((9, 8, 7), 99)])
    assert [s.ids for s in with_stranger[:5]] == [s.ids for s in engine.sample(asked)]


@pytest.mark.parametrize(("rows", "refill"), [(1, 0.5), (2, 1.0), (3, 0.0), (64, 0.5)])
def test_how_many_rows_decode_together_and_when_they_are_refilled_changes_no_token(rows: int, refill: float) -> None:
    asked = requests(SHARED + APART)
    want = [s.ids for s in sampler().sample(asked)]
    assert [s.ids for s in sampler(max_rows=rows, refill=refill).sample(asked)] == want


def test_a_small_prefill_budget_changes_no_token() -> None:
    asked = requests(SHARED + APART)
    assert [s.ids for s in sampler(prefill_tokens=50).sample(asked)] == [s.ids for s in sampler().sample(asked)]


def test_results_come_back_in_the_order_asked_and_progress_adds_up() -> None:
    engine = sampler(max_rows=3)
    asked = requests(SHARED[::-1] + APART)
    told: list[int] = []
    samples = engine.sample(asked, told.append)
    assert [len(s.ids) <= r.options.max_tokens for s, r in zip(samples, asked, strict=True)] == [True] * len(asked)
    assert sum(told) == sum(len(s.ids) for s in samples)
    assert engine.sample([]) == []


def test_adapters_may_be_mixed_in_one_call() -> None:
    policy = Policy(tiny_model())
    for seed, name in enumerate(("bank_a", "retail_b")):
        policy.add_adapter(name, LoraOptions(rank=4), seed)
        for _, parameter in sorted(policy.adapter_parameters(name).items()):
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    engine = LocalSampler(policy, END)
    greedy = SampleOptions(max_tokens=16)
    names = [None, "bank_a", "retail_b", "bank_a", None, "retail_b"]
    asked = [SampleRequest(SHARED[0], 0, greedy, adapter=name) for name in names]
    got = [s.ids for s in engine.sample(asked)]
    assert got[1] == got[3] and got[2] == got[5] and got[0] == got[4] and len(set(got)) == 3
    (base,) = LocalSampler(Policy(tiny_model()), END).sample([SampleRequest(SHARED[0], 0, greedy)])
    assert got[0] == base.ids
    for name, ids in zip(names, got, strict=True):
        policy.use(name)
        assert LocalSampler(policy, END).sample([SampleRequest(SHARED[0], 0, greedy, adapter=name)])[0].ids == ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", [("none", "a", "b"), ("a",)], ids=["three", "one"])
def test_groups_of_several_adapters_decode_together_as_each_request_alone(
    family: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of one prompt on trunks of their own, beside other prompts, in rows that are refilled."""
    monkeypatch.setattr(prefixes, "_WORTH", 16)
    engine = sampler(family, max_rows=7)
    for seed, (name, top) in enumerate((("a", None), ("b", 1))):
        engine.policy.add_adapter(name, LoraOptions(rank=4, top=top), seed)
        for _, parameter in sorted(engine.policy.adapter_parameters(name).items()):
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    prompts = [*SHARED[:2] * 5, *SHARED[2:6], tuple(TRUNK * 2)] + [APART[0]] * 4
    adapters = [None if name == "none" else name for name in names]
    asked = [replace(r, adapter=adapters[i % len(adapters)]) for i, r in enumerate(requests(prompts))]
    for request, got in zip(asked, engine.sample(asked), strict=True):
        (alone,) = engine.sample([request])
        assert (got.ids, got.stop) == (alone.ids, alone.stop)
        assert got.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_an_adapter_of_another_kind_decodes_apart() -> None:
    policy = Policy(tiny_model())
    for name in ("plain", "dora"):
        policy.add_adapter(name, LoraOptions(rank=2), 1)
    for layer in policy._lora_layers():
        layer.use_dora["dora"] = True
    assert policy.mixes("plain") and policy.mixes(None) and not policy.mixes("dora")


def test_an_unknown_adapter_is_refused_and_never_replaced_by_the_base() -> None:
    policy = Policy(tiny_model())
    policy.add_adapter("bank_a", LoraOptions(rank=4), 0)
    with pytest.raises(BindingError, match="no such adapter"):
        LocalSampler(policy, END).sample([SampleRequest(SHARED[0], 0, adapter="retail_b")])


def test_an_adapter_asked_of_a_policy_without_any_is_refused() -> None:
    with pytest.raises(BindingError, match="no such adapter"):
        sampler().sample([SampleRequest(SHARED[0], 0, adapter="bank_a")])


def test_an_empty_prompt_is_refused_with_its_place() -> None:
    with pytest.raises(PosttrainError, match=r"requests\[1\].*empty prompt"):
        sampler().sample([SampleRequest((5,), 0), SampleRequest((), 0)])


def test_a_grammar_without_an_engine_is_refused() -> None:
    from posttrain.grammar import json_grammar

    with pytest.raises(PosttrainError, match="no grammar engine"):
        sampler().sample([SampleRequest((5,), 0, grammar=json_grammar({}))])


def test_sampling_leaves_no_graph_and_no_gradient_behind() -> None:
    policy = Policy(tiny_model())
    policy.add_adapter("main", LoraOptions(rank=2), 0)
    for parameter in policy.adapter_parameters("main").values():
        parameter.requires_grad_(True)
    LocalSampler(policy, END).sample(requests(SHARED[:3]))
    assert all(p.requires_grad and p.grad is None for p in policy.adapter_parameters("main").values())
    policy.use("main")
    policy.logprobs(Pack.of([sequence(TRUNK)])).sum().backward()
    assert any(p.grad is not None for p in policy.adapter_parameters("main").values())


def test_bfloat16_log_probabilities_stay_close_to_the_learners() -> None:
    engine = sampler(model=stored(tiny_model(), torch.bfloat16))
    asked = requests(SHARED[:6], [SampleOptions(max_tokens=15, temperature=1.0)])
    gaps = [
        (torch.tensor(sample.logprobs) - learner_logprobs(engine.policy, request, sample)).abs()
        for request, sample in zip(asked, engine.sample(asked), strict=True)
    ]
    assert float(torch.cat(gaps).mean()) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rows", "remembered"), [(5, 1 << 29), (5, 20_000), (64, 1 << 29)])
def test_conversations_go_on_as_if_computed_anew(
    family: str, rows: int, remembered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later turns go on from the strips of earlier ones; what is drawn and its log-probabilities stay those of a fresh call."""
    inner = Memory.__init__
    monkeypatch.setattr(Memory, "__init__", lambda self, cache: inner(self, cache, max_bytes=remembered))
    engine = sampler(family, max_rows=rows)
    engine.policy.add_adapter("a", LoraOptions(rank=2), seed=1)
    first = [replace(r, adapter="a" if i % 3 == 0 else None) for i, r in enumerate(requests(SHARED + APART))]
    asked = {i: [request] for i, request in enumerate(first)}
    drawn: dict[int, list[Sample]] = {i: [] for i in asked}

    def then(index: int, sample: Sample) -> SampleRequest | None:
        drawn[index].append(sample)
        if len(drawn[index]) > index % 3:  # some end after a turn, some after three
            return None
        rng = random.Random(100 * index + len(drawn[index]))
        before = asked[index][-1]
        asked[index].append(replace(before, prompt=(*before.prompt, *sample.ids, *random_ids(rng.randrange(1, 9), rng))))
        return asked[index][-1]

    engine.converse(first, then)
    for index, turns in asked.items():
        assert len(turns) == len(drawn[index]) == index % 3 + 1
        for request, got in zip(turns, drawn[index], strict=True):
            (alone,) = engine.sample([request])
            assert (got.ids, got.stop) == (alone.ids, alone.stop)
            assert got.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_a_conversation_runs_what_is_new_in_it_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = sampler(max_rows=2)
    engine.end_of_turn = -1
    inner, tokens = Decoder.infer, []
    monkeypatch.setattr(Decoder, "infer", lambda self, ids, *rest: tokens.append(len(ids)) or inner(self, ids, *rest))
    told: list[int] = []
    turns = {
        0: [SampleOptions(60)],
        1: [SampleOptions(5)] * 4,
        2: [SampleOptions(5)],
    }  # a long turn, and two that share the other row
    asked = {index: SampleRequest(SHARED[index], index, options.pop(0)) for index, options in turns.items()}

    def then(index: int, sample: Sample) -> SampleRequest | None:
        told.append(index)
        if not turns[index]:
            return None
        asked[index] = replace(asked[index], prompt=(*asked[index].prompt, *sample.ids, 7, 8), options=turns[index].pop(0))
        return asked[index]

    engine.converse(list(asked.values()), then)
    assert told == [1, 1, 1, 1, 2, 0]
    assert sum(tokens) < sum(map(len, SHARED[:3])) + 60 + 4 * 7 + 5


def test_a_conversation_that_cannot_go_on_says_why_and_what_it_is_told_may_fail() -> None:
    engine = sampler()
    asked = requests(SHARED[:2])
    with pytest.raises(BindingError, match="no such adapter"):
        engine.converse(asked, lambda index, sample: replace(asked[index], adapter="nobody"))
    with pytest.raises(PosttrainError, match=r"requests\[1\].*empty prompt"):
        engine.converse([asked[0], SampleRequest((), 0)], lambda index, sample: None)
    with pytest.raises(ZeroDivisionError):
        engine.converse(asked, lambda index, sample: 1 // 0)  # type: ignore[arg-type, return-value]
    engine.converse([], lambda index, sample: None)


def test_trunks_nest_where_what_they_save_is_worth_a_product() -> None:
    system, alike, other = tuple(range(400)), tuple(range(500, 900)), tuple(range(900, 903))
    prompts = sorted(
        [(*system, *alike, i, i) for i in range(8)] + [(*system, *other, i) for i in range(8)] + [(*system, 9)] * 6 + [(5, 6)]
    )
    found = dict(zip(prompts, trunk_sizes(prompts), strict=True))
    assert {found[(*system, *alike, i, i)] for i in range(8)} == {800}
    assert {found[(*system, *other, i)] for i in range(8)} == {400}  # three tokens more are not worth a trunk
    assert found[(*system, 9)] == 400 and found[(5, 6)] == 0
    assert trunk_sizes([]) == [] and trunk_sizes([system]) == [0] and trunk_sizes([system] * 9) == [399] * 9
