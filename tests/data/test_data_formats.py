from __future__ import annotations

import json
from typing import Any

import pytest

from posttrain.data import Conversation, Defaults, Format, Message, Preference, Shape, Task, ToolCall, ToolSpec, detect
from posttrain.data.fields import Trace
from posttrain.data.formats import to_conversation, to_preference, to_task
from posttrain.errors import DataError

TOOL = {
    "name": "cash_position",
    "description": "Cash",
    "parameters": {"type": "object", "properties": {"date": {"type": "string"}}},
}
ASK = {"role": "user", "content": "How much cash?"}
ANSWER = {"role": "assistant", "content": "12.50"}


def conversation(row: dict[str, Any], trace: Trace | None = None, defaults: Defaults | None = None) -> Conversation:
    found = detect(row)
    assert found is not None
    return to_conversation(row, found, "file:1", defaults or Defaults(), trace or Trace())


def preference(row: dict[str, Any], trace: Trace | None = None) -> Preference:
    found = detect(row)
    assert found is not None
    return to_preference(row, found, "file:1", Defaults(), trace or Trace())


def task(row: dict[str, Any], defaults: Defaults | None = None, trace: Trace | None = None) -> Task:
    return to_task(row, "file:1", defaults or Defaults(), trace or Trace())


def openai_call(arguments: Any, identity: str | None = "c1") -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "cash_position", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call if identity is None else {"id": identity, **call}]}


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": []}, Format.OPENAI_MESSAGES),
        ({"prompt": "", "completion": ""}, Format.TRL_PROMPT_COMPLETION),
        ({"prompt": "", "chosen": "", "rejected": ""}, Format.TRL_PREFERENCE),
        ({"chosen": [], "rejected": []}, Format.TRL_PREFERENCE),
        ({"conversations": []}, Format.SHAREGPT),
        ({"conversations": [], "chosen": {}, "rejected": {}}, Format.SHAREGPT_PREFERENCE),
        ({"instruction": "", "output": ""}, Format.ALPACA),
        ({"instruction": "", "chosen": "", "rejected": ""}, Format.ALPACA_PREFERENCE),
        ({"request": ""}, Format.TASK),
        ({"text": ""}, None),
        ({"instruction": "", "instances": []}, None),
    ],
)
def test_a_format_is_told_by_the_fields_of_a_row(row: dict[str, Any], format: Format | None) -> None:
    assert detect(row) is format


def test_openai_arguments_stay_the_text_that_was_written() -> None:
    text = '{"date": "2024-03-01",  "note": "现金"}'
    record = conversation(
        {"messages": [ASK, openai_call(text), {"role": "tool", "tool_call_id": "c1", "content": "12.50"}, ANSWER],
         "tools": [{"type": "function", "function": TOOL}]}
    )  # fmt: skip
    assert record.messages[1] == Message("assistant", "", (ToolCall("c1", "cash_position", text),))
    assert record.messages[2] == Message("tool", "12.50", (), "c1")
    assert record.tools == (ToolSpec("cash_position", "Cash", TOOL["parameters"]),)
    assert record.shape is Shape.TOOL_TRAJECTORY


def test_trl_arguments_become_compact_text_and_calls_get_ids() -> None:
    trace = Trace()
    record = conversation(
        {"messages": [ASK, openai_call({"date": "三月", "n": 1}, None), {"role": "tool", "content": "x"}, ANSWER]}, trace
    )
    assert record.messages[1].tool_calls == (ToolCall("call_0", "cash_position", '{"date":"三月","n":1}'),)
    assert trace.argument_objects


def test_arguments_that_are_missing_are_an_empty_object() -> None:
    for empty in (None, "", {}):
        record = conversation({"messages": [ASK, openai_call(empty), {"role": "tool", "content": "x"}, ANSWER]})
        assert record.messages[1].tool_calls[0].arguments == "{}"


def test_a_weight_of_zero_keeps_a_turn_out_of_the_loss() -> None:
    record = conversation({"messages": [ASK, {**ANSWER, "weight": 0}, ASK, {**ANSWER, "weight": 1}]})
    assert [message.learn for message in record.messages] == [True, False, True, True]


def test_text_parts_are_joined_and_reasoning_is_left_out_and_noted() -> None:
    trace = Trace()
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    record = conversation({"messages": [ASK, {"role": "assistant", "content": parts}]}, trace)
    assert record.messages[1].content == "a\nb"
    assert trace.dropped == {"messages[].content[reasoning]"}


def test_a_developer_message_is_a_system_message() -> None:
    assert conversation({"messages": [{"role": "developer", "content": "Be brief"}, ASK, ANSWER]}).messages[0].role == "system"


def test_prompt_and_completion_learn_the_completion_only() -> None:
    record = conversation({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]})
    assert [message.learn for message in record.messages if message.role == "assistant"] == [False, True]
    assert conversation({"prompt": "q", "completion": "a"}).messages == (
        Message("user", "q", learn=False),
        Message("assistant", "a"),
    )


def test_sharegpt_calls_and_observations_become_calls_and_their_answers() -> None:
    record = conversation(
        {
            "system": "Be brief",
            "conversations": [
                {"from": "human", "value": "How much?"},
                {"from": "function_call", "value": '[{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": "{}"}]'},
                {"from": "observation", "value": "1"},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "3"},
                {"from": "human", "value": "More"},
                {"from": "function_call", "value": '{"name": "a", "arguments": {}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "5"},
            ],
            "tools": json.dumps([{"name": "a", "description": "A"}, {"name": "b", "parameters": None}]),
        }
    )
    assert [message.role for message in record.messages] == [
        "system", "user", "assistant", "tool", "tool", "assistant", "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert record.messages[2].tool_calls == (ToolCall("call_0", "a", '{"x":1}'), ToolCall("call_1", "b", "{}"))
    assert [message.tool_call_id for message in record.messages if message.role == "tool"] == ["call_0", "call_1", "call_2"]
    assert record.tools[1] == ToolSpec("b", "", {"type": "object"})


def test_alpaca_joins_instruction_and_input_and_puts_the_history_first() -> None:
    record = conversation({"instruction": "Sum", "input": "1, 2", "output": "3", "system": "s", "history": [["q", "a"]]})
    assert [(message.role, message.content) for message in record.messages] == [
        ("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "Sum\n\n1, 2"), ("assistant", "3"),
    ]  # fmt: skip
    assert record.shape is Shape.MULTI_TURN
    assert conversation({"instruction": "Sum", "output": "3"}).shape is Shape.SINGLE_TURN


def test_where_a_row_comes_from_is_carried_and_the_row_wins_over_the_defaults() -> None:
    defaults = Defaults(tenant="saas_C", source="export", licence="MIT", split="dev")
    plain = {"messages": [ASK, ANSWER]}
    record = conversation(plain, defaults=defaults)
    assert (record.id, record.tenant, record.source, record.licence, record.split) == ("file:1", "saas_C", "export", "MIT", "dev")
    own = {"id": 7, "tenant": "bank_A", "source": "s", "license": "CC0", "split": "train", "shape": "safety_style"}
    record = conversation({**plain, **own}, defaults=defaults)
    assert (record.id, record.tenant, record.source, record.licence, record.split) == ("7", "bank_A", "s", "CC0", "train")
    assert record.shape is Shape.SAFETY_STYLE
    assert conversation({**plain, "slice": "safety_style"}).shape is Shape.SAFETY_STYLE


def test_fields_that_have_no_place_are_noted_and_nulls_are_not() -> None:
    trace = Trace()
    row = {"messages": [{**ASK, "name": "Ann"}, {**ANSWER, "audio": None}], "score": 3, "extra": None, "slice": "hard"}
    conversation(row, trace)
    assert trace.dropped == {"messages[].name", "score", "slice"}


def test_a_text_pair_and_a_message_pair_are_the_same_preference() -> None:
    text = preference({"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert text.prompt == (Message("user", "q"),)
    assert text.chosen == (Message("assistant", "good"),)
    listed = {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": {"role": "assistant", "content": "bad"},
    }
    assert preference(listed) == text


def test_a_pair_without_a_prompt_is_split_where_its_sides_part() -> None:
    sides = {key: [ASK, ANSWER, ASK, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    record = preference(sides)
    assert len(record.prompt) == 3
    assert (record.chosen[0].content, record.rejected[0].content) == ("chosen", "rejected")


def test_sharegpt_and_alpaca_pairs_are_preferences() -> None:
    shared = {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
              "rejected": {"from": "gpt", "value": "bad"}, "system": "s"}  # fmt: skip
    assert [message.role for message in preference(shared).prompt] == ["system", "user"]
    alpaca = preference({"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"})
    assert alpaca.prompt == (Message("user", "q"),)
    assert alpaca.rejected == (Message("assistant", "bad"),)


def test_a_rejected_side_may_call_what_is_not_offered_but_a_chosen_one_may_not() -> None:
    good, wrong = openai_call("{}"), openai_call("{}")
    wrong["tool_calls"][0]["function"] = {"name": "transfer_funds", "arguments": "{}"}
    row = {"prompt": "q", "chosen": [good], "rejected": [wrong], "tools": [TOOL]}
    assert preference(row).rejected[0].tool_calls[0].name == "transfer_funds"
    with pytest.raises(DataError, match="not offered"):
        preference({**row, "chosen": [wrong], "rejected": [good]})


def test_a_task_may_be_a_request_with_what_is_expected() -> None:
    record = task({"request": "Pay it", "tenant": "bank_A", "high_risk": True, "expected": {"refusal": True}})
    assert record == Task("file:1", (Message("user", "Pay it"),), tenant="bank_A", arguments={"refusal": True}, high_risk=True)
    assert (record.verifier, record.max_turns, record.split) == ("expected", 4, "test")


def test_a_task_may_name_its_verifier_and_its_tools() -> None:
    catalogue = {"cash_position": ToolSpec("cash_position", "Cash", {"type": "object"})}
    row = {"id": "t", "messages": [ASK], "tools": ["cash_position"], "verifier": "reconcile", "arguments": {"entry": 3},
           "environment": {"world": "w", "seed": 1}, "response_schema": {"type": "object"}, "max_turns": 2, "kind": "cash"}  # fmt: skip
    record = task(row, Defaults(catalogue=catalogue))
    assert record.tools == (catalogue["cash_position"],)
    assert (record.verifier, record.arguments, record.kind) == ("reconcile", {"entry": 3}, "cash")
    assert task({**row, "tools": [TOOL]}).tools[0].description == "Cash"
    with pytest.raises(DataError, match="did you mean cash_position"):
        task({**row, "tools": ["cash_positon"]}, Defaults(catalogue=catalogue))


def test_a_task_may_show_how_it_is_solved() -> None:
    result = {"role": "tool", "content": "{}", "tool_call_id": "c1"}
    shown = task({"request": "q", "tools": [TOOL], "demonstration": [openai_call("{}"), result, ANSWER]}).demonstration
    assert [message.role for message in shown] == ["assistant", "tool", "assistant"]
    assert shown[0].tool_calls[0].name == "cash_position"


def test_a_misspelt_field_of_a_task_is_refused_and_a_foreign_one_is_noted() -> None:
    with pytest.raises(DataError, match="did you mean high_risk"):
        task({"request": "q", "highrisk": True})
    trace = Trace()
    task({"request": "q", "difficulty": 3}, trace=trace)
    assert trace.dropped == {"difficulty"}


BAD_CONVERSATIONS: list[tuple[dict[str, Any], str]] = [
    ({"messages": "hi"}, r"messages: must be a list"),
    ({"messages": []}, r"messages: no assistant turn"),
    ({"messages": [ASK]}, r"messages: no assistant turn"),
    ({"messages": [ASK, {**ANSWER, "weight": 0}]}, r"no assistant turn"),
    ({"messages": [ASK, "hi"]}, r"messages\[1\]: must be an object"),
    ({"messages": [ASK, {"role": "bot", "content": "x"}]}, r"messages\[1\].role: is no known role; got 'bot'"),
    ({"messages": [ASK, {"role": "assistant", "content": None}]}, r"messages\[1\].content: must be text"),
    ({"messages": [ASK, {"role": "assistant", "content": ""}]}, r"messages\[1\]: an assistant turn without text"),
    ({"messages": [ASK, {**ANSWER, "weight": 2}]}, r"messages\[1\].weight: must be 0"),
    ({"messages": [ASK, ANSWER, {"role": "system", "content": "x"}, ANSWER]}, r"messages\[2\].role: a system message after"),
    ({"messages": [ASK, ANSWER, {"role": "tool", "content": "x"}]}, r"messages\[2\]: a tool result that answers no call"),
    (
        {"messages": [ASK, openai_call("{}"), {"role": "tool", "content": "x", "tool_call_id": "c2"}, ANSWER]},
        r"tool_call_id: answers",
    ),
    ({"messages": [{**ASK, "tool_calls": openai_call("{}")["tool_calls"]}, ANSWER]}, r"only an assistant calls tools"),
    ({"messages": [ASK, openai_call("{not json")]}, r"tool_calls\[0\].arguments: is text that is not JSON"),
    ({"messages": [ASK, openai_call("[1]")]}, r"tool_calls\[0\].arguments: must be an object"),
    ({"messages": [ASK, openai_call({"x": float("nan")})]}, r"arguments: has no JSON form"),
    (
        {"messages": [ASK, openai_call("{}")], "tools": [{"name": "other"}]},
        r"calls a tool that is not offered; got 'cash_position'",
    ),
    (
        {"messages": [ASK, {"role": "assistant", "content": [{"type": "image_url"}]}]},
        r"content\[0\].type: a content part that is not text",
    ),
    ({"messages": [ASK, ANSWER], "tools": [TOOL, TOOL]}, r"tools: two tools share a name"),
    ({"messages": [ASK, ANSWER], "tools": [{"name": ""}]}, r"tools\[0\].name: is empty"),
    (
        {"messages": [ASK, ANSWER], "tools": [{**TOOL, "parameters": {"type": "dict"}}]},
        r"parameters.type: must be a JSON Schema of type",
    ),
    ({"messages": [ASK, ANSWER], "tools": "[{"}, r"tools: is text that is not JSON"),
    ({"messages": [ASK, ANSWER], "shape": "odd"}, r"shape: is no known shape"),
    ({"messages": [ASK, ANSWER], "id": ""}, r"id: is empty"),
    ({"messages": [ASK, ANSWER], "tenant": 3}, r"tenant: must be text"),
    ({"messages": [ASK, ANSWER], "label": False}, r"label: a row of unpaired preference data"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, r"conversations\[0\].from: is no known role"),
    ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "3"}]}, r"value: must be an object"),
    ({"instruction": "", "output": "x"}, r"instruction: is empty"),
    ({"instruction": "q", "output": 3}, r"output: must be text"),
    ({"instruction": "q", "output": "a", "history": [["q"]]}, r"history\[0\]: must be a question and an answer"),
]


@pytest.mark.parametrize(("row", "message"), BAD_CONVERSATIONS, ids=[message for _, message in BAD_CONVERSATIONS])
def test_a_malformed_conversation_is_refused_at_its_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        conversation(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "are the same"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt: is empty"),
        ({"prompt": "q", "chosen": [ASK], "rejected": "b"}, "chosen: must begin with an assistant turn"),
        ({"prompt": "q", "chosen": "a", "rejected": []}, "rejected: must begin with an assistant turn"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "an assistant turn without text"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "two texts without a prompt"),
    ],
)
def test_a_malformed_pair_is_refused_at_its_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        preference(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tenant": "bank_A"}, "needs either a request or messages"),
        ({"request": "q", "messages": [ASK]}, "needs either a request or messages"),
        ({"request": "  "}, "must end with what the model is to answer"),
        ({"messages": [ASK, ANSWER]}, "must end with what the model is to answer"),
        ({"request": "q", "max_turns": 0}, "max_turns: must be a whole number"),
        ({"request": "q", "max_turns": True}, "max_turns: must be a whole number"),
        ({"request": "q", "high_risk": "yes"}, "high_risk: must be true or false"),
        ({"request": "q", "expected": {}, "verifier": "reconcile"}, "expected: stands beside"),
        ({"request": "q", "expected": {}, "arguments": {}}, "expected: stands beside"),
        ({"request": "q", "response_schema": "x"}, "response_schema: must be an object"),
        ({"request": "q", "tools": ["cash_position"]}, "known tools: none"),
        ({"request": "q", "demonstration": []}, "demonstration: must begin with an assistant turn"),
        ({"request": "q", "demonstration": [ASK, ANSWER]}, "demonstration: must begin with an assistant turn"),
        ({"request": "q", "demonstration": [ANSWER, ASK, ANSWER]}, "demonstration: holds a turn of somebody else"),
        ({"request": "q", "tools": [{"name": "other"}], "demonstration": [openai_call("{}")]}, "demonstration.*not offered"),
        ({"request": "q", "demonstration": [ANSWER, {"role": "tool", "content": "x"}]}, "a tool result that answers no call"),
    ],
)
def test_a_malformed_task_is_refused_at_its_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task(row)
