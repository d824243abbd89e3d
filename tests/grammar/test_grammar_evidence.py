"""Grounded values: what a call or an answer may name is what the conversation holds."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Mapping
from typing import Any

import jsonschema_rs
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.records import Message, ToolSpec
from posttrain.errors import GrammarError
from posttrain.grammar import json_grammar, needs_user, only_said, shown, turn_grammar
from posttrain.grammar.evidence import Evidence, bound, bound_tools, whole_words
from posttrain.grammar.months import months
from posttrain.worlds.finance_ops.answers import SCHEMA
from posttrain.worlds.finance_ops.toolspecs import TOOLS

REF = {"type": "string", "pattern": "^[A-Z]{2,4}-[0-9]{3,6}$", "x-grounded": True}
PERIOD = {"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])$", "x-grounded": True}
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


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("the budget of May 2026", ["2026-05"]),
        ("Sept. 2026 or DECEMBER, 2027", ["2026-09", "2027-12"]),
        ("due 14 May 2026, or May 14th, 2026", ["2026-05"]),
        ("2026 March", ["2026-03"]),
        ("for 05/2026, 7/2026 and 08.2026", ["2026-05", "2026-07", "2026-08"]),
        ("14-May-2026, Jun/2026, Sep.2026, May2027", ["2026-05", "2026-06", "2026-09", "2027-05"]),
        ("April and May 2026", ["2026-04", "2026-05"]),
        ("Jan–Mar 2026", ["2026-01", "2026-03"]),
        ("2026.05.14", ["2026-05"]),
        ("rate 7.2026, EUR/USD 1.2034, 2026.10, 2026.5%", None),
        ("\u017fep 2026, M\u00e4rz 2026", None),
        ("2026/5, then 2027-11", ["2027-11", "2026-05"]),
        ('{"due":"2026-05-14","ref":"JE-2027"}', ["2026-05"]),
        ("am 14.05.2026", ["2026-05"]),
        ("on 04/05/2026", ["2026-05", "2026-04"]),  # either reading
        ("2026年5月的账单", ["2026-05"]),
        ("the bills of last month, and of May", None),
        ("in 2026, may we pay?", None),
        ("INV-2026-05 of 13/2026", None),
        ("20260514 or 1.052026", None),
    ],
)
def test_months_are_read_as_people_write_them(text: str, named: list[str] | None) -> None:
    found = values(PERIOD, text)
    assert (None if found is None else sorted(found)) == (None if named is None else sorted(named))


@pytest.mark.parametrize("form", ["^[A-Z0-9-]{6,12}$", r"^\d{4}-\d{2}$", "^[0-9-]{5,12}$"])
def test_a_month_is_evidence_for_months_alone(form: str) -> None:
    assert values({"type": "string", "pattern": form, "x-grounded": True}, "of 14 May 2026") is None


@given(st.text(alphabet="masy\u017fep 2026-05/.,年月th", max_size=60))
def test_any_text_is_read_and_a_month_has_its_form(text: str) -> None:
    assert all(re.fullmatch(r"(19|20)\d\d-(0[1-9]|1[0-2])", month) for month in months(text))


def test_a_long_text_is_read_for_months_at_once() -> None:
    start = time.thread_time()
    assert set(months("may " * 50_000 + " " * 50_000 + "may 2026")) == {"2026-05"}
    assert time.thread_time() - start < 5


def test_a_period_that_nobody_named_cannot_be_written() -> None:
    (query,) = bound_tools([tool for tool in TOOLS if tool.name == "query_erp"], ["system", "which bills has Ash & Co sent?"])
    assert query.parameters["properties"]["period"] is False
    names = {tool.name for tool in bound_tools(TOOLS, ["is Campus Events over its budget?"])}
    assert "budget_status" not in names and "search_policy" in names


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
    found = bound(REF, shown(conversation))
    assert found is not None and found["enum"] == ["PAY-1001", "PAY-3003"]


SAID = {**AMOUNT, "x-grounded": "user"}
TALK = [
    Message("system", "amounts like 9.99"),
    Message("user", "pay 1,250.40 for PAY-1001"),
    Message("assistant", "20.00"),
    Message("tool", '{"amount":"777.00","memo":"pay 888.00"}'),
]


def test_what_only_the_user_may_give_comes_from_no_other_message() -> None:
    everything, said = (bound(schema, shown(TALK)) for schema in (AMOUNT, SAID))
    assert everything is not None and set(everything["enum"]) == {"9.99", "1250.40", "777.00", "888.00"}
    assert said is not None and said["enum"] == ["1250.40"]
    assert bound(SAID, shown(TALK[2:])) is None
    assert values(SAID, "1.00") == ["1.00"]  # texts of which nobody knows who said them


def test_a_tool_that_needs_the_users_word_cannot_be_called_on_a_tools() -> None:
    tools = (tool("pay", ref=REF, amount=SAID), tool("read", ref=REF))
    asked = [Message("user", "how is PAY-1001?"), *TALK[2:]]
    assert [found.name for found in bound_tools(tools, shown(asked))] == ["read"]
    assert [found.name for found in bound_tools(tools, shown([*asked, Message("user", "pay 777.00")]))] == ["pay", "read"]


def test_the_executor_asks_for_the_users_word_and_leaves_other_values_open() -> None:
    pay = tool("pay", ref=REF, amount=SAID)
    assert needs_user(pay.parameters) and not needs_user(tool("read", ref=REF).parameters)
    parameters = only_said(pay, TALK)
    assert parameters is not None
    assert jsonschema_rs.is_valid(dict(parameters), {"ref": "PAY-4444", "amount": "1250.40"})
    assert not jsonschema_rs.is_valid(dict(parameters), {"ref": "PAY-1001", "amount": "777.00"})
    assert only_said(pay, TALK[2:]) is None


def test_a_long_message_loses_nothing_that_the_user_may_give() -> None:
    payee = {"type": "string", "maxLength": 60, "x-grounded": "user"}
    talk = [Message("user", f"pay 500 to Acme, the fee is 12.50. {' '.join(f'word{n}' for n in range(200))}")]
    found = bound(payee, shown(talk))
    assert found is not None and "Acme" in found["enum"]
    anybodys = values({**payee, "x-grounded": True}, talk[0].content)
    assert anybodys is not None and "Acme" not in anybodys  # of those the last ones win
    pay = tool("pay", to=payee, amount=SAID)
    parameters = only_said(pay, [Message("user", f"{talk[0].content} {'many more words ' * 2000}")])
    assert parameters is not None and jsonschema_rs.is_valid(dict(parameters), {"to": "Acme", "amount": "500.00"})


@pytest.mark.parametrize(
    ("text", "amounts"),
    [
        ("pay 5,000 to them, the fee is 12.50", {"5000.00", "12.50"}),
        ("5,000, please", {"5000.00"}),
        ("PAY-5000 in 2026-03", None),
    ],
)
def test_a_fee_with_cents_does_not_hide_the_amount_to_pay(text: str, amounts: set[str] | None) -> None:
    found = values(SAID, text)
    assert (None if found is None else set(found)) == amounts


def test_an_executor_refuses_a_keyword_that_nobody_knows() -> None:
    pay = tool("pay", amount={**AMOUNT, "x-grounded": "User"})
    assert needs_user(pay.parameters)
    with pytest.raises(GrammarError, match="cannot be read"):
        only_said(pay, TALK)


@pytest.mark.parametrize("word", ["usr", "User", 1, None, {"by": "user"}])
def test_a_keyword_that_says_nothing_known_is_an_error_and_not_a_guess(word: Any) -> None:
    with pytest.raises(GrammarError, match=r'x-grounded cannot be read.*write true, "user"'):
        bound(obj(amount={**AMOUNT, "x-grounded": word}), ["1.00"])


def test_what_cannot_be_grounded_is_left_out() -> None:
    schema = {
        "type": "object",
        "properties": {"ref": REF, "amount": AMOUNT, "figures": {"type": "array", "items": AMOUNT, "maxItems": 3}},
        "required": ["ref"],
    }
    assert bound(schema, ["nothing"]) is None
    found = bound(schema, ["PAY-1001"])
    assert found is not None
    assert jsonschema_rs.is_valid(found, {"ref": "PAY-1001", "figures": []})
    assert not jsonschema_rs.is_valid(found, {"ref": "PAY-1001", "figures": ["20.00"]})
    assert not jsonschema_rs.is_valid(found, {"ref": "PAY-1001", "amount": "20.00"})  # nor as an additional property
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


# -- schemas as Pydantic and others write them ---------------------------------------------------------------------------

PAYMENT = {"type": "object", "properties": {"ref": REF}, "required": ["ref"]}
POINTER = {"$ref": "#/$defs/Payment"}
NULL = {"type": "null"}
INNER = {"type": "object", "properties": {"payment": POINTER}, "required": ["payment"]}


def obj(required: bool = True, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties) if required else []}


def invent(value: Any) -> Any:
    """The same value with another reference."""
    return json.loads(json.dumps(value).replace("PAY-1001", "PAY-9999"))


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (obj(payment=POINTER), {"payment": {"ref": "PAY-1001"}}),
        (obj(payments={"type": "array", "items": POINTER, "minItems": 1}), {"payments": [{"ref": "PAY-1001"}]}),
        (obj(payment={"allOf": [POINTER]}), {"payment": {"ref": "PAY-1001"}}),
        (obj(ref={"oneOf": [REF, PAYMENT]}), {"ref": "PAY-1001"}),
        (obj(pair={"type": "array", "prefixItems": [REF, {"type": "integer"}]}), {"pair": ["PAY-1001", 1]}),
        (POINTER, {"ref": "PAY-1001"}),
        (obj(inner={"$ref": "#/$defs/Inner"}), {"inner": {"payment": {"ref": "PAY-1001"}}}),
        (obj(tree={"$ref": "#/$defs/Tree"}), {"tree": {"below": [{"below": {"ref": "PAY-1001"}}]}}),
    ],
)
def test_a_grounded_string_is_closed_wherever_it_stands(schema: dict[str, Any], value: Any) -> None:
    tree = obj(below={"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/Tree"}, "minItems": 1}, POINTER]})
    schema = {**schema, "$defs": {"Inner": INNER, "Tree": tree, "Payment": PAYMENT}}
    found = bound(schema, ["pay PAY-1001"])
    assert found is not None
    assert jsonschema_rs.is_valid(found, value) and not jsonschema_rs.is_valid(found, invent(value))
    assert bound(schema, ["nothing"]) is None
    json_grammar(schema, ["pay PAY-1001"])


@pytest.mark.parametrize(
    ("inner", "value", "without"),
    [
        ({"anyOf": [POINTER, NULL]}, {"a": {"ref": "PAY-1001"}}, {"a": None}),
        ({"anyOf": [REF, NULL]}, {"a": "PAY-1001"}, {"a": None}),
        ({"type": "object", "additionalProperties": REF}, {"a": {"x": "PAY-1001"}}, {"a": {}}),
        ({"type": "object", "patternProperties": {"^x": REF}}, {"a": {"x": "PAY-1001"}}, {"a": {}}),
        (obj(False, payment=POINTER), {"a": {"payment": {"ref": "PAY-1001"}}}, {"a": {}}),
        ({"$ref": "#/properties/b"}, {"a": {"ref": "PAY-1001"}, "b": {"ref": "PAY-1001"}}, None),
        ({"$ref": "#/definitions/a~1b%20c"}, {"a": "PAY-1001"}, None),
    ],
)
def test_a_part_without_evidence_is_not_written(inner: dict[str, Any], value: Any, without: Any) -> None:
    schema = {**obj(a=inner), "$defs": {"Payment": PAYMENT}, "definitions": {"a/b c": REF}}
    schema["properties"]["b"] = POINTER
    found, empty = bound(schema, ["pay PAY-1001"]), bound(schema, ["nothing"])
    assert jsonschema_rs.is_valid(found, value) and not jsonschema_rs.is_valid(found, invent(value))
    if empty is not None:
        assert not jsonschema_rs.is_valid(empty, value)
        assert without is None or jsonschema_rs.is_valid(empty, without)
    if without is not None:
        json_grammar(schema, ["nothing"])


@pytest.mark.parametrize(
    "part",
    [
        {"not": REF},
        {"if": REF, "then": {}},
        {"contains": REF},
        {"propertyNames": REF},
        {"dependentSchemas": {"a": PAYMENT}},
        {"items": [REF]},
        {"x-parts": {"ref": REF}},
    ],
)
def test_a_grounded_string_where_it_cannot_be_enforced_is_an_error_that_names_the_place(part: dict[str, Any]) -> None:
    keyword = list(part)[-1] if "then" not in part else "if"
    draft = {"$schema": "http://json-schema.org/draft-07/schema#"}  # items may be a list there
    tools = (ToolSpec("pay", "", {**obj(a=part), **draft}),)
    with pytest.raises(GrammarError, match=f"tool pay#/properties/a/{keyword}.*cannot be enforced"):
        turn_grammar(tools, None, evidence=["PAY-1001"])


def test_definitions_that_lead_too_far_into_each_other_are_an_error() -> None:
    chain = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(100)}
    with pytest.raises(GrammarError, match="too far"):
        bound({"$ref": "#/$defs/d0", "$defs": {**chain, "d100": REF}}, ["PAY-1001"])


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = REF
    for _ in range(depth):
        schema = obj(a=schema)
    return schema


MALFORMED = [
    {"required": 5},
    {"properties": [REF]},
    {"enum": 5},
    {"items": 3},
    {"anyOf": REF},
    {"properties": {"a": 3}},
    {"$ref": ["x"]},
    {"$defs": 5},
    {"minItems": "many"},
    {"maxLength": "long"},
    {"pattern": 5},
    {"pattern": "("},
    {"const": float("nan")},
    nested(2000),
]


@pytest.mark.parametrize("part", MALFORMED, ids=lambda part: next(iter(part)))
@pytest.mark.parametrize("grounded", [False, True])
def test_a_malformed_schema_is_refused_as_such(part: dict[str, Any], grounded: bool) -> None:
    schema = obj(a={"type": "string", **part, **({"x-grounded": True} if grounded else {})}, ref=REF)
    with pytest.raises(GrammarError, match="is not a JSON Schema"):
        turn_grammar((ToolSpec("pay", "", schema),), None, evidence=["PAY-1001"])
    with pytest.raises(GrammarError, match="is not a JSON Schema"):
        turn_grammar((), schema, evidence=["PAY-1001"])
    with pytest.raises(GrammarError, match="is not a JSON Schema"):
        json_grammar(schema, ["PAY-1001"])


@pytest.mark.parametrize("part", MALFORMED[:-1], ids=lambda part: next(iter(part)))
def test_what_an_older_draft_leaves_unchecked_raises_nothing_else(part: dict[str, Any]) -> None:
    draft = {"$schema": "http://json-schema.org/draft-04/schema#"}
    with contextlib.suppress(GrammarError):
        json_grammar({**draft, **obj(ref=REF), "$defs": {"a": part}}, ["PAY-1001"])


# -- patterns come from clients ------------------------------------------------------------------------------------------


def test_a_pattern_that_never_ends_is_refused_within_the_budget_of_its_request() -> None:
    slow = {f"a{n}": {"type": "string", "pattern": f"^b{{0,{n}}}(a|a)+$", "x-grounded": True} for n in range(8)}
    start = time.process_time()
    with pytest.raises(GrammarError, match=r"a0.*takes too long.*\(a\|a\).*nested repetitions"):
        bound(obj(False, **slow), Evidence(["a" * 60 + "_"], seconds=0.05))
    seen = Evidence(["a" * 60 + "_"], seconds=0.05)
    for name, schema in slow.items():  # what one has spent, the next cannot spend again
        with pytest.raises(GrammarError, match="takes too long"):
            bound(obj(**{name: schema}), seen)
    assert time.process_time() - start < 0.5


def test_other_threads_run_while_a_pattern_is_searched_for() -> None:
    beats, done = [0.0], threading.Event()

    def beat() -> None:
        while not done.wait(0.002):
            beats.append(time.perf_counter())

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(GrammarError, match="takes too long"):
        bound({"type": "string", "pattern": "^(a|a)+$", "x-grounded": True}, Evidence(["a" * 60 + "_"], seconds=0.2))
    done.set()
    thread.join()
    assert len(beats) > 10


@pytest.mark.parametrize("pattern", ["(?P<x>a)(?P=y)", "a\\$", "(", "x" * 3000])
def test_a_pattern_that_cannot_be_searched_for_is_an_error_that_names_it(pattern: str) -> None:
    with pytest.raises(GrammarError, match=r"schema#/properties/a: .*cannot be searched for.*got '.*correct the pattern"):
        bound(obj(a={"type": "string", "pattern": pattern, "x-grounded": True}), ["a"])


def patterns(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        own = {value["pattern"]} if isinstance(value.get("pattern"), str) else set()
        return own.union(*(patterns(inner) for inner in value.values()))
    return set().union(*(patterns(inner) for inner in value)) if isinstance(value, list) else set()


OURS = sorted(patterns(SCHEMA).union(*(patterns(tool.parameters) for tool in TOOLS)))
WORDS = [
    "PAY-1001",
    "JE-60",
    "DRAFT-123456",
    "-20.00",
    "1,250.40",
    "5,000",
    "none",
    "2029-10",
    "20.00.1",
    "APT-1234B",
    "支付12.50元",
]


@settings(max_examples=40)
@given(st.lists(st.sampled_from(WORDS) | st.text("A-1.,0 \n٣é", max_size=6), max_size=12).map("".join) | st.just(" ".join(WORDS)))
def test_the_worlds_patterns_find_what_the_standard_library_finds(text: str) -> None:
    assert len(OURS) >= 8
    for pattern in OURS:
        whole = whole_words(pattern)
        assert [m.group() for m in regex.finditer(whole, text)] == [m.group() for m in re.finditer(whole, text)]


def test_a_value_deep_in_a_result_is_found() -> None:
    name = {"type": "string", "x-grounded": True}
    assert values(name, '{"a":["x",{"b":"y"}],"c":"z"}') == ["x", "y", "z"]
