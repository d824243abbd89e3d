"""Grounded values: what a call or an answer may name is what the conversation holds."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.data.records import Message, ToolSpec
from posttrain.errors import GrammarError
from posttrain.grammar import json_grammar, shown, turn_grammar
from posttrain.grammar.evidence import bound, bound_tools

REF = {"type": "string", "pattern": "^[A-Z]{2,4}-[0-9]{3,6}$", "x-grounded": True}
AMOUNT = {"type": "string", "pattern": r"^-?[0-9]{1,10}\.[0-9]{2}$", "x-grounded": True}


def values(schema: dict[str, Any], *evidence: str) -> list[str] | None:
    found = bound(schema, evidence)
    return None if found is None else list(found["enum"])


@pytest.mark.parametrize(
    ("text", "amounts"),
    [
        ("pay 1,250.40 EUR", ["1250.40"]),
        ("pay €1,250.40.", ["1250.40"]),
        ("支付1250.40元", ["1250.40"]),
        ('{"left":"-20.00","due":"120.00"}', ["-20.00", "120.00"]),
        ("2 x 20.00, then 7.5", ["20.00"]),
        ("20.00 and 30.00 and again 20.00", ["30.00", "20.00"]),
        ("pay 5,000 to them", ["5000.00"]),
        ("PAY-5000 in 2026-03", None),
        ("version 1.20.00", None),
        ("nothing here", None),
    ],
)
def test_amounts_are_read_as_people_write_them(text: str, amounts: list[str] | None) -> None:
    assert values(AMOUNT, text) == amounts


def test_references_are_whole_words() -> None:
    assert values(REF, "INV-1234, XPAY-12345678 and (PAY-777)") == ["INV-1234", "PAY-777"]


def test_names_are_runs_of_words_of_a_message_or_whole_values_of_a_result() -> None:
    name = {"type": "string", "maxLength": 30, "x-grounded": True}
    found = values(name, "How late is (Ash & Co), please?", '{"party":"Torby Hardware","count":2,"rows":["a b"]}')
    assert found is not None
    assert {"Ash & Co", "late", "Torby Hardware", "a b"} <= set(found)
    assert not {"Torby", "Ash Co", "(Ash", "count"} & set(found)
    assert all(len(value) <= 30 for value in found)
    assert values(name, "...") is None


def test_named_values_need_no_evidence() -> None:
    account = {"type": "string", "pattern": "^([0-9]{4}|none)$", "x-grounded": ["none"]}
    assert values(account, "debit 6100 credit 2000") == ["6100", "2000", "none"]
    assert values(account, "no account at all") == ["none"]
    assert values(account, "JE-6026 of 2029-10-31: debit 2000") == ["2000", "none"]


def test_the_assistants_own_words_are_no_evidence() -> None:
    conversation = [Message("user", "PAY-1001?"), Message("assistant", "PAY-2002"), Message("tool", '{"ref":"PAY-3003"}')]
    assert values(REF, *shown(conversation)) == ["PAY-1001", "PAY-3003"]


def test_what_cannot_be_grounded_is_left_out() -> None:
    schema = {
        "type": "object",
        "properties": {"ref": REF, "amount": AMOUNT, "figures": {"type": "array", "items": AMOUNT, "maxItems": 3}},
        "required": ["ref"],
    }
    assert bound(schema, ["nothing"]) is None
    found = bound(schema, ["PAY-1001"])
    assert found is not None and set(found["properties"]) == {"ref", "figures"}
    assert found["properties"]["figures"] == {"type": "array", "maxItems": 0}
    assert bound({"type": "array", "items": AMOUNT, "minItems": 1}, ["nothing"]) is None


def test_a_schema_without_the_keyword_is_unchanged() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}}}, "required": ["a"]}
    assert bound(schema, ["PAY-1001"]) == schema


def tool(name: str, **properties: Any) -> ToolSpec:
    return ToolSpec(name, "", {"type": "object", "properties": properties, "required": list(properties)})


def test_a_tool_without_evidence_cannot_be_called() -> None:
    tools = (tool("pay", ref=REF), tool("cash"))
    assert [found.name for found in bound_tools(tools, ["how much cash?"])] == ["cash"]
    open_grammar, closed = turn_grammar(tools, None), turn_grammar(tools, None, evidence=["pay PAY-1001"])
    assert "PAY-1001" in closed.source and "PAY-1001" not in open_grammar.source


def test_an_answer_that_needs_a_value_nobody_gave_is_an_error() -> None:
    with pytest.raises(GrammarError, match="conversation holds none"):
        json_grammar({"type": "object", "properties": {"ref": REF}, "required": ["ref"]}, ["hello"])
    assert json_grammar({"type": "object"}, ["hello"]) == json_grammar({"type": "object"})
