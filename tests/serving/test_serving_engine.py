"""ContractEngine: rendered by the contract, drawn under the grammar, parsed by the contract; nothing half-valid passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from posttrain.contract import MalformedCall, parse_turn
from posttrain.data.records import Message, StopReason, ToolCall, ToolSpec
from posttrain.errors import ContractError, DataError, GrammarError, PosttrainError
from posttrain.grammar import json_grammar, text_grammar, turn_grammar
from posttrain.sampling.protocol import Sample, SampleOptions, SampleRequest
from posttrain.serving import Completion, CompletionRequest, ContractEngine, Finish, InvalidAnswer, Prepared

END = 256
TOOL = ToolSpec(
    "cash", "Cash.", {"type": "object", "properties": {"date": {"type": "string", "format": "date"}}, "required": ["date"]}
)
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
CALL = '<tool_call>{"name":"cash","arguments":{"date":"2026-11-30"}}</tool_call>'


class ByteContract:
    """Bytes are tokens; 256 ends the turn."""

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
        if any(message.content == "unrenderable" for message in messages):
            raise ContractError("cannot be rendered", where="/somewhere")
        return list("".join([*(tool.name for tool in tools), *(message.content for message in messages)]).encode())

    def parse(self, ids: Sequence[int]) -> Message:
        return parse_turn(self.decode(ids))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token != END).decode()


class ScriptedSampler:
    """Says what the script has for a prompt; `broken` prompts fail; remembers what entered together and what was cancelled. A stream of
    its own: each answer takes one step."""

    def __init__(self, says: Callable[[str], str], stop: StopReason = StopReason.END_OF_TURN) -> None:
        self.says, self.stop, self.calls = says, stop, list[list[SampleRequest]]()
        self.cancelled, self.inside = list[int](), dict[int, SampleRequest]()

    def open(self, rows: int) -> ScriptedSampler:
        return self

    def admit(self, requests: Sequence[SampleRequest]) -> list[int]:
        start = sum(map(len, self.calls))
        self.calls.append(list(requests))
        self.inside.update(enumerate(requests, start))
        return list(range(start, start + len(requests)))

    def step(self) -> dict[int, Sample | PosttrainError]:
        done, self.inside = self.inside, {}
        return {ticket: self._one(request) for ticket, request in done.items()}

    def cancel(self, ticket: int) -> None:
        self.cancelled.append(ticket)
        del self.inside[ticket]

    def _one(self, request: SampleRequest) -> Sample | PosttrainError:
        prompt = bytes(request.prompt).decode()
        if "broken grammar" in prompt:
            return GrammarError("no token may follow", where="matcher")
        ids = (*self.says(prompt).encode(), *((END,) if self.stop is StopReason.END_OF_TURN else ()))
        return Sample(ids, (0.0,) * len(ids), (0.0,) * len(ids), (False,) * len(ids), self.stop)


def ask(text: str = "Hi", **more: object) -> CompletionRequest:
    return CompletionRequest((Message("user", text),), **more)  # type: ignore[arg-type]


def answer(says: str, request: CompletionRequest | None = None, stop: StopReason = StopReason.END_OF_TURN) -> object:
    engine = ContractEngine(ByteContract(), ScriptedSampler(lambda _prompt: says, stop), context=500)
    [result] = complete(engine, [request or ask()])
    return result


def complete(engine: ContractEngine, requests: Sequence[CompletionRequest]) -> list[object]:
    """All at once, in order."""
    prepared = [prepare(engine, request) for request in requests]
    stream = engine.open(8)
    asked = [one for one in prepared if isinstance(one, Prepared)]
    tickets = iter(stream.admit(asked) if asked else [])
    done = stream.step() if asked else {}
    return [done[next(tickets)] if isinstance(one, Prepared) else one for one in prepared]


def prepare(engine: ContractEngine, request: CompletionRequest) -> Prepared | Exception:
    try:
        return engine.prepare(request)
    except Exception as error:
        return error


def test_a_plain_answer_counts_its_tokens_end_included() -> None:
    assert answer("Hello") == Completion(Message("assistant", "Hello"), Finish.STOP, 2, 6)


def test_calls_of_offered_tools_finish_with_tool_calls() -> None:
    result = answer(f"Look.{CALL}", ask(tools=(TOOL,)))
    assert result == Completion(
        Message("assistant", "Look.", (ToolCall("call_0", "cash", '{"date":"2026-11-30"}'),)), Finish.TOOL_CALLS, 6, len(CALL) + 6
    )


@pytest.mark.parametrize(
    ("says", "tools", "why"),
    [
        ('<tool_call>{"name":"cash","arguments":{}}', (TOOL,), "not closed"),
        ('<tool_call>{"name":"cash"', (TOOL,), "not JSON"),
        ("<tool_call>nonsense</tool_call>", (TOOL,), "not JSON"),
        (CALL, (), "does not offer"),
        (CALL.replace("cash", "transfer_funds"), (TOOL,), "does not offer"),
        ("", (), "without an answer"),
        ("  \n", (TOOL,), "without an answer"),
    ],
)
def test_what_is_no_answer_and_no_valid_call_is_an_error(says: str, tools: tuple[ToolSpec, ...], why: str) -> None:
    result = answer(says, ask(tools=tools))
    assert isinstance(result, MalformedCall)
    assert why in str(result)


def test_values_that_only_look_right_are_checked_again() -> None:
    result = answer(CALL.replace("2026-11-30", "2026-02-30"), ask(tools=(TOOL,)))
    assert isinstance(result, InvalidAnswer)
    assert "2026-02-30" in str(result)
    assert isinstance(answer('{"ok":1}', ask(response_schema=SCHEMA)), InvalidAnswer)
    assert isinstance(answer("text", ask(response_schema=SCHEMA)), InvalidAnswer)
    assert isinstance(answer('{"ok":true}', ask(response_schema=SCHEMA)), Completion)


def test_an_answer_may_quote_a_calls_markers_in_its_strings() -> None:
    said = '{"ok":"write <tool_call>{} or </tool_call>"}'
    schema = {"type": "object", "properties": {"ok": {"type": "string"}}, "required": ["ok"], "additionalProperties": False}
    for tools in ((), (TOOL,)):
        assert answer(said, ask(tools=tools, response_schema=schema)).message == Message("assistant", said)  # type: ignore[attr-defined]


def test_what_is_wrong_with_an_answer_is_said_without_quoting_it() -> None:
    schema = {"anyOf": [SCHEMA, {"type": "null"}]}
    for said, secret in (('{"ok":"Jane Roe"}', "Jane Roe"), ("about Jane Roe", "Jane Roe")):
        result = answer(said, ask(response_schema=schema))
        assert isinstance(result, InvalidAnswer) and secret not in result.what


def test_a_length_stop_is_a_prefix_whose_calls_are_never_run() -> None:
    result = answer(CALL, ask(tools=(TOOL,)), StopReason.LENGTH)
    assert result == Completion(Message("assistant", CALL), Finish.LENGTH, 6, len(CALL))


def test_an_answer_that_its_grammar_closed_is_whole_and_says_that_it_was_cut() -> None:
    said = '{"a":1}'
    engine = ContractEngine(ByteContract(), ScriptedSampler(lambda _prompt: said + "\x00", StopReason.CLOSED), context=500)
    (result,) = complete(engine, [ask(response_schema={"type": "object"})])
    assert isinstance(result, Completion) and (result.message.content, result.finish) == (said, Finish.LENGTH)


def test_stop_texts_cut_the_content_and_what_follows_it() -> None:
    assert answer("one END two", ask(stop=("zzz", " END"))).message.content == "one"  # type: ignore[attr-defined]
    cut = answer(f"one END{CALL}", ask(tools=(TOOL,), stop=("END",)))
    assert cut.message == Message("assistant", "one ")  # type: ignore[attr-defined]
    assert cut.finish is Finish.STOP  # type: ignore[attr-defined]
    assert answer("one END two", ask(stop=("END",)), StopReason.LENGTH).finish is Finish.STOP  # type: ignore[attr-defined]
    assert answer(CALL, ask(tools=(TOOL,), stop=("cash",)), StopReason.LENGTH).finish is Finish.LENGTH  # type: ignore[attr-defined]


def test_requests_reach_the_sampler_with_prompt_adapter_seed_options_and_grammar() -> None:
    sampler = ScriptedSampler(lambda _prompt: '{"ok":true}')
    engine = ContractEngine(ByteContract(), sampler, context=500)
    options = SampleOptions(max_tokens=33, temperature=0.7)
    plain = ask(options=options, seed=4).on("adapter-1", "bank")
    requests = [plain, replace(plain, response_schema=SCHEMA), replace(plain, tools=(TOOL,), response_schema=SCHEMA, max_calls=1)]
    complete(engine, requests)
    [seen] = sampler.calls
    text, document, turn = text_grammar(), json_grammar(SCHEMA), turn_grammar((TOOL,), SCHEMA, max_calls=1)
    assert [request.grammar for request in seen] == [text, document, turn]
    assert seen[0] == SampleRequest(tuple(b"Hi"), 4, options, text, "adapter-1", "bank")


def test_a_prompt_that_does_not_fit_the_context_is_refused_with_both_numbers() -> None:
    result = answer("x", ask("a" * 480, options=SampleOptions(max_tokens=64)))
    assert isinstance(result, DataError)
    assert "480 tokens" in str(result)
    assert "64" in str(result)
    assert "500" in str(result)


def test_messages_that_cannot_be_rendered_are_the_requests_fault() -> None:
    result = answer("x", ask("unrenderable"))
    assert isinstance(result, DataError)
    assert "/somewhere" not in str(result)


def test_a_schema_that_cannot_be_enforced_is_named() -> None:
    assert isinstance(answer("x", ask(response_schema={"type": "nothing"})), GrammarError)


def test_errors_stay_in_their_own_place_whatever_shares_the_batch() -> None:
    sampler = ScriptedSampler(lambda prompt: f"to {prompt}")
    engine = ContractEngine(ByteContract(), sampler, context=500)
    texts = ["one", "unrenderable", "broken grammar", "two"]
    one, unrenderable, broken, two = complete(engine, [ask(text) for text in texts])
    assert one.message.content == "to one"  # type: ignore[union-attr]
    assert two.message.content == "to two"  # type: ignore[union-attr]
    assert isinstance(unrenderable, DataError)
    assert isinstance(broken, GrammarError)
    assert [len(call) for call in sampler.calls] == [3]


def test_a_fault_in_rendering_or_reading_fails_its_own_request_only() -> None:
    class Faulty(ByteContract):
        def parse(self, ids: Sequence[int]) -> Message:
            if bytes(ids[:-1]) == b"to two":
                raise RecursionError("too deep")
            return super().parse(ids)

        def prompt_ids(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
            if messages[-1].content == "three":
                raise RuntimeError("a fault of ours")
            return super().prompt_ids(messages, tools)

    engine = ContractEngine(Faulty(), ScriptedSampler(lambda prompt: f"to {prompt}"), context=500)
    found = complete(engine, [ask(text) for text in ("one", "two", "three")])
    assert [type(result) for result in found] == [Completion, RecursionError, RuntimeError]


def test_nothing_is_drawn_when_nothing_can_be() -> None:
    sampler = ScriptedSampler(lambda _prompt: "x")
    assert isinstance(complete(ContractEngine(ByteContract(), sampler, 500), [ask("unrenderable")])[0], DataError)
    assert sampler.calls == []


def test_a_cancelled_request_leaves_the_sampler_too() -> None:
    sampler = ScriptedSampler(lambda prompt: f"to {prompt}")
    engine = ContractEngine(ByteContract(), sampler, 500)
    stream = engine.open(8)
    one, two = stream.admit([engine.prepare(ask("one")), engine.prepare(ask("two"))])
    stream.cancel(one)
    assert sampler.cancelled == [one]
    assert sorted(stream.step()) == [two]
    stream.cancel(two)
    assert stream.step() == {}
