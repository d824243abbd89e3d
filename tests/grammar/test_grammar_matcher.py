from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from posttrain.errors import GrammarError
from posttrain.grammar import Grammar, GrammarEngine, Matcher, allowed_counts, forced_rows, json_grammar
from posttrain.grammar import matcher as module

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "paid": {"type": "boolean"}},
    "required": ["name", "paid"],
    "additionalProperties": False,
}


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def allowed_ids(engine: GrammarEngine, matcher: Matcher) -> set[int]:
    row = engine.fill([matcher])[0]
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def test_a_grammar_is_frozen_and_its_hash_depends_on_its_text_alone() -> None:
    grammar = Grammar("start: /a/")
    assert grammar == Grammar("start: /a/")
    assert grammar.hash == Grammar("start: /a/").hash != Grammar("start: /b/").hash
    assert len(grammar.hash) == 64
    with pytest.raises(dataclasses.FrozenInstanceError):
        grammar.source = "x"  # type: ignore[misc]


def test_importing_the_room_does_not_import_torch() -> None:
    code = "import sys, posttrain.grammar; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_mask_has_one_bit_per_token_of_the_padded_vocabulary(engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    matcher = engine.matcher(json_grammar(PERSON))
    mask = engine.fill([matcher, None])
    assert mask.shape == (2, (engine.vocab_size + 31) // 32)
    assert mask.dtype == np.int32
    texts = {tokenizer.decode([token]) for token in allowed_ids(engine, matcher)}
    assert texts
    assert all('{"name":"'.startswith(text) for text in texts)
    assert (mask[1] == -1).all()


def test_padding_ids_beyond_the_tokenizer_are_never_allowed(engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    matcher = engine.matcher(Grammar("start: /(?s:.*)/"))
    assert engine.vocab_size > len(tokenizer)
    assert max(allowed_ids(engine, matcher)) < len(tokenizer)


def test_one_row_filled_alone_equals_its_row_in_a_batch(engine: GrammarEngine) -> None:
    grammar = json_grammar(PERSON)
    row = np.zeros((engine.vocab_size + 31) // 32, np.int32)
    engine.matcher(grammar).allowed(row)
    assert (engine.fill([None, engine.matcher(grammar)])[1] == row).all()


def test_a_batch_large_enough_for_threads_equals_rows_filled_one_by_one(
    engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = ids_of(tokenizer, '{"name":"due","paid":true}')
    matchers: list[Matcher | None] = [engine.matcher(json_grammar(PERSON)) for _ in range(2 * module._PARALLEL)]
    for place, matcher in enumerate(matchers):
        assert matcher is not None
        for token in ids[: place % len(ids)]:
            matcher.consume(token)
    matchers[3] = None
    together = engine.fill(matchers)
    for row, matcher in zip(together, matchers, strict=True):
        assert (engine.fill([matcher])[0] == row).all()


def test_a_document_is_consumed_to_acceptance_and_then_only_its_end_may_follow(
    engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    matcher = engine.matcher(json_grammar(PERSON))
    for token in ids_of(tokenizer, '{"name":"due","paid":true}'):
        assert not matcher.is_accepting
        assert token in allowed_ids(engine, matcher)
        matcher.consume(token)
    assert matcher.is_accepting
    assert matcher.is_stopped
    assert allowed_ids(engine, matcher) == {engine.eos_id}
    matcher.consume(engine.eos_id)
    assert matcher.error == ""


@pytest.mark.parametrize(
    "text", ['{"name": "due","paid":true}', '{"paid":true,"name":"due"}', '{"name":"due"}', '{"name":"x","a":1}']
)
def test_free_space_another_order_a_missing_or_an_unknown_field_is_refused(
    engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    matcher = engine.matcher(json_grammar(PERSON))

    def consume_all() -> None:
        for token in ids_of(tokenizer, text):
            matcher.consume(token)

    with pytest.raises(GrammarError, match="outside the grammar"):
        consume_all()


def test_a_broken_matcher_is_an_error_when_it_is_asked_for_a_mask_not_a_silent_end(engine: GrammarEngine) -> None:
    matcher = engine.matcher(json_grammar(PERSON))
    with pytest.raises(GrammarError):
        matcher.consume(engine.eos_id)
    assert matcher.error
    with pytest.raises(GrammarError, match="no token may follow"):
        engine.fill([None, matcher])


def test_an_error_does_not_show_the_schema(engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    matcher = engine.matcher(json_grammar({"type": "object", "properties": {"secret_field": {}}, "required": ["secret_field"]}))
    with pytest.raises(GrammarError) as caught:
        matcher.consume(ids_of(tokenizer, "q")[0])
    assert "secret_field" not in str(caught.value)


def test_an_empty_mask_is_an_error(engine: GrammarEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_matcher: object, mask: np.ndarray, row: int) -> None:
        mask[row] = 0

    monkeypatch.setattr(module, "fill_next_token_bitmask", nothing)
    with pytest.raises(GrammarError, match="the mask is empty"):
        engine.fill([engine.matcher(json_grammar(PERSON))])


def test_rows_with_exactly_one_allowed_token_are_marked_forced(engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    one = engine.matcher(Grammar('start: "a"'))
    one.consume(ids_of(tokenizer, "a")[0])
    many = engine.matcher(json_grammar({"type": "boolean"}))
    mask = engine.fill([one, many, None])
    assert forced_rows(mask).tolist() == [True, False, False]
    assert allowed_counts(mask).tolist() == [1, len(allowed_ids(engine, many)), 32 * mask.shape[1]]


def test_a_forced_run_is_what_the_tokenizer_writes_and_is_accepted_as_it_stands(
    engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    matcher = engine.matcher(Grammar('start: "<tool_call>" /[a-z]/ "</tool_call>"'))
    run = matcher.forced_run()
    full = ids_of(tokenizer, "<tool_call>x</tool_call>")
    assert run
    assert full[: len(run)] == run
    for token in run:
        assert token in allowed_ids(engine, matcher)
        matcher.consume(token)
    assert engine.matcher(json_grammar({"type": "boolean"})).forced_run() == []


def test_a_compiled_grammar_is_shared_between_engines_and_a_matcher_is_not(
    tokenizer: PreTrainedTokenizerFast, engine: GrammarEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = json_grammar({"type": "string", "enum": ["shared", "once"]})
    first = engine.matcher(grammar)
    monkeypatch.setattr(module, "LLMatcher", None)  # a second compilation would fail
    monkeypatch.setattr(module, "_build", None)
    second = GrammarEngine(tokenizer, engine.vocab_size, engine.eos_id).matcher(grammar)
    first.consume(first.forced_run()[0])
    assert first.forced_run() != second.forced_run()


def test_another_end_token_is_another_compilation(tokenizer: PreTrainedTokenizerFast, engine: GrammarEngine) -> None:
    pad = tokenizer.convert_tokens_to_ids("<|pad|>")
    other = GrammarEngine(tokenizer, engine.vocab_size, pad)
    assert other.tokenizer_hash != engine.tokenizer_hash
    grammar = Grammar('start: "a"')
    for each in (engine, other):
        matcher = each.matcher(grammar)
        matcher.consume(ids_of(tokenizer, "a")[0])
        assert allowed_ids(each, matcher) == {each.eos_id}


def test_the_cache_forgets_the_least_recently_used() -> None:
    cache, made = module._Cache(2), []
    for key in ("a", "b", "a", "c", "a", "b"):
        cache.get_or_make((key,), lambda key=key: made.append(key))
    assert made == ["a", "b", "c", "b"]


def test_threads_compile_a_grammar_once_and_get_matchers_of_their_own(
    engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    grammar, ids = json_grammar(PERSON), ids_of(tokenizer, '{"name":"due","paid":true}')
    ended: list[bool] = []

    def use() -> None:
        matcher = engine.matcher(grammar)
        for token in ids:
            engine.fill([matcher])
            matcher.consume(token)
        ended.append(matcher.is_accepting)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == [True] * 8


@pytest.mark.parametrize("source", ["start: nowhere", "start: /(/", "not a grammar", ""])
def test_a_grammar_that_does_not_compile_is_refused_by_check_and_by_the_engine(engine: GrammarEngine, source: str) -> None:
    with pytest.raises(GrammarError):
        Grammar(source).check()
    with pytest.raises(GrammarError):
        engine.matcher(Grammar(source))


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(GrammarError, match="padded vocabulary"):
        GrammarEngine(tokenizer, len(tokenizer) - 1, 2)
    with pytest.raises(GrammarError, match="vocabulary"):
        GrammarEngine(tokenizer, len(tokenizer), len(tokenizer))


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(GrammarError, match="fast"):
        GrammarEngine(object(), 10, 0)
