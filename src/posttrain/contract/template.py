"""The chat template: how roles, tools and turns become text around special tokens.

A template is data (markers of one tokenizer family) plus three pure text functions. Model-supplied Jinja templates are not
run: SmolLM2's, for one, has no tool role, and a template that can change under a trained adapter is not a contract.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.records import Message, ToolSpec
from posttrain.errors import ContractError

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Template:
    """Turn markers of a tokenizer family: `start` role `after_role` content `end` `separator`."""

    name: str
    start: str  # special token that opens a turn
    after_role: tuple[str, ...]  # what follows the role name: special tokens or text, in order
    end: str  # special token that ends a turn; learned on assistant turns
    separator: str  # text after the end token
    preamble: tuple[str, ...] = ()  # special tokens before the first turn
    roles: tuple[tuple[str, str], ...] = (("system", "system"), ("user", "user"), ("assistant", "assistant"), ("tool", "tool"))

    @property
    def special_tokens(self) -> tuple[str, ...]:
        specials = [self.start, self.end, *self.preamble, *(piece for piece in self.after_role if piece.startswith("<"))]
        return tuple(dict.fromkeys(specials))

    def role_name(self, role: str) -> str:
        return dict(self.roles)[role]


# Version numbers are part of the name: a changed template is another template, never the same name with other text.
TEMPLATES: tuple[Template, ...] = (
    Template("posttrain-chatml/1", "<|im_start|>", ("\n",), "<|im_end|>", "\n"),
    Template(
        "posttrain-llama3/1",
        "<|start_header_id|>",
        ("<|end_header_id|>", "\n\n"),
        "<|eot_id|>",
        "",
        ("<|begin_of_text|>",),
        (("system", "system"), ("user", "user"), ("assistant", "assistant"), ("tool", "ipython")),
    ),
    Template(
        "posttrain-gemma/1",
        "<start_of_turn>",
        ("\n",),
        "<end_of_turn>",
        "\n",
        ("<bos>",),
        (("system", "system"), ("user", "user"), ("assistant", "model"), ("tool", "tool")),
    ),
)


def template_for(vocabulary: Mapping[str, int], name: str | None = None) -> Template:
    """The template of that name, or the first whose special tokens the vocabulary holds as single tokens."""
    for template in TEMPLATES:
        if name in (None, template.name) and all(token in vocabulary for token in template.special_tokens):
            return template
    raise ContractError(
        "no chat template fits this tokenizer"
        if name is None
        else f"chat template {name!r} is unknown or needs tokens this tokenizer lacks",
        where="contract.template",
        remedy="supported: " + ", ".join(f"{t.name} (needs {' '.join(t.special_tokens)})" for t in TEMPLATES),
    )


def system_text(system: str | None, tools: Sequence[ToolSpec]) -> str | None:
    """Content of the system turn. Tools come first, so that prompts of different tenants share the longer prefix."""
    if not tools:
        return system
    lines = [f'Tools, called as {CALL_OPEN}{{"name":...,"arguments":{{...}}}}{CALL_CLOSE}:']
    lines += [f"- {signature(tool)}: {tool.description}" for tool in tools]
    return "\n".join(lines) + (f"\n\n{system}" if system else "")


def signature(tool: ToolSpec) -> str:
    """A tool as one line, `name(text, arg: integer, arg?: "a"|"b")`: a quarter of the tokens of its JSON Schema. Text is implied."""
    properties: Mapping[str, Any] = tool.parameters.get("properties", {})
    required = set(tool.parameters.get("required", ()))
    types = {key: _type(schema) for key, schema in properties.items()}
    arguments = [f"{key}{'' if key in required else '?'}{'' if kind == 'string' else f': {kind}'}" for key, kind in types.items()]
    return f"{tool.name}({', '.join(arguments)})"


def _type(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        return "any"
    if "const" in schema:
        return compact_json(schema["const"])
    if "enum" in schema:
        return "|".join(compact_json(value) for value in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return "|".join(_type(option) for option in schema[key])
    kind = schema.get("type", "any")
    if isinstance(kind, list):
        return "|".join(kind)
    if kind == "array":
        return f"[{_type(schema.get('items', {}))}]"
    if kind == "object" and "properties" in schema:
        return "{" + ", ".join(f"{key}: {_type(value)}" for key, value in schema["properties"].items()) + "}"
    return f"{kind} {schema['format']}" if "format" in schema else str(kind)


def assistant_text(message: Message) -> str:
    """Content of an assistant turn: its text, then each call with compact arguments."""
    calls = "".join(
        f'{CALL_OPEN}{{"name":{compact_json(call.name)},"arguments":{_arguments(call.arguments, call.name)}}}{CALL_CLOSE}'
        for call in message.tool_calls
    )
    return message.content + calls


def _arguments(text: str, name: str) -> str:
    try:
        value = json.loads(text) if text.strip() else {}
        compact = compact_json(value)
    except ValueError as error:
        raise ContractError(
            f"arguments of call {name!r} are not JSON: {error}",
            where="tool_calls",
            value=text,
            remedy="write the arguments as one JSON object",
        ) from error
    if not isinstance(value, dict):
        raise ContractError(
            f"arguments of call {name!r} are not an object",
            where="tool_calls",
            value=text,
            remedy="write the arguments as one JSON object",
        )
    return compact


def compact_json(value: object) -> str:
    """The separators training uses are the ones the grammar decodes with. Raises ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
