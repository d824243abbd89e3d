"""The real OpenAI client is served as its makers meant it: answers, streams, tools, schemas, errors."""

from __future__ import annotations

import openai
import pydantic
import pytest
from serving_house import House

from posttrain.contract import MalformedCall
from posttrain.data.records import Message, ToolCall
from posttrain.errors import GrammarError
from posttrain.serving import Completion, CompletionRequest, Finish, InvalidAnswer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "cash_position",
            "description": "Cash by account.",
            "parameters": {"type": "object", "properties": {"date": {"type": "string"}}, "required": ["date"]},
        },
    }
]
SCHEMA = {
    "type": "object",
    "properties": {"decision": {"enum": ["answer", "refuse"]}},
    "required": ["decision"],
    "additionalProperties": False,
}


def saying(text: str, finish: Finish = Finish.STOP, calls: tuple[ToolCall, ...] = ()) -> object:
    return lambda _request: Completion(Message("assistant", text, calls), finish, 7, 5)


CALLS = (
    ToolCall("call_0", "cash_position", '{"date":"2026-11-30"}'),
    ToolCall("call_1", "cash_position", '{"date":"2026-12-31"}'),
)


def test_an_answer_comes_from_the_tenants_own_adapter_with_its_token_counts(house: House) -> None:
    for tenant, release in house.releases.items():
        reply = house.say("Cash?", tenant)
        assert reply.choices[0].message.content == f"adapter-{release} heard: Cash?"
        assert reply.choices[0].finish_reason == "stop"
        assert reply.choices[0].message.tool_calls is None
        assert reply.model == release
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (1, 1 + reply.usage.completion_tokens)


@pytest.mark.parametrize("name", ["live/bank_A", "bank_A", "release"])
def test_a_key_may_name_its_channel_its_tenant_or_its_release(house: House, name: str) -> None:
    model = house.releases["bank_A"] if name == "release" else name
    assert house.say(model=model).model == house.releases["bank_A"]


def test_models_lists_the_keys_own(house: House) -> None:
    with house.client("retail_B") as client:
        assert [model.id for model in client.models.list()] == ["live/retail_B", house.releases["retail_B"]]


def test_a_stream_is_the_same_answer_in_pieces(house: House) -> None:
    text = "Der Saldo beträgt 1.250,40 € und 你好. " * 5
    house.engine.answer = saying(text)
    with house.client() as client:
        stream = client.chat.completions.create(model="bank_A", messages=[{"role": "user", "content": "Hi"}], stream=True)
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    assert len(chunks) > 5


def test_a_stream_ends_with_usage_when_asked(house: House) -> None:
    with house.client() as client:
        stream = client.chat.completions.create(
            model="bank_A", messages=[{"role": "user", "content": "Hi"}], stream=True, stream_options={"include_usage": True}
        )
        last = list(stream)[-1]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens == 1


def test_tool_calls_arrive_with_their_arguments_and_finish_reason(house: House) -> None:
    house.engine.answer = saying("", Finish.TOOL_CALLS, CALLS)
    choice = house.say(tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    calls = choice.message.tool_calls
    assert calls is not None
    assert [(call.function.name, call.function.arguments) for call in calls] == [(call.name, call.arguments) for call in CALLS]
    assert len({call.id for call in calls}) == 2
    assert house.engine.last.tools[0].parameters["required"] == ["date"]


def test_streamed_tool_calls_add_up_to_the_same(house: House) -> None:
    house.engine.answer = saying("Let me look.", Finish.TOOL_CALLS, CALLS)
    with (
        house.client() as client,
        client.chat.completions.stream(model="bank_A", messages=[{"role": "user", "content": "Hi"}], tools=TOOLS) as stream,
    ):
        final = stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert [(call.function.name, call.function.arguments) for call in calls] == [(call.name, call.arguments) for call in CALLS]
    assert final.choices[0].message.content == "Let me look."
    assert final.choices[0].finish_reason == "tool_calls"


def test_a_tool_loop_sends_the_clients_echo_back(house: House) -> None:
    house.engine.answer = saying("", Finish.TOOL_CALLS, CALLS[:1])
    first = house.say(tools=TOOLS).choices[0].message
    house.engine.answer = saying("Done")
    assert first.tool_calls is not None
    messages = [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": [{"type": "text", "text": "Cash"}, {"type": "text", "text": "now?"}]},
        first.model_dump(),
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": '{"cash":"12.00"}'},
    ]
    assert house.say(messages=messages, tools=TOOLS).choices[0].message.content == "Done"
    heard = house.engine.last.messages
    assert [message.role for message in heard] == ["system", "user", "assistant", "tool"]
    assert heard[1].content == "Cash\nnow?"
    assert heard[2].tool_calls[0].arguments == CALLS[0].arguments
    assert heard[3].tool_call_id == first.tool_calls[0].id


def test_tool_choice_none_hides_the_tools_and_one_call_at_a_time_is_kept(house: House) -> None:
    house.say(tools=TOOLS, tool_choice="none")
    assert house.engine.last.tools == ()
    house.say(tools=TOOLS, tool_choice="auto", parallel_tool_calls=False)
    assert house.engine.last.max_calls == 1


def test_a_json_schema_reaches_the_engine_whatever_strict_says(house: House) -> None:
    for strict in (True, False):
        house.say(response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": strict}})
        assert house.engine.last.response_schema == SCHEMA
    house.say(response_format={"type": "json_object"})
    assert house.engine.last.response_schema == {"type": "object"}
    house.say(response_format={"type": "text"})
    assert house.engine.last.response_schema is None


def test_the_clients_parse_helper_returns_the_typed_answer(house: House) -> None:
    class Decision(pydantic.BaseModel):
        decision: str

    house.engine.answer = saying('{"decision":"refuse"}')
    with house.client() as client:
        reply = client.chat.completions.parse(
            model="bank_A", messages=[{"role": "user", "content": "Pay"}], response_format=Decision
        )
    assert reply.choices[0].message.parsed == Decision(decision="refuse")


def test_sampling_options_reach_the_engine(house: House) -> None:
    house.say(max_tokens=9, temperature=0.5, top_p=0.9, seed=11, stop=["END", "\n"])
    request = house.engine.last
    assert (request.options.max_tokens, request.options.temperature, request.options.top_p) == (9, 0.5, 0.9)
    assert (request.seed, request.stop) == (11, ("END", "\n"))
    house.say(max_completion_tokens=8, stop="X", seed=-1)
    assert house.engine.last.options.max_tokens == 8
    assert house.engine.last.stop == ("X",)
    assert house.engine.last.seed == 2**63 - 1


def test_a_request_that_does_not_say_is_greedy_and_has_a_seed_of_its_own(house: House) -> None:
    house.say()
    first = house.engine.last
    house.say()
    assert first.options.temperature == 0.0
    assert first.options.max_tokens == house.limits.default_tokens
    assert first.seed != house.engine.last.seed


def test_a_length_stop_says_so(house: House) -> None:
    house.engine.answer = saying('<tool_call>{"na', Finish.LENGTH)
    choice = house.say(max_tokens=4, tools=TOOLS).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert choice.message.content == '<tool_call>{"na'


@pytest.mark.parametrize("stream", [False, True])
def test_a_malformed_call_is_an_error_and_never_an_empty_answer(house: House, stream: bool) -> None:
    house.engine.answer = lambda _request: MalformedCall("call 0 is not closed", where="assistant turn", value="secret text")
    with pytest.raises(openai.InternalServerError) as caught:
        house.say(tools=TOOLS, stream=stream)
    assert caught.value.status_code == 502
    assert caught.value.code == "malformed_tool_call"
    assert "call 0 is not closed" in str(caught.value)
    assert "secret text" not in str(caught.value)
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_an_answer_that_breaks_its_schema_is_an_error(house: House) -> None:
    house.engine.answer = lambda _request: InvalidAnswer("the model's answer breaks its schema", where="answer")
    with pytest.raises(openai.InternalServerError) as caught:
        house.say()
    assert caught.value.code == "invalid_answer"


def test_a_schema_that_cannot_be_enforced_is_the_callers_error(house: House) -> None:
    house.engine.answer = lambda _request: GrammarError("cannot be enforced: uniqueItems", where="schema")
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        house.say()
    assert caught.value.code == "unsupported_schema"


def test_a_broken_engine_fails_its_request_and_serves_the_next(house: House) -> None:
    def broken(_request: CompletionRequest) -> Completion:
        raise ZeroDivisionError("a secret of the inside")

    before, house.engine.answer = house.engine.answer, broken
    with pytest.raises(openai.InternalServerError) as caught:
        house.say()
    assert "secret" not in str(caught.value)
    house.engine.answer = before
    assert house.say().choices[0].finish_reason == "stop"
