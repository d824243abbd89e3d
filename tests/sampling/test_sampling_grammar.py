"""Sampling under a grammar: noise in, valid documents out; what the grammar forced is marked; jumping changes no rule."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
import torch

from posttrain.contract import Contract
from posttrain.data.records import Message, StopReason, ToolSpec
from posttrain.grammar import Grammar, GrammarEngine, json_grammar, turn_grammar
from posttrain.policy import Pack, Policy
from posttrain.sampling import EngineOptions, LocalSampler, Sample, SampleOptions, SampleRequest
from posttrain.sampling.decoder import Decoder
from tiny_models import sequence, tiny_model

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "decision": {"enum": ["answer", "refuse", "propose"]},
        "amount": {"type": "string", "pattern": r"^[0-9]{1,4}\.[0-9]{2}$"},
        "sources": {"type": "array", "items": {"enum": ["ledger", "policy"]}, "maxItems": 2},
    },
    "required": ["decision", "amount", "sources"],
    "additionalProperties": False,
}
LOOKUP = ToolSpec(
    "lookup",
    "Reads.",
    {
        "type": "object",
        "properties": {"account": {"enum": ["1001", "2002"]}, "limit": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["account"],
        "additionalProperties": False,
    },
)
WARM = SampleOptions(max_tokens=120, temperature=1.0)
COUNT = 8


@pytest.fixture(scope="module")
def policy(contract: Contract) -> Policy:
    return Policy(tiny_model(vocabulary=contract.vocabulary_size + 12))


@pytest.fixture(scope="module")
def grammars(contract: Contract, policy: Policy) -> GrammarEngine:
    return GrammarEngine(contract.tokenizer, policy.config.vocab_size, contract.end_of_turn)


@pytest.fixture(scope="module")
def prompt(contract: Contract) -> tuple[int, ...]:
    return tuple(contract.prompt_ids((Message("user", "What is due on account 1001?"),)))


@pytest.fixture(params=[True, False], ids=["jump", "no jump"])
def engine(request: pytest.FixtureRequest, contract: Contract, policy: Policy, grammars: GrammarEngine) -> LocalSampler:
    return LocalSampler(policy, contract.end_of_turn, grammars, EngineOptions(jump=request.param, max_rows=5))


def sample(engine: LocalSampler, prompt: tuple[int, ...], grammar: Grammar | None, options: SampleOptions = WARM) -> list[Sample]:
    return engine.sample([SampleRequest(prompt, seed, options, grammar) for seed in range(COUNT)])


def test_every_constrained_document_is_valid_and_compact(
    engine: LocalSampler, contract: Contract, prompt: tuple[int, ...]
) -> None:
    validator = jsonschema_rs.validator_for(SCHEMA)
    for got in sample(engine, prompt, json_grammar(SCHEMA)):
        assert got.stop is StopReason.END_OF_TURN and got.ids[-1] == contract.end_of_turn
        text = contract.parse(got.ids).content
        value = json.loads(text)
        assert validator.is_valid(value), text
        assert text == json.dumps(value, separators=(",", ":"))


def test_greedy_documents_are_valid_too(engine: LocalSampler, contract: Contract, prompt: tuple[int, ...]) -> None:
    first, *rest = sample(engine, prompt, json_grammar(SCHEMA), SampleOptions(max_tokens=120))
    assert jsonschema_rs.validator_for(SCHEMA).is_valid(json.loads(contract.parse(first.ids).content))
    assert all(got.ids == first.ids for got in rest)


def test_a_constrained_turn_is_a_call_of_an_offered_tool_or_an_answer(
    engine: LocalSampler, contract: Contract, prompt: tuple[int, ...]
) -> None:
    arguments = jsonschema_rs.validator_for(dict(LOOKUP.parameters))
    calls = 0
    for got in sample(engine, prompt, turn_grammar([LOOKUP], SCHEMA)):
        message = contract.parse(got.ids)
        calls += len(message.tool_calls)
        for call in message.tool_calls:
            assert call.name == "lookup" and arguments.is_valid(json.loads(call.arguments))
        if not message.tool_calls:
            assert jsonschema_rs.validator_for(SCHEMA).is_valid(json.loads(message.content))
    only_calls = {**SCHEMA, "properties": {**SCHEMA["properties"], "decision": {"enum": ["answer"]}}}
    assert calls or any(contract.parse(g.ids).tool_calls for g in sample(engine, prompt, turn_grammar([LOOKUP], only_calls)))


def test_a_batch_of_different_grammars_and_none_equals_each_request_alone(engine: LocalSampler, prompt: tuple[int, ...]) -> None:
    choices = [json_grammar(SCHEMA), None, turn_grammar([LOOKUP], SCHEMA), json_grammar({"enum": ["ledger", "policy"]})]
    asked = [
        SampleRequest((*prompt, 300 + i), i, SampleOptions(max_tokens=60, temperature=i % 3 * 0.7), choices[i % 4])
        for i in range(9)
    ]
    for request, got in zip(asked, engine.sample(asked), strict=True):
        (alone,) = engine.sample([request])
        assert (got.ids, got.forced, got.stop) == (alone.ids, alone.forced, alone.stop)


def test_a_length_stop_leaves_a_prefix_and_never_exceeds_the_limit_even_within_a_forced_run(
    engine: LocalSampler, contract: Contract, prompt: tuple[int, ...]
) -> None:
    whole = sample(engine, prompt, json_grammar(SCHEMA))
    for limit in (1, 2, 5, 9):
        for got, full in zip(sample(engine, prompt, json_grammar(SCHEMA), SampleOptions(limit, 1.0)), whole, strict=True):
            assert got.stop is StopReason.LENGTH and len(got.ids) == limit == len(got.forced)
            with pytest.raises(json.JSONDecodeError):
                json.loads(contract.decode(got.ids))
            assert len(full.ids) > limit


def test_tokens_without_a_choice_are_marked_forced_and_others_are_not(
    engine: LocalSampler, contract: Contract, grammars: GrammarEngine, prompt: tuple[int, ...]
) -> None:
    grammar = json_grammar(SCHEMA)
    for got in sample(engine, prompt, grammar):
        matcher = grammars.matcher(grammar)
        assert any(got.forced) and not all(got.forced)
        run: list[int] = []
        for token, forced, drawn in zip(got.ids, got.forced, got.sampled_logprobs, strict=True):
            choices = int(sum(int(word).bit_count() for word in grammars.fill([matcher])[0].view("uint32")))
            jumped = bool(run) and run.pop(0) == token
            assert forced == (choices == 1 or jumped)
            if forced:
                assert drawn == 0.0
            if token == contract.end_of_turn:
                break
            matcher.consume(token)
            if engine.options.jump and not run:
                run = [t for t in matcher.forced_run() if t != contract.end_of_turn]


def test_log_probabilities_of_tokens_that_were_chosen_are_the_learners(
    engine: LocalSampler, policy: Policy, prompt: tuple[int, ...]
) -> None:
    for got in sample(engine, prompt, json_grammar(SCHEMA)):
        ids = [*prompt, *got.ids]
        with torch.no_grad():
            want = policy.logprobs(Pack.of([sequence(ids, range(len(prompt), len(ids)))]))
        chosen = ~torch.tensor(got.forced)
        torch.testing.assert_close(torch.tensor(got.logprobs)[chosen], want[chosen], atol=5e-5, rtol=0)
        assert all(b >= a - 1e-5 for a, b in zip(got.logprobs, got.sampled_logprobs, strict=True) if a != 0.0)


def test_jumping_runs_the_model_less_often_for_the_same_kind_of_document(
    contract: Contract, policy: Policy, grammars: GrammarEngine, prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, passes = Decoder.infer, []
    monkeypatch.setattr(Decoder, "infer", lambda *a: passes.append(1) or inner(*a))
    counts = {}
    for jump in (True, False):
        passes.clear()
        (got,) = LocalSampler(policy, contract.end_of_turn, grammars, EngineOptions(jump=jump)).sample(
            [SampleRequest(prompt, 1, WARM, json_grammar(SCHEMA))]
        )
        counts[jump] = (len(passes), len(got.ids))
    assert counts[True][0] < counts[True][1] * 0.7
    assert counts[False][0] >= counts[False][1]


def test_a_document_with_one_spelling_is_wholly_forced(engine: LocalSampler, contract: Contract, prompt: tuple[int, ...]) -> None:
    for got in sample(engine, prompt, json_grammar({"const": {"decision": "refuse"}})):
        assert contract.parse(got.ids).content == '{"decision":"refuse"}'
        assert got.stop is StopReason.END_OF_TURN


def test_padding_ids_of_the_vocabulary_are_never_drawn(engine: LocalSampler, contract: Contract, prompt: tuple[int, ...]) -> None:
    for got in sample(engine, prompt, turn_grammar([], None), SampleOptions(max_tokens=40, temperature=3.0)):
        assert max(got.ids) < contract.vocabulary_size


WORDY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "summary": {"type": "string", "minLength": 1, "maxLength": 400},
        "figures": {
            "type": "array",
            "maxItems": 9,
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "note": {"type": "string"}},
                "required": ["name"],
                "additionalProperties": False,
            },
        },
        "steps": {"type": "array", "maxItems": 9, "items": {"type": "string"}},
    },
    "required": ["summary", "figures", "steps"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("limit", [60, 61, 75, 120])
def test_what_would_run_into_its_limit_is_closed_in_time(
    limit: int, engine: LocalSampler, contract: Contract, prompt: tuple[int, ...]
) -> None:
    options = SampleOptions(max_tokens=limit, temperature=1.0)
    found = sample(engine, prompt, json_grammar(WORDY), options)
    validator = jsonschema_rs.validator_for(WORDY)
    for got in found:
        assert got.stop in (StopReason.CLOSED, StopReason.END_OF_TURN) and len(got.ids) <= limit
        assert got.ids[-1] == contract.end_of_turn
        assert validator.is_valid(json.loads(contract.parse(got.ids).content))
    closed = [got for got in found if got.stop is StopReason.CLOSED]
    assert closed  # noise has no reason to end
    for got in closed:  # what the model chose stays as long as the rest has room
        written = len(got.ids) - got.forced[::-1].index(False)
        assert written > limit - 60 and got.forced[-1]
    free = sample(engine, prompt, json_grammar(WORDY), SampleOptions(max_tokens=400, temperature=1.0))
    for got, longer in zip(found, free, strict=True):  # and is what it would have chosen without a limit
        assert got.ids[: limit - 60] == longer.ids[: limit - 60]


def test_what_fits_stays_as_it_is(engine: LocalSampler, prompt: tuple[int, ...]) -> None:
    short = {"type": "object", "properties": {"a": {"type": "array", "items": {"enum": ["ledger", "policy"]}, "maxItems": 4}}}
    grammar = json_grammar({**short, "required": ["a"], "additionalProperties": False})
    free = sample(engine, prompt, grammar, SampleOptions(max_tokens=400, temperature=1.0))
    assert {got.stop for got in free} == {StopReason.END_OF_TURN} and len({len(got.ids) for got in free}) > 1
    for limit in sorted({len(got.ids) for got in free}):
        found = sample(engine, prompt, grammar, SampleOptions(max_tokens=limit, temperature=1.0))
        kept = [got.ids == longer.ids for got, longer in zip(found, free, strict=True) if len(longer.ids) <= limit]
        assert all(kept) and kept


def test_a_call_is_closed_in_time_too(engine: LocalSampler, contract: Contract, prompt: tuple[int, ...]) -> None:
    find = ToolSpec("find", "Finds.", {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]})
    must = turn_grammar([find], {"enum": [1]}, max_calls=1)
    found = sample(engine, (*prompt, *contract.encode("<tool_call>")), must, SampleOptions(max_tokens=64, temperature=1.0))
    closed = [got for got in found if got.stop is StopReason.CLOSED]
    assert closed
    for got in closed:
        (call,) = contract.parse(got.ids).tool_calls
        assert call.name == "find" and isinstance(json.loads(call.arguments)["query"], str)


def test_no_value_is_invented_to_close_an_answer(engine: LocalSampler, contract: Contract, prompt: tuple[int, ...]) -> None:
    """Where a required value is missing there is no way out, and what was begun is cut."""
    schema = {"type": "object", "properties": {"note": {"type": "string"}, "account": {"enum": ["1001", "2002"]}}}
    grammar = json_grammar({**schema, "required": ["note", "account"], "additionalProperties": False})
    for got in sample(engine, prompt, grammar, SampleOptions(max_tokens=40, temperature=1.0)):
        assert got.stop in (StopReason.LENGTH, StopReason.END_OF_TURN)


def test_what_has_nothing_open_and_what_has_no_room_is_cut(
    engine: LocalSampler, contract: Contract, prompt: tuple[int, ...]
) -> None:
    few = SampleOptions(max_tokens=6, temperature=1.0)
    for grammar in (Grammar("start: /[a-z ]*/"), json_grammar(WORDY)):
        for got in sample(engine, prompt, grammar, few):
            assert got.stop in (StopReason.LENGTH, StopReason.END_OF_TURN)
            if got.stop is StopReason.LENGTH:
                assert len(got.ids) == 6 and contract.end_of_turn not in got.ids
