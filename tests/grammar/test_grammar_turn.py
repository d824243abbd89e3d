from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from posttrain.contract import template
from posttrain.data.records import ToolSpec
from posttrain.errors import GrammarError
from posttrain.grammar import CALL_CLOSE, CALL_OPEN, Grammar, GrammarEngine, json_grammar, text_grammar, turn_grammar

MONEY = {"type": "string", "pattern": "^-?[0-9]{1,4}\\.[0-9]{2}$"}
ANSWER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "decision": {"enum": ["answer", "refuse", "propose", "clarify"]},
        "summary": {"type": "string", "maxLength": 30},
        "figures": {
            "type": "array",
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 8}, "amount": MONEY},
                "required": ["name", "amount"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["decision", "summary", "figures"],
    "additionalProperties": False,
}
QUERY = ToolSpec(
    "query_erp",
    "Rows",
    {
        "type": "object",
        "properties": {"table": {"enum": ["ap", "ar"]}, "limit": {"type": "integer", "minimum": 1, "maximum": 50}},
        "required": ["table"],
        "additionalProperties": False,
    },
)
POST = ToolSpec(
    'post "entry"',
    "Posts",
    {"properties": {"amount": MONEY, "account": {"$ref": "#/$defs/code"}}, "required": ["amount", "account"],
     "additionalProperties": False, "$defs": {"code": {"type": "string", "pattern": "^[0-9]{4}$"}}},
)  # fmt: skip
CASH = ToolSpec("现金", "Cash", {})
CALL = re.compile(re.escape(CALL_OPEN) + "(.*?)" + re.escape(CALL_CLOSE), re.S)
BENCH = Path(__file__).parents[2].parent / "shared" / "data" / "jsonschemabench" / "schemas.jsonl.gz"


def consumes(engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast, grammar: Grammar, text: str) -> bool:
    matcher = engine.matcher(grammar)
    try:
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            matcher.consume(token)
    except GrammarError:
        return False
    return matcher.is_accepting


def call(name: str, **arguments: Any) -> str:
    return (
        f"{CALL_OPEN}{json.dumps({'name': name, 'arguments': arguments}, separators=(',', ':'), ensure_ascii=False)}{CALL_CLOSE}"
    )


def test_the_call_markers_are_the_contracts() -> None:
    assert (CALL_OPEN, CALL_CLOSE) == (template.CALL_OPEN, template.CALL_CLOSE)


@pytest.mark.parametrize(
    "schema",
    [
        ANSWER,
        QUERY.parameters,
        POST.parameters,
        {"type": "array", "items": MONEY, "maxItems": 3},
        {"anyOf": [{"type": "null"}, {"type": "integer"}]},
        {"enum": ["a", 1, None, {"b": [True]}]},
    ],
)
def test_every_random_walk_under_a_schema_is_a_compact_document_that_the_schema_accepts(
    walk: Any, schema: dict[str, Any]
) -> None:
    validator = jsonschema_rs.validator_for(schema)
    grammar = json_grammar(schema)
    for seed in range(12):
        text = walk(grammar, seed)
        value = json.loads(text)
        assert validator.is_valid(value), text
        assert not re.search(r"(?<=[,:{}\[\]])\s|\s(?=[,:{}\[\]])", re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)), text


def test_every_random_turn_is_calls_of_the_given_tools_or_an_answer(walk: Any) -> None:
    tools = {tool.name: jsonschema_rs.validator_for({"type": "object", **tool.parameters}) for tool in (QUERY, POST)}
    answer = jsonschema_rs.validator_for(ANSWER)
    grammar = turn_grammar((QUERY, POST), ANSWER, max_calls=3)
    counts: set[int] = set()
    for seed in range(60):
        text = walk(grammar, seed)
        calls = [json.loads(body) for body in CALL.findall(text)]
        counts.add(len(calls))
        if not calls:
            assert answer.is_valid(json.loads(text)), text
        assert not calls or CALL.sub("", text) == ""
        for value in calls:
            assert list(value) == ["name", "arguments"]
            assert tools[value["name"]].is_valid(value["arguments"]), text
    assert {0, 1} <= counts <= {0, 1, 2, 3}


def test_a_free_answer_beside_tools_never_holds_a_call_marker(walk: Any) -> None:
    grammar = turn_grammar((QUERY,), None)
    for seed in range(20):
        text = walk(grammar, seed)
        assert text
        assert CALL.sub("", text) == "" or not re.search("</?tool_call>", text)


def test_special_tokens_are_never_allowed_except_the_end_where_the_turn_may_end(
    engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    specials = {tokenizer.convert_tokens_to_ids(token) for token in ("<|pad|>", "<|im_start|>", "<|im_end|>")}
    text = '{"decision":"answer","summary":"the 现金 is open","figures":[]}'
    for grammar in (json_grammar(ANSWER), turn_grammar((QUERY,), None), turn_grammar((), None)):
        matcher = engine.matcher(grammar)
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            row = np.unpackbits(engine.fill([matcher])[0].view(np.uint8), bitorder="little")
            allowed = {special for special in specials if row[special]}
            assert allowed == ({engine.eos_id} if matcher.is_accepting else set())
            matcher.consume(token)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (call("query_erp", table="ap"), True),
        (call("query_erp", table="ap", limit=50), True),
        (call("query_erp", table="gl"), False),
        (call("query_erp", table="ap", limit=51), False),
        (call("query_erp", amount="1.00", account="1001"), False),  # the arguments of another tool
        (call('post "entry"', amount="1.00", account="1001"), True),
        (call('post "entry"', amount=1.0, account="1001"), False),
        (call("现金"), True),
        (call("transfer_funds"), False),
        (call("现金") * 2, True),
        (call("现金") * 3, False),
        (call("现金") + "done", False),
        ("done" + call("现金"), False),
        ('{"decision":"refuse","summary":"no","figures":[]}', True),
        ('{"decision":"refuse","summary":"no"}', False),
        ("", False),
        ("done", False),
    ],
)
def test_a_turn_is_one_or_two_calls_or_one_answer(
    engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast, text: str, good: bool
) -> None:
    assert consumes(engine, tokenizer, turn_grammar((QUERY, POST, CASH), ANSWER), text) is good


@pytest.mark.parametrize(
    ("text", "good"),
    [("the balance is 12.50\n现金", True), (call("现金"), True), ("see " + call("现金"), False), ("a </tool_call>", False),
     ("a <tool_cal b", True), ("", False)],
)  # fmt: skip
def test_without_an_answer_schema_the_answer_is_any_text_but_a_broken_call(
    engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast, text: str, good: bool
) -> None:
    assert consumes(engine, tokenizer, turn_grammar((CASH,), None), text) is good


def test_without_tools_a_call_cannot_be_written(engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    assert not consumes(engine, tokenizer, turn_grammar((), None), call("现金"))
    assert not consumes(engine, tokenizer, turn_grammar((), ANSWER), call("现金"))
    assert consumes(engine, tokenizer, turn_grammar((), ANSWER), '{"decision":"refuse","summary":"no","figures":[]}')


@pytest.mark.parametrize(
    ("text", "good"),
    [("the balance is 12.50\n现金", True), (" <b>12.50</b>", True), ('{"decision":"answer"}', True), ("<b>", False), ("", False),
     ("see " + CALL_OPEN, False), ("<|im_end|>", False)],
)  # fmt: skip
def test_plain_text_begins_like_text_and_holds_no_call(
    engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast, text: str, good: bool
) -> None:
    assert consumes(engine, tokenizer, text_grammar(), text) is good


def test_the_same_tools_and_answer_give_the_same_grammar() -> None:
    assert turn_grammar((QUERY, CASH), ANSWER).hash == turn_grammar((QUERY, CASH), ANSWER).hash
    assert turn_grammar((QUERY, CASH), ANSWER).hash != turn_grammar((CASH,), ANSWER).hash
    assert turn_grammar((CASH,), ANSWER, max_calls=1).hash != turn_grammar((CASH,), ANSWER).hash


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "object", "not": {"required": ["a"]}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "if": {"minLength": 2}, "then": {"pattern": "a"}}, "if"),
        ({"type": "string", "format": "iban"}, "iban"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "array", "contains": {"const": 1}}, "contains"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"$ref": "http://localhost:9/schema"}, "localhost"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_by_the_keywords_name(schema: dict[str, Any], keyword: str) -> None:
    with pytest.raises(GrammarError, match=keyword):
        json_grammar(schema)
    with pytest.raises(GrammarError, match=f"answer schema.*{keyword}"):
        turn_grammar((QUERY,), schema)
    tool = ToolSpec("bad_tool", "", {"type": "object", "properties": {"value": schema}})
    with pytest.raises(GrammarError, match=f"tool bad_tool.*{keyword}"):
        turn_grammar((QUERY, tool), ANSWER)


def test_options_hidden_in_a_schema_cannot_switch_the_enforcement_off(
    engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(GrammarError, match="uniqueItems"):
        json_grammar({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}})
    inside = {"type": "array", "items": {"type": "array", "x-guidance": {"whitespace_flexible": True}}}
    assert not consumes(engine, tokenizer, json_grammar(inside), "[[1, 2]]")


@pytest.mark.parametrize("schema", [{"type": "strng"}, {"properties": 3}, {"type": "object", "required": "a"}, {"const": {1, 2}}])
def test_what_is_not_a_schema_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match="not a JSON Schema"):
        json_grammar(schema)


def test_tools_of_one_name_no_room_for_a_call_and_arguments_that_are_no_object_are_refused() -> None:
    with pytest.raises(GrammarError, match="share a name"):
        turn_grammar((QUERY, QUERY), None)
    with pytest.raises(GrammarError, match="room for a call"):
        turn_grammar((QUERY,), None, max_calls=0)
    with pytest.raises(GrammarError, match=r"tool listed.*object"):
        turn_grammar((ToolSpec("listed", "", {"type": "array"}),), None)


@pytest.mark.skipif(not BENCH.exists(), reason="the shared data is not here")
def test_no_invalid_document_of_the_public_schema_benchmark_is_accepted(
    engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    with gzip.open(BENCH, "rt", encoding="utf-8") as file:
        rows = random.Random(7).sample([json.loads(line) for line in file], 150)
    seen = {"refused": 0, "valid": 0, "valid accepted": 0, "invalid": 0}
    for row in rows:
        try:
            grammar = json_grammar(row["schema"])
            engine.matcher(grammar)
        except GrammarError:
            seen["refused"] += 1
            continue
        for test in row["tests"]:
            text = json.dumps(test["data"], separators=(",", ":"), ensure_ascii=False)
            accepted = consumes(engine, tokenizer, grammar, text)
            seen["valid" if test["valid"] else "invalid"] += 1
            seen["valid accepted"] += test["valid"] and accepted
            assert test["valid"] or not accepted, (row["name"], text)
    assert seen["invalid"] > 100
    assert seen["valid accepted"] > 0.9 * seen["valid"] > 50
    assert seen["refused"] < 50
