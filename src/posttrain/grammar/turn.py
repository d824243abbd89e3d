"""Grammars of what an assistant may say: a JSON document, or one turn with tool calls or an answer.

White space is fixed to what training writes (`,` and `:` alone): with free white space a small model can loop in it for ever.
Objects are written in the order in which their schema lists the properties.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jsonschema_rs

from posttrain.data.records import ToolSpec
from posttrain.errors import GrammarError
from posttrain.grammar.evidence import KEYWORD, Evidence, bound, bound_tools
from posttrain.grammar.matcher import Grammar

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"  # as the contract writes them; a test holds the two together

_OPTIONS = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":", "lenient": False}
_HEAD = "%llguidance {}"
# Text that contains a call's marker would be read as a broken call, so a free answer cannot contain one.
_TEXT = r"TEXT: /(?s:.+)/ & ~/(?s:.*)<\/?tool_call>(?s:.*)/"


@cache
def text_grammar() -> Grammar:
    """What an assistant says where no tool is offered and no schema given: text without calls and without the text of special tokens.

    It does not begin with `<`: a model that learned to call would open a call there and, not let through, go astray."""
    return Grammar(f"{_HEAD}\nstart: TEXT\n{_TEXT} & /[^<](?s:.*)/\n")


def json_grammar(schema: Mapping[str, Any], evidence: Evidence | Sequence[str] | None = None) -> Grammar:
    """One compact JSON document that the schema accepts. An empty schema means any JSON. `evidence`: as for a turn.

    Formats (`date`, `email`, ...) are enforced as syntax only: 2023-02-29 passes as a date, so a parsed value is checked again.
    Raises GrammarError that names a keyword which cannot be enforced while decoding.
    """
    if evidence is not None:
        schema = bound_answer(schema, evidence, "schema")
    grammar = Grammar(f"{_HEAD}\nstart: %json {_schema_text(schema, 'schema')}\n")
    grammar.check("schema")
    return grammar


def bound_answer(
    schema: Mapping[str, Any], evidence: Evidence | Sequence[str], where: str = "answer schema"
) -> Mapping[str, Any]:
    """The answer's schema with its grounded values closed to the evidence. Raises GrammarError where nothing could satisfy it."""
    _check(schema, where)
    found = bound(schema, evidence, where)
    if found is None:
        raise GrammarError(
            "the answer must hold a value from the conversation, and the conversation holds none",
            where=where,
            remedy=f"give the value, or make the property with {KEYWORD} optional",
        )
    return found


def turn_grammar(
    tools: Sequence[ToolSpec],
    answer_schema: Mapping[str, Any] | None,
    *,
    max_calls: int = 2,
    evidence: Evidence | Sequence[str] | None = None,
) -> Grammar:
    """One assistant turn: 1 to `max_calls` calls of the given tools, each with its own arguments' schema, or one answer.

    The answer matches `answer_schema`; without one it is any text that is not empty. Without tools it is the only choice.
    `evidence` is what the model was shown: grounded values are closed to it (see `evidence.bound`); None leaves them open.
    Raises GrammarError for two tools of one name, and for a schema that cannot be enforced, naming the tool and the keyword.
    """
    if evidence is not None:
        for tool in tools:
            _check(tool.parameters, f"tool {tool.name}")
        seen = Evidence.of(evidence)
        tools = bound_tools(tools, seen)
        answer_schema = None if answer_schema is None else bound_answer(answer_schema, seen)
    if max_calls < 1:
        raise GrammarError("a turn needs room for a call", where="max_calls", value=max_calls, remedy="allow at least one")
    names = [tool.name for tool in tools]
    if len(set(names)) != len(names):
        raise GrammarError("two tools share a name", where="tools", value=names, remedy="name every tool once")
    rules = [_HEAD, "start: calls | answer" if tools else "start: answer"]
    if tools:
        rules.append(f"calls: call{{1,{max_calls}}}")
        rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
    for index, tool in enumerate(tools):
        head = f'{CALL_OPEN}{{"name":{json.dumps(tool.name, ensure_ascii=False)},"arguments":'
        rules.append(f"call_{index}: {_literal(head)} arguments_{index} {_literal('}' + CALL_CLOSE)}")
        rules.append(f"arguments_{index}: %json {_arguments_text(tool)}")
    rules += (
        ["answer: TEXT", _TEXT] if answer_schema is None else [f"answer: %json {_schema_text(answer_schema, 'answer schema')}"]
    )
    grammar = Grammar("\n".join(rules) + "\n")
    try:
        grammar.check("turn")
    except GrammarError:
        _blame(tools, answer_schema)
        raise
    return grammar


def _blame(tools: Sequence[ToolSpec], answer_schema: Mapping[str, Any] | None) -> None:
    """Raise the error of the part that does not compile: the whole grammar's error names a line, not a tool."""
    for tool in tools:
        Grammar(f"{_HEAD}\nstart: %json {_arguments_text(tool)}\n").check(f"tool {tool.name}")
    if answer_schema is not None:
        Grammar(f"{_HEAD}\nstart: %json {_schema_text(answer_schema, 'answer schema')}\n").check("answer schema")


def _arguments_text(tool: ToolSpec) -> str:
    kind = tool.parameters.get("type", "object")
    if kind != "object":
        raise GrammarError(
            "the parameters of a tool must be an object",
            where=f"tool {tool.name}",
            value=kind,
            remedy='write its schema as {"type": "object", "properties": {...}}',
        )
    return _schema_text({**tool.parameters, "type": "object"}, f"tool {tool.name}")


def _schema_text(schema: Mapping[str, Any], where: str) -> str:
    """The schema as one line, with our own separators: options hidden in a schema could switch the enforcement off."""
    _check(schema, where)
    return json.dumps({**schema, "x-guidance": _OPTIONS})


def _check(schema: Mapping[str, Any], where: str) -> None:
    """Raise GrammarError for what is no JSON Schema."""
    try:
        jsonschema_rs.validator_for(dict(schema), offline=True)
        json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise GrammarError(f"is not a JSON Schema: {reason}", where=where, remedy="correct the schema") from error


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
