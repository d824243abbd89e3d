"""Requests that come and go between steps: each draws what it draws alone, whatever shares the batch and whenever it came."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from posttrain.contract import Contract
from posttrain.errors import BindingError, GrammarError, PosttrainError
from posttrain.grammar import Grammar, GrammarEngine, Matcher, json_grammar
from posttrain.policy import LoraOptions, Policy
from posttrain.sampling import EngineOptions, LocalSampler, Sample, SampleOptions, SampleRequest
from posttrain.sampling.decoder import Decoder
from posttrain.sampling.memory import Memory
from posttrain.sampling.stream import LocalStream, TreeStream
from tiny_models import random_ids, tiny_model

END = 2
RNG = random.Random(5)
TRUNK = random_ids(30, RNG)
PROMPTS = [tuple(TRUNK + random_ids(RNG.randrange(1, 20), RNG)) for _ in range(8)] + [
    tuple(random_ids(length, RNG)) for length in (1, 2, 17, 40)
]
OPTIONS = [SampleOptions(18), SampleOptions(25, 1.0), SampleOptions(7, 0.7, top_k=5), SampleOptions(20, 1.0, 0.9)]


def requests() -> list[SampleRequest]:
    return [SampleRequest(prompt, seed, OPTIONS[seed % 4]) for seed, prompt in enumerate(PROMPTS)]


def sampler(family: str = "llama", adapters: tuple[str, ...] = (), **options: Any) -> LocalSampler:
    policy = Policy(tiny_model(family))
    for seed, name in enumerate(adapters):
        policy.add_adapter(name, LoraOptions(rank=4), seed)
        for _, parameter in sorted(policy.adapter_parameters(name).items()):
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    return LocalSampler(policy, END, options=EngineOptions(**options))


def play(stream: LocalStream, arrivals: list[tuple[int, SampleRequest]]) -> tuple[list[Sample | PosttrainError], list[int]]:
    """Admit each request at its step; the results in the order of the arrivals, and the places in the order in which they finished."""
    found: dict[int, Sample | PosttrainError] = {}
    tickets: list[int] = []
    for step in range(10_000):
        tickets += stream.admit([request for when, request in arrivals if when == step])
        found.update(stream.step())
        if len(found) == len(arrivals):
            break
    assert stream.step() == {}
    return [found[ticket] for ticket in tickets], [tickets.index(ticket) for ticket in found]


def same(got: Sample | PosttrainError, engine: LocalSampler, request: SampleRequest) -> None:
    (alone,) = engine.sample([request])
    assert isinstance(got, Sample)
    assert (got.ids, got.stop, got.forced) == (alone.ids, alone.stop, alone.forced)
    assert got.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.parametrize(("family", "rows"), [("llama", 3), ("llama", 16), ("mistral", 4), ("gemma3", 4)])
def test_whenever_a_request_comes_it_draws_what_it_draws_alone(family: str, rows: int) -> None:
    engine = sampler(family, ("a", "b"))
    names = (None, "a", "b", "a")
    asked = [replace(request, adapter=names[i % 4]) for i, request in enumerate(requests())]
    stream = engine.open(rows)
    got, _ = play(stream, [(3 * i // 2, request) for i, request in enumerate(asked)])
    for request, sample in zip(asked, got, strict=True):
        same(sample, engine, request)


def test_a_late_short_request_finishes_before_an_early_long_one() -> None:
    engine = sampler()
    long = SampleRequest(PROMPTS[0], 1, SampleOptions(60, 1.0))
    assert len(engine.sample([long])[0].ids) > 20
    short = SampleRequest(PROMPTS[1], 2, SampleOptions(4))
    got, order = play(engine.open(4), [(0, long), (6, short)])
    assert order == [1, 0]
    for request, sample in zip((long, short), got, strict=True):
        same(sample, engine, request)


def test_a_prefix_that_was_computed_for_another_request_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = sampler()
    inner, tokens = Decoder.infer, []
    monkeypatch.setattr(Decoder, "infer", lambda self, ids, *rest: tokens.append(len(ids)) or inner(self, ids, *rest))
    stream = engine.open(4)
    how = SampleOptions(5)

    def cost(prompt: tuple[int, ...]) -> tuple[int, Sample]:
        tokens.clear()
        ((sample,), _) = play(stream, [(0, SampleRequest(prompt, 1, how))])
        assert isinstance(sample, Sample)
        return sum(tokens) - len(sample.ids), sample

    first = tuple(random_ids(60, RNG))
    whole, answer = cost(first)
    assert whole >= 59
    turn = (*first, *answer.ids, 7, 8, 9)  # the conversation goes on
    cheap, again = cost(turn)
    assert cheap < 8
    tokens.clear()
    assert engine.sample([SampleRequest(turn, 1, how)])[0].ids == again.ids
    # beside a row that decodes: what both start with becomes a trunk
    fellows = [SampleRequest((*turn[:50], 5, i, 6), i, SampleOptions(12, 1.0)) for i in range(3)]
    tokens.clear()
    got, _ = play(stream, [(i, fellow) for i, fellow in enumerate(fellows)])
    assert sum(tokens) < 3 * (12 + 8)
    for fellow, sample in zip(fellows, got, strict=True):
        same(sample, engine, fellow)


def test_what_was_computed_for_one_scope_is_never_used_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long an answer takes would tell a tenant what another asked: at once, later, and beside a row that decodes."""
    engine = sampler(adapters=("a",))
    inner, tokens = Decoder.infer, []
    monkeypatch.setattr(Decoder, "infer", lambda self, ids, *rest: tokens.append(len(ids)) or inner(self, ids, *rest))
    secret = tuple(random_ids(300, RNG))
    own, other = (SampleRequest(secret, 1, SampleOptions(3), adapter="a", scope=scope) for scope in ("bank", "shop"))
    stream = engine.open(4)

    def cost(*asked: tuple[int, SampleRequest]) -> int:
        tokens.clear()
        got, _ = play(stream, list(asked))
        for sample, (_, request) in zip(got, asked, strict=True):
            assert isinstance(sample, Sample) and sample.ids == engine_alone[request.scope].ids
        return sum(tokens)

    engine_alone = {request.scope: engine.sample([request])[0] for request in (own, other)}
    assert cost((0, own)) >= 300
    assert cost((0, own)) < 10
    assert cost((0, other)) >= 300
    assert cost((0, other)) < 10
    stream = engine.open(4)
    assert cost((0, own), (1, other)) >= 600  # the first still decodes
    stream = engine.open(4)
    assert cost((0, own), (0, own), (0, other), (0, other)) >= 600


def test_what_is_remembered_is_bounded_and_forgetting_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Memory.__init__
    monkeypatch.setattr(Memory, "__init__", lambda self, cache: inner(self, cache, max_bytes=60_000, max_trunks=2))
    engine, rng = sampler(adapters=("a",)), random.Random(3)
    stems = [tuple(random_ids(24, rng)) for _ in range(5)]
    asked = [
        SampleRequest((*stems[rng.randrange(5)], *random_ids(3, rng)), i, OPTIONS[i % 4], adapter="a" if i % 2 else None)
        for i in range(24)
    ]
    stream = engine.open(3)
    got, _ = play(stream, [(2 * i, request) for i, request in enumerate(asked)])
    (run,) = stream._runs.values()
    assert isinstance(run, TreeStream)
    assert len(run.memory.trunks) <= 2 and len(run.cache.trunks) <= 8
    assert not run.requests and not run.family and not run.strips
    for request, sample in zip(asked, got, strict=True):
        same(sample, engine, request)


def test_a_cancelled_request_leaves_its_row_to_the_next_and_the_others_alone() -> None:
    engine = sampler()
    engine.end_of_turn = -1
    long = SampleOptions(50, 1.0)
    stays, goes, waits = (SampleRequest(PROMPTS[i], i, long) for i in range(3))
    stream = engine.open(2)
    kept, cancelled, queued = stream.admit([stays, goes, waits])
    for _ in range(3):
        assert not stream.step()
    stream.cancel(cancelled)
    (late,) = stream.admit([goes])
    stream.cancel(late)  # before it had a row
    found: dict[int, Sample | PosttrainError] = {}
    for _ in range(200):
        found.update(stream.step())
    assert set(found) == {kept, queued}
    same(found[kept], engine, stays)
    same(found[queued], engine, waits)
    stream.cancel(kept)  # finished long ago


def test_what_is_wrong_with_a_request_is_its_own_result_only(contract: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tiny_model(vocabulary=contract.vocabulary_size + 12))
    engine = LocalSampler(
        policy, contract.end_of_turn, GrammarEngine(contract.tokenizer, policy.config.vocab_size, contract.end_of_turn)
    )
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    good = SampleRequest(PROMPTS[0], 1, SampleOptions(30, 1.0), json_grammar(schema))
    fails_later = replace(good, seed=3, grammar=json_grammar({"type": "string", "minLength": 20}))
    doomed = engine.grammar.matcher(fails_later.grammar)  # type: ignore[union-attr, arg-type]
    inner, steps = Matcher.consume, []

    def consume(self: Matcher, token: int) -> None:
        if self is doomed and len(steps) == 3:
            raise GrammarError("a token outside the grammar", where="matcher", value=token)
        steps.extend([1] if self is doomed else [])
        inner(self, token)

    monkeypatch.setattr(Matcher, "consume", consume)
    matchers = GrammarEngine.matcher
    monkeypatch.setattr(GrammarEngine, "matcher", lambda self, g: doomed if g == fails_later.grammar else matchers(self, g))
    asked = [
        good,
        replace(good, grammar=Grammar("start: nothing_of_that_name")),
        replace(good, adapter="nobody"),
        replace(good, prompt=()),
        fails_later,
        replace(good, grammar=None),
    ]
    got, _ = play(engine.open(4), [(i, request) for i, request in enumerate(asked)])
    assert isinstance(got[1], GrammarError) and isinstance(got[2], BindingError) and "empty prompt" in str(got[3])
    assert isinstance(got[4], GrammarError) and "outside the grammar" in str(got[4])
    for place in (0, 5):
        same(got[place], engine, asked[place])


def test_a_matcher_that_allows_nothing_fails_its_row_only(contract: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tiny_model(vocabulary=contract.vocabulary_size + 12))
    grammar = GrammarEngine(contract.tokenizer, policy.config.vocab_size, contract.end_of_turn)
    engine = LocalSampler(policy, contract.end_of_turn, grammar)
    good = SampleRequest(PROMPTS[0], 1, SampleOptions(30, 1.0), json_grammar({"type": "string", "minLength": 9}))
    inner = GrammarEngine.masks

    def masks(self: GrammarEngine, matchers: Any) -> Any:
        bits, broken = inner(self, matchers)
        return bits, {**broken, **({1: GrammarError("the mask is empty")} if len(matchers) > 1 else {})}

    monkeypatch.setattr(GrammarEngine, "masks", masks)
    got, _ = play(engine.open(4), [(0, good), (0, replace(good, seed=2))])
    assert sorted(type(found).__name__ for found in got) == ["GrammarError", "Sample"]


def test_adapters_that_cannot_share_a_pass_take_turns() -> None:
    engine = sampler(adapters=("plain", "apart"))
    mixes = Policy.mixes
    engine.policy.mixes = lambda name: name != "apart" and mixes(engine.policy, name)  # type: ignore[method-assign]
    names = ("plain", "apart", None)
    asked = [replace(request, adapter=names[i % 3]) for i, request in enumerate(requests()[:9])]
    got, _ = play(engine.open(4), [(i, request) for i, request in enumerate(asked)])
    for request, sample in zip(asked, got, strict=True):
        same(sample, engine, request)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_two_streams_of_one_policy_take_turns_without_taking_each_others_adapter(family: str) -> None:
    engine = sampler(family, ("a", "b"))
    asked = [SampleRequest(PROMPTS[0], 0, SampleOptions(12), adapter=name) for name in ("a", None, "b")]
    streams = [engine.open(1) for _ in asked]
    tickets = [stream.admit([request])[0] for stream, request in zip(streams, asked, strict=True)]
    got: dict[int, Sample | PosttrainError] = {}
    for _ in range(20):
        for place, stream in enumerate(streams):
            if (found := stream.step()).keys():
                got[place] = found[tickets[place]]
    for place, request in enumerate(asked):
        same(got[place], engine, request)
    assert len({sample.ids for sample in got.values() if isinstance(sample, Sample)}) == 3
