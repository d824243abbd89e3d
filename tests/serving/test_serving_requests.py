"""What would be ignored is refused, and every refusal names the part and the remedy."""

from __future__ import annotations

import json
from contextlib import suppress

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_house import House

from posttrain.errors import DataError
from posttrain.serving import Limits
from posttrain.serving.replies import Failure
from posttrain.serving.requests import BadRequest, parse_chat

USER = [{"role": "user", "content": "Hi"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ECHO = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}
RESULT = {"role": "tool", "content": "x", "tool_call_id": "c"}


def parse(**fields: object) -> object:
    return parse_chat(json.dumps({"model": "m", "messages": USER, **fields}).encode(), Limits(max_tokens=100))


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"n": 2}, "n", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"temprature": 1}, "temprature", "did you mean temperature"),
        ({"zzz": 1}, "zzz", "leave it out"),
        ({"max_tokens": 101}, "max_tokens", "at most 100"),
        ({"max_completion_tokens": 101}, "max_completion_tokens", "at most 100"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "empty stop"),
        ({"tool_choice": "required"}, "tool_choice", "'none' or 'auto'"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name", "empty"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools", "two tools share a name"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_object"),
        ({"messages": []}, "messages", "nothing to answer"),
        ({"messages": "Hi"}, "messages", "valid list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "use one of system, user"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "text parts only"),
        ({"messages": [*USER, {"role": "system", "content": "x"}]}, "messages[1].role", "at the start"),
        ({"messages": [*USER, {"role": "assistant", "content": "x"}]}, "messages", "end with a user"),
        ({"messages": [*USER, {"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[1]", "answers no call"),
        ({"messages": [{**USER[0], "tool_calls": [CALL]}]}, "messages[0].tool_calls", "only an assistant"),
        ({"messages": [*USER, ECHO, RESULT], "tools": [{"function": {"name": "g"}}]}, "messages[1].tool_calls", "offered: g"),
    ],
)  # fmt: skip
def test_a_bad_part_is_named(fields: dict[str, object], param: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(**fields)
    failure = Failure.of(caught.value)
    assert (failure.status, failure.type, failure.param) == (400, "invalid_request_error", param)
    assert says in failure.message


@pytest.mark.parametrize("arguments", ["{", "[]", "5"])
def test_an_echoed_call_needs_object_arguments(arguments: str) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(DataError, match=r"messages\[1\]\.tool_calls\[0\]\.arguments"):
        parse(messages=[*USER, {**ECHO, "tool_calls": [call]}, RESULT])


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff", b'"text"', b"[" * 100_000, b"null", b'{"n":NaN}', b'{"model":"\\ud800"}', b'{"\\udfff":1}'],
)
def test_a_body_that_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest, match=r"body|surrogate"):
        parse_chat(data, Limits())


def test_a_schema_nested_without_end_is_refused() -> None:
    schema: dict[str, object] = {}
    for _ in range(100):
        schema = {"not": schema}
    with pytest.raises(BadRequest, match="nested too deeply"):
        parse(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})


def test_parameters_that_ask_for_nothing_pass() -> None:
    parse(
        n=1,
        logprobs=False,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        store=False,
        user="u",
        metadata={"a": "b"},
        seed=None,
    )


def test_developer_is_system_and_unknown_message_fields_are_echoes() -> None:
    chat = parse(
        messages=[{"role": "developer", "content": "Be exact."}, {**USER[0], "refusal": None, "annotations": [], "name": "ann"}]
    )
    assert [message.role for message in chat.completion.messages] == ["system", "user"]  # type: ignore[attr-defined]


def test_a_tool_without_parameters_takes_none() -> None:
    chat = parse(tools=[{"type": "function", "function": {"name": "f"}}])
    assert chat.completion.tools[0].parameters == {"type": "object"}  # type: ignore[attr-defined]


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_any_json_gives_a_request_or_a_data_error(value: object) -> None:
    for body in (
        value,
        {"model": "m", "messages": value},
        {"model": "m", "messages": USER, "tools": value},
        {"response_format": value},
    ):
        with suppress(DataError):
            parse_chat(json.dumps(body).encode(), Limits())


def post(house: House, **more: object) -> httpx.Response:
    headers = {"authorization": f"Bearer {house.keys['bank_A']}"}
    return httpx.post(f"{house.url}/v1/chat/completions", **{"headers": headers, "timeout": 20, **more})  # type: ignore[arg-type]


def test_errors_have_openais_shape(house: House) -> None:
    reply = post(house, json={"model": "bank_A", "messages": USER, "n": 3})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", "n")


def test_an_oversize_body_is_refused_by_its_header_and_by_its_bytes(house: House) -> None:
    big = b"x" * (house.limits.body + 1)

    def chunks() -> object:
        for start in range(0, len(big), 1 << 16):
            yield big[start : start + (1 << 16)]

    for content in (big, chunks()):
        reply = post(house, content=content)
        assert reply.status_code == 413
        assert reply.json()["error"]["code"] == "request_too_large"
    assert [line["decision"] for line in house.lines(2)] == ["rejected", "rejected"]
    assert house.engine.batches == []


def test_unknown_paths_and_methods_answer_in_the_same_shape(house: House) -> None:
    for reply, status in ((httpx.get(f"{house.url}/v1/nothing"), 404), (httpx.get(f"{house.url}/v1/chat/completions"), 405)):
        assert reply.status_code == status
        assert "/v1/chat/completions" in reply.json()["error"]["message"]
