"""The formats of rows and their way into Conversation, Preference and Task.

| format | fields |
|---|---|
| openai-messages | `messages` (call arguments as JSON text), `tools` |
| trl-messages | the same with call arguments as objects |
| trl-prompt-completion | `prompt`, `completion`: text or messages; only the completion is learned |
| sharegpt | `conversations` of `from`/`value` (with `function_call`, `observation`), `system`, `tools` |
| alpaca | `instruction`, `input`, `output`, `system`, `history` |
| trl-preference | `prompt`, `chosen`, `rejected`: text or messages; or two message lists that share a beginning |
| sharegpt-preference | `conversations`, `chosen`, `rejected`, `system`, `tools` |
| alpaca-preference | `instruction`, `input`, `chosen`, `rejected`, `system`, `history` |
| task | `messages` or `request`; `tools` (specifications or names); `expected`, or `verifier` with `arguments`; `kind`, \
`environment`, `response_schema`, `high_risk`, `max_turns`, `demonstration` |

Every row may carry `id` (a task must), `tenant`, `source`, `licence` (or `license`) and `split`; a conversation also `shape` (or \
`slice`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from posttrain.data.fields import Trace, fail, from_json_text, want_flag, want_list, want_object, want_text
from posttrain.data.messages import check_offered, check_turns, openai_messages, sharegpt_messages, tool_specs
from posttrain.data.records import Conversation, Message, Preference, Shape, Task, ToolSpec
from posttrain.errors import nearest


class Format(StrEnum):
    """How a file writes its rows."""

    OPENAI_MESSAGES = "openai-messages"
    TRL_MESSAGES = "trl-messages"
    TRL_PROMPT_COMPLETION = "trl-prompt-completion"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    TRL_PREFERENCE = "trl-preference"
    SHAREGPT_PREFERENCE = "sharegpt-preference"
    ALPACA_PREFERENCE = "alpaca-preference"
    TASK = "task"


CONVERSATIONS = frozenset(
    {Format.OPENAI_MESSAGES, Format.TRL_MESSAGES, Format.TRL_PROMPT_COMPLETION, Format.SHAREGPT, Format.ALPACA}
)
PREFERENCES = frozenset({Format.TRL_PREFERENCE, Format.SHAREGPT_PREFERENCE, Format.ALPACA_PREFERENCE})
TASKS = frozenset({Format.TASK})

_COMMON = frozenset({"id", "tenant", "source", "licence", "license", "split"})
_TASK_FIELDS = frozenset(
    {"id", "tenant", "split", "messages", "request", "tools", "kind", "verifier", "arguments", "expected", "environment",
     "response_schema", "high_risk", "max_turns", "demonstration"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a row gets that does not say itself. `catalogue` resolves tools that a task gives by name."""

    tenant: str | None = None
    source: str = ""
    licence: str = ""
    split: str | None = None  # None: train for conversations and preferences, test for tasks
    catalogue: Mapping[str, ToolSpec] = field(default_factory=dict)


def detect(row: Mapping[str, Any]) -> Format | None:
    """The format of one row by its fields, or None. A task is told from a conversation by the reader that is asked for tasks."""
    pair = {"chosen", "rejected"} <= row.keys()
    if "conversations" in row:
        return Format.SHAREGPT_PREFERENCE if pair else Format.SHAREGPT
    if "instruction" in row and (pair or "output" in row):
        return Format.ALPACA_PREFERENCE if pair else Format.ALPACA
    if pair:
        return Format.TRL_PREFERENCE
    if {"prompt", "completion"} <= row.keys():
        return Format.TRL_PROMPT_COMPLETION
    if "messages" in row:
        return Format.OPENAI_MESSAGES
    return Format.TASK if "request" in row else None


def to_conversation(row: Mapping[str, Any], format: Format, identity: str, defaults: Defaults, trace: Trace) -> Conversation:
    """One row of a conversation format. Raises DataError whose place is the field."""
    known = _COMMON | {"shape", "slice", "tools"}
    if format is Format.ALPACA:
        messages, known = _alpaca(row, trace), known | {"instruction", "input", "output", "system", "history"}
    elif format is Format.SHAREGPT:
        messages, known = _sharegpt(row, trace), known | {"conversations", "system"}
    elif format is Format.TRL_PROMPT_COMPLETION:
        prompt = tuple(replace(message, learn=False) for message in _side(row, "prompt", "user", trace))
        messages, known = prompt + _side(row, "completion", "assistant", trace), known | {"prompt", "completion"}
    else:
        messages, known = openai_messages(row.get("messages"), "messages", trace), known | {"messages"}
    _refuse_unpaired(row)
    tools = tool_specs(row.get("tools"), "tools", trace)
    check_turns(messages, "messages")
    check_offered(messages, tools, "messages")
    if not any(message.role == "assistant" and message.learn for message in messages):
        fail("no assistant turn to learn from", "messages", remedy="add one, or remove the row")
    shape, used = _shape(row, messages, tools)
    trace.drop(row, (known - {"slice"}) | used)
    return Conversation(messages=messages, tools=tools, shape=shape, **_carried(row, identity, defaults, "train"))


def to_preference(row: Mapping[str, Any], format: Format, identity: str, defaults: Defaults, trace: Trace) -> Preference:
    """One row of a preference format. Raises DataError whose place is the field."""
    known = _COMMON | {"tools", "chosen", "rejected"}
    if format is Format.SHAREGPT_PREFERENCE:
        prompt, known = _sharegpt(row, trace), known | {"conversations", "system"}
        chosen, rejected = (
            sharegpt_messages(row[key] if isinstance(row[key], list) else [row[key]], key, trace)
            for key in ("chosen", "rejected")
        )
    elif format is Format.ALPACA_PREFERENCE:
        prompt, known = _alpaca(row, trace), known | {"instruction", "input", "system", "history"}
        chosen, rejected = (_side(row, key, "assistant", trace) for key in ("chosen", "rejected"))
    else:
        prompt, chosen, rejected = _trl_pair(row, trace)
        known |= {"prompt"}
    trace.drop(row, known)
    tools = tool_specs(row.get("tools"), "tools", trace)
    _check_pair(prompt, chosen, rejected)
    check_offered(chosen, tools, "chosen")  # a rejected side may well show the call of a tool that is not there
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, tools=tools, **_carried(row, identity, defaults, "train"))


def to_task(row: Mapping[str, Any], identity: str, defaults: Defaults, trace: Trace) -> Task:
    """One task. A field that looks like a misspelt one is refused: a lost `high_risk` would turn a measurement round."""
    for key in sorted(row.keys() - _TASK_FIELDS):
        if remedy := nearest(key, _TASK_FIELDS, cutoff=0.8):
            fail("is not a field of a task", key, remedy=remedy)
    trace.drop(row, _TASK_FIELDS)
    messages = _request(row, trace)
    verifier, arguments = _judge(row)
    schema, turns = row.get("response_schema"), row.get("max_turns", 4)
    if isinstance(turns, bool) or not isinstance(turns, int) or turns < 1:
        fail("must be a whole number from 1", "max_turns", value=turns, remedy="leave it out for 4")
    carried, tools = _carried(row, identity, defaults, "test"), _task_tools(row, defaults, trace)
    return Task(
        id=carried["id"], messages=messages, tools=tools, tenant=carried["tenant"],
        kind=want_text(row.get("kind", "task"), "kind"), verifier=verifier, arguments=arguments,
        environment=want_object(row.get("environment") or {}, "environment"),
        response_schema=None if schema is None else want_object(schema, "response_schema"),
        high_risk=want_flag(row.get("high_risk", False), "high_risk"), max_turns=turns, split=carried["split"],
        demonstration=_demonstration(row, messages, tools, trace),
    )  # fmt: skip


def _carried(row: Mapping[str, Any], identity: str, defaults: Defaults, split: str) -> dict[str, Any]:
    """Where a row comes from, as the row says or as the reader was told."""
    found = row.get("id")
    if isinstance(found, int) and not isinstance(found, bool):
        found = str(found)
    if found == "":
        fail("is empty", "id", remedy="leave it out, or give each row its own")
    tenant, licence = row.get("tenant"), row.get("licence", row.get("license"))
    own = row.get("split") or defaults.split or split
    return {
        "id": identity if found is None else want_text(found, "id"),
        "tenant": defaults.tenant if tenant is None else want_text(tenant, "tenant"),
        "source": want_text(row.get("source", defaults.source) or "", "source"),
        "licence": want_text(defaults.licence if licence is None else licence, "licence"),
        "split": want_text(own, "split"),
    }


def _shape(row: Mapping[str, Any], messages: tuple[Message, ...], tools: tuple[ToolSpec, ...]) -> tuple[Shape, frozenset[str]]:
    """The shape the row names, else the one its turns have; and the field it was read from."""
    if row.get("shape") is not None:
        try:
            return Shape(row["shape"]), frozenset({"shape"})
        except ValueError:
            fail("is no known shape", "shape", value=row["shape"], remedy=f"use one of {', '.join(Shape)}")
    if row.get("slice") in list(Shape):
        return Shape(row["slice"]), frozenset({"slice"})
    if tools or any(message.tool_calls for message in messages):
        return Shape.TOOL_TRAJECTORY, frozenset()
    users = sum(message.role == "user" for message in messages)
    return (Shape.MULTI_TURN if users > 1 else Shape.SINGLE_TURN), frozenset()


def _side(row: Mapping[str, Any], key: str, role: Any, trace: Trace) -> tuple[Message, ...]:
    """Text as one message of that role, or a list of messages (a single message counts as a list)."""
    value = row.get(key)
    if isinstance(value, str):
        return (Message(role, value),)
    return openai_messages([value] if isinstance(value, dict) else value, key, trace)


def _sharegpt(row: Mapping[str, Any], trace: Trace) -> tuple[Message, ...]:
    return _system(row) + sharegpt_messages(row.get("conversations"), "conversations", trace)


def _alpaca(row: Mapping[str, Any], trace: Trace) -> tuple[Message, ...]:
    messages = list(_system(row))
    for index, pair in enumerate(want_list(row.get("history") or [], "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            fail("must be a question and an answer", f"history[{index}]", value=pair, remedy="write [question, answer]")
        messages.append(Message("user", want_text(pair[0], f"history[{index}][0]")))
        messages.append(Message("assistant", want_text(pair[1], f"history[{index}][1]")))
    instruction, extra = want_text(row.get("instruction"), "instruction"), want_text(row.get("input") or "", "input")
    if not instruction and not extra:
        fail("is empty", "instruction", remedy="remove the row")
    messages.append(Message("user", "\n\n".join(text for text in (instruction, extra) if text)))
    if "chosen" not in row:
        messages.append(Message("assistant", want_text(row.get("output"), "output")))
    return tuple(messages)


def _system(row: Mapping[str, Any]) -> tuple[Message, ...]:
    text = want_text(row.get("system") or "", "system")
    return (Message("system", text),) if text else ()


def _trl_pair(row: Mapping[str, Any], trace: Trace) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    if row.get("prompt") is not None:
        prompt = _side(row, "prompt", "user", trace)
        return prompt, _side(row, "chosen", "assistant", trace), _side(row, "rejected", "assistant", trace)
    if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        fail("two texts without a prompt", "prompt", remedy="split the shared beginning off into `prompt`")
    chosen, rejected = (openai_messages(row[key], key, trace) for key in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _check_pair(prompt: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> None:
    if not prompt:
        fail("is empty", "prompt", remedy="a pair needs the request that both answers reply to")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side or side[0].role != "assistant":
            fail("must begin with an assistant turn", name, remedy="put what comes before it into `prompt`")
        check_turns(prompt + side, f"prompt+{name}")
    if chosen == rejected:
        fail("the chosen and the rejected answer are the same", "chosen", remedy="remove the row")


def _refuse_unpaired(row: Mapping[str, Any]) -> None:
    if isinstance(row.get("label"), bool):
        fail(
            "a row of unpaired preference data: its label says whether the answer is wanted", "label",
            remedy="keep the wanted rows and remove the field, or pair wanted and unwanted answers",
        )  # fmt: skip


def _request(row: Mapping[str, Any], trace: Trace) -> tuple[Message, ...]:
    if ("request" in row) == ("messages" in row):
        fail("needs either a request or messages", "request", remedy="give one of the two")
    if "request" in row:
        messages: tuple[Message, ...] = (Message("user", want_text(row["request"], "request")),)
    else:
        messages = openai_messages(row["messages"], "messages", trace)
    check_turns(messages, "messages")
    if not messages or messages[-1].role not in ("user", "tool") or not messages[-1].content.strip():
        fail("must end with what the model is to answer", "messages", remedy="end with a user message that is not empty")
    return messages


def _demonstration(
    row: Mapping[str, Any], messages: tuple[Message, ...], tools: tuple[ToolSpec, ...], trace: Trace
) -> tuple[Message, ...]:
    if row.get("demonstration") is None:
        return ()
    shown, where = openai_messages(row["demonstration"], "demonstration", trace), "demonstration"
    if not shown or shown[0].role != "assistant":
        fail("must begin with an assistant turn", where, remedy="put what comes before it into `messages`")
    if any(message.role not in ("assistant", "tool") for message in shown):
        fail("holds a turn of somebody else", where, remedy="keep the assistant's turns and the tools' results")
    check_turns(messages + shown, f"messages+{where}")
    check_offered(shown, tools, where)
    return shown


def _judge(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The verifier and what it compares with: `expected` is short for the verifier of that name."""
    verifier = want_text(row.get("verifier", "expected"), "verifier")
    if "expected" not in row:
        arguments = want_object(row.get("arguments") or {}, "arguments")
        return verifier, _with_parsed_calls(arguments, "arguments") if verifier == "expected" else arguments
    if verifier != "expected" or "arguments" in row:
        fail("stands beside another verifier or its arguments", "expected", value=verifier, remedy="give one of the two")
    return "expected", _with_parsed_calls(want_object(row["expected"], "expected"), "expected")


def _with_parsed_calls(expected: dict[str, Any], where: str) -> dict[str, Any]:
    """Expectations whose calls' arguments are objects: OpenAI writes them as JSON text."""
    calls = expected.get("calls")
    if not isinstance(calls, list):
        return expected
    return {**expected, "calls": [_with_parsed_arguments(call, f"{where}.calls[{index}]") for index, call in enumerate(calls)]}


def _with_parsed_arguments(call: Any, where: str) -> Any:
    if not isinstance(call, dict) or not isinstance(text := call.get("arguments"), str):
        return call  # of another form: its verifier says what is wrong
    return {**call, "arguments": want_object(from_json_text(text or "{}", f"{where}.arguments"), f"{where}.arguments")}


def _task_tools(row: Mapping[str, Any], defaults: Defaults, trace: Trace) -> tuple[ToolSpec, ...]:
    value = row.get("tools")
    if not isinstance(value, list) or not any(isinstance(item, str) for item in value):
        return tool_specs(value, "tools", trace)
    for index, name in enumerate(value):
        if name not in defaults.catalogue:
            hint = f"known tools: {', '.join(defaults.catalogue) or 'none'}"
            fail("is no known tool", f"tools[{index}]", value=name, remedy=nearest(str(name), defaults.catalogue) or hint)
    return tuple(defaults.catalogue[name] for name in value)
