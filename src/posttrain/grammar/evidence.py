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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from posttrain.data.records import Message, ToolSpec
from posttrain.errors import GrammarError

KEYWORD = "x-grounded"
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # keywords that hold schemas by name,
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")  # in a list,
_SINGLE = ("items", "additionalProperties")  # or one
_ROUNDS = 32  # of finding out which definitions can be satisfied
_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_WHOLE = re.compile(r"(?<![\w.,-])\d+(?![\w,-]|\.\d)", re.ASCII)  # 5,000 is also an amount of 5000.00
_MOST = 512  # values of one property: the last ones seen win
_WORDS = 8  # of one run
_EDGES = " .,;:!?()[]{}<>\"'“”‘’、。，；：？！"


def shown(messages: Iterable[Message]) -> list[str]:
    """What counts as evidence in a conversation: everything but the assistant's own words."""
    return [message.content for message in messages if message.role != "assistant"]


def bound_tools(tools: Iterable[ToolSpec], evidence: Sequence[str]) -> tuple[ToolSpec, ...]:
    """The tools that can be called on this evidence, with their grounded arguments closed to what it holds. Raises like `bound`."""
    found = ((tool, bound(tool.parameters, evidence, f"tool {tool.name}")) for tool in tools)
    return tuple(replace(tool, parameters=parameters) for tool, parameters in found if parameters is not None)


def bound(schema: Mapping[str, Any], evidence: Sequence[str], where: str = "schema") -> dict[str, Any] | None:
    """The schema with every grounded string closed to values of the evidence; None when nothing could satisfy it.

    What cannot be written is `false` in its place: left out, it would count as an additional property, which may be anything.
    Raises GrammarError for a grounded string beneath a keyword that is not followed, as `not` or `if`.
    """
    if not _occurs(KEYWORD, schema):
        return dict(schema)
    try:
        impossible = _impossible(schema, evidence, where) if _occurs("$ref", schema) else ()
        found = _bind(schema, evidence, impossible, f"{where}#")
    except RecursionError as error:
        raise GrammarError("is nested too deeply", where=where, remedy="flatten the schema") from error
    return None if found is False else found


def _impossible(schema: Mapping[str, Any], evidence: Sequence[str], where: str) -> Collection[str]:
    """The references that nothing could satisfy: what is left when every round lets those pass that need no other one any more."""
    pending: dict[str, Any] = {
        f"#/{key}/{name.replace('~', '~0').replace('/', '~1')}": definition
        for key in ("$defs", "definitions")
        if isinstance(schema.get(key), Mapping)
        for name, definition in schema[key].items()
    }
    pending["#"] = {key: value for key, value in schema.items() if key not in ("$defs", "definitions")}
    for _ in range(_ROUNDS):
        before = len(pending)
        for reference in list(pending):
            if _bind(pending[reference], evidence, pending, f"{where}{reference}") is not False:
                del pending[reference]
        if len(pending) == before:
            return pending
    raise GrammarError("its definitions lead too far into each other", where=where, remedy="nest fewer definitions")


def _bind(schema: Any, evidence: Sequence[str], impossible: Collection[str], place: str) -> Any:
    """The bound schema, False when nothing could satisfy it. `impossible`: references that nothing satisfies."""
    if not isinstance(schema, Mapping):
        return schema
    if schema.get(KEYWORD, False) is not False:
        values = _values(schema, evidence)
        return {"type": "string", "enum": values} if values else False
    result: dict[str, Any] = {}
    for key, value in schema.items():
        at = f"{place}/{key}"
        if key in _NAMED and isinstance(value, Mapping):
            result[key] = {name: _bind(inner, evidence, impossible, f"{at}/{name}") for name, inner in value.items()}
        elif key in _LISTED and isinstance(value, list):
            result[key] = [_bind(inner, evidence, impossible, f"{at}/{index}") for index, inner in enumerate(value)]
        elif key in _SINGLE and isinstance(value, Mapping):
            result[key] = _bind(value, evidence, impossible, at)
        elif _occurs(KEYWORD, value):
            remedy = f"keep {KEYWORD} beneath {', '.join((*_NAMED, *_LISTED, *_SINGLE))}"
            raise GrammarError(f"{KEYWORD} cannot be enforced beneath {key}", where=at, remedy=remedy)
        else:
            result[key] = value
    return result if _possible(result, impossible) else False


def _possible(schema: Mapping[str, Any], impossible: Collection[str]) -> bool:
    """Whether a bound schema refers to something possible, has every part that a value needs, and a choice where it offers any."""
    reference = schema.get("$ref")
    if isinstance(reference, str) and unquote(reference) in impossible:
        return False
    choices = [options for key in ("anyOf", "oneOf") if (options := _list(schema, key))]
    return all(part is not False for part in _needed(schema)) and all(
        any(option is not False for option in options) for options in choices
    )


def _needed(schema: Mapping[str, Any]) -> Iterator[Any]:
    """The parts without which no value satisfies the schema."""
    first, fewest, properties = _list(schema, "prefixItems"), schema.get("minItems"), schema.get("properties")
    yield from _list(schema, "allOf")
    yield from first
    if isinstance(fewest, int | float) and fewest > len(first):
        yield schema.get("items")
    if isinstance(properties, Mapping):
        yield from (properties[name] for name in _list(schema, "required") if isinstance(name, str) and name in properties)


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    """The keyword's list; empty where it is malformed, which compiling says."""
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _occurs(key: str, value: Any) -> bool:
    """Whether a mapping anywhere within holds this key."""
    rest = [value]
    while rest:
        inner = rest.pop()
        if isinstance(inner, Mapping):
            if key in inner:
                return True
            rest += inner.values()
        elif isinstance(inner, list | tuple):
            rest += inner
    return False


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
