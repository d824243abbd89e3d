"""Values that must have been seen: a schema's `x-grounded` strings become the values that the conversation holds.

A reference, a name, an approval token or an amount that nobody mentioned is an invention, whatever its form. A string property with
`"x-grounded": true` may therefore only take what the model was shown: with a `pattern`, the words that match it (numbers are read
without their thousands separators); without one, any run of up to eight words of a message, or a whole value of a tool's JSON
result. `"x-grounded": ["none"]` names values that need no evidence.

Where nothing fits, the part that needs a value cannot be written: an optional property is left out, an array stays empty, a tool
whose required argument has no value cannot be called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from posttrain.data.records import Message, ToolSpec

KEYWORD = "x-grounded"
_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_WHOLE = re.compile(r"(?<![\w.,-])\d+(?![\w,-]|\.\d)", re.ASCII)  # 5,000 is also an amount of 5000.00
_MOST = 512  # values of one property: the last ones seen win
_WORDS = 8  # of one run
_EDGES = " .,;:!?()[]{}<>\"'“”‘’、。，；：？！"


def shown(messages: Iterable[Message]) -> list[str]:
    """What counts as evidence in a conversation: everything but the assistant's own words."""
    return [message.content for message in messages if message.role != "assistant"]


def bound_tools(tools: Iterable[ToolSpec], evidence: Sequence[str]) -> tuple[ToolSpec, ...]:
    """The tools that can be called on this evidence, with their grounded arguments closed to what it holds."""
    found = ((tool, bound(tool.parameters, evidence)) for tool in tools)
    return tuple(replace(tool, parameters=parameters) for tool, parameters in found if parameters is not None)


def bound(schema: Mapping[str, Any], evidence: Sequence[str]) -> dict[str, Any] | None:
    """The schema with every grounded string closed to values of the evidence; None when nothing could satisfy it.

    Grounded strings are looked for in properties and items, at any depth.
    """
    if schema.get(KEYWORD):
        values = _values(schema, evidence)
        return {"type": "string", "enum": values} if values else None
    result = dict(schema)
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        found = {key: bound(value, evidence) if isinstance(value, Mapping) else value for key, value in properties.items()}
        if any(found.get(key, ()) is None for key in schema.get("required", ())):
            return None
        result["properties"] = {key: value for key, value in found.items() if value is not None}
    if isinstance(items := schema.get("items"), Mapping):
        result["items"] = bound(items, evidence)
        if result["items"] is None:
            if schema.get("minItems", 0) > 0:
                return None
            result = {**{key: value for key, value in result.items() if key != "items"}, "maxItems": 0}
    return result


def _values(schema: Mapping[str, Any], evidence: Sequence[str]) -> list[str]:
    """What the evidence offers, in the order in which it was last seen, and the values that need none."""
    seen = _words(str(schema["pattern"]), evidence) if "pattern" in schema else _runs(evidence, schema.get("maxLength"))
    free = schema[KEYWORD]
    last = list(dict.fromkeys(reversed(seen)))[_MOST - 1 :: -1] if seen else []
    return [*last, *(value for value in (free if isinstance(free, list) else ()) if value not in seen)]


def _words(form: str, evidence: Sequence[str]) -> list[str]:
    inner = form.removeprefix("^").removesuffix("$")
    # whole words only: PAY-12 is not in PAY-123, 6026 not in JE-6026, 2029 not in 2029-10, 20.00 not in 120.00; a Chinese character
    # ends a word
    pattern = re.compile(rf"(?<![A-Za-z0-9_.])(?<![A-Za-z0-9]-)(?<!\d,)(?:{inner})(?![A-Za-z0-9_])(?![.-]\d)")
    texts = [text if _json(text) is not None else _SEPARATOR.sub("", text) for text in evidence]  # in JSON a comma parts values
    return _matches(pattern, texts) or _matches(pattern, [_WHOLE.sub(r"\g<0>.00", text) for text in texts])


def _matches(pattern: re.Pattern[str], texts: Iterable[str]) -> list[str]:
    return [match.group() for text in texts for match in pattern.finditer(text)]


def _runs(evidence: Sequence[str], longest: int | None) -> list[str]:
    found = []
    for text in evidence:
        value = _json(text)
        if value is not None:
            found += list(_leaves(value))
            continue
        words = text.split()
        for start in range(len(words)):
            runs = (
                " ".join(words[start : start + count]).strip(_EDGES) for count in range(1, min(_WORDS, len(words) - start) + 1)
            )
            found += runs
    return [run for run in found if run and (longest is None or len(run) <= longest)]


def _json(text: str) -> Any:
    """The object or list that a text holds, None for prose."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
