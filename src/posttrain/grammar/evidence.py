"""Values that must have been seen: a schema's `x-grounded` strings become the values that the conversation holds.

A reference, a name, an approval token, a month or an amount that nobody mentioned is an invention, whatever its form. A string property
with `"x-grounded": true` may therefore only take what the model was shown: with a `pattern`, the words that match it (numbers are read
without their thousands separators, and for a pattern of months alone, dates as their month, `2026-05`); without one, any run of up to
eight words of a message, or a whole value of a tool's JSON result. `"x-grounded": ["none"]` names values that need no evidence, and
`"x-grounded": "user"` takes what the user's own messages hold and nothing else: whatever a tool returns can then neither give nor
change the value, be it a record that is merely there or an order hidden in one.

Where nothing fits, the part that needs a value cannot be written: an optional property is left out, an array stays empty, a tool
whose required argument has no value cannot be called.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import regex

from posttrain.data.records import Message, ToolSpec
from posttrain.errors import GrammarError
from posttrain.grammar.months import months

KEYWORD = "x-grounded"
USER = "user"  # the value of the keyword for what the user must have said
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # keywords that hold schemas by name,
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")  # in a list,
_SINGLE = ("items", "additionalProperties")  # or one
_ROUNDS = 32  # of finding out which definitions can be satisfied
_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_WHOLE = re.compile(r"(?<![\w.,-])\d+(?![\w-]|[.,]\d)", re.ASCII)  # 5,000 is also an amount of 5000.00
_MOST = 512  # values of one property: the last ones seen win,
_MOST_SAID = 4096  # or of what only the user says: a payee before a long quotation must not be lost
_WORDS = 8  # of one run
_SECONDS = 0.5  # for all patterns of a request; ours need milliseconds. `regex` counts the whole process's processor time
_LONGEST = 2000  # characters of a pattern: compiling cannot be interrupted
_EDGES = " .,;:!?()[]{}<>\"'“”‘’、。，；：？！"


def shown(messages: Sequence[Message]) -> Evidence:
    """What counts as evidence in a conversation: everything but the assistant's own words."""
    said = [message.content for message in messages if message.role == USER]
    return Evidence([message.content for message in messages if message.role != "assistant"], said=said)


def bound_tools(tools: Iterable[ToolSpec], evidence: Evidence | Sequence[str]) -> tuple[ToolSpec, ...]:
    """The tools that can be called on this evidence, with their grounded arguments closed to what it holds. Raises like `bound`."""
    seen = Evidence.of(evidence)
    found = ((tool, bound(tool.parameters, seen, f"tool {tool.name}")) for tool in tools)
    return tuple(replace(tool, parameters=parameters) for tool, parameters in found if parameters is not None)


def needs_user(schema: Mapping[str, Any]) -> bool:
    """Whether any value in it must be the user's own."""
    return _occurs(KEYWORD, _without_shown(schema))


def only_said(tool: ToolSpec, messages: Sequence[Message]) -> Mapping[str, Any] | None:
    """The tool's parameters with only the values closed that the user must have said; None when the user said none that fits. For
    whoever executes a call, from which no grammar may have kept another value. Raises like `bound`."""
    said = Evidence([message.content for message in messages if message.role == USER], most=None)
    return bound(_without_shown(tool.parameters), said, f"tool {tool.name}")


def bound(schema: Mapping[str, Any], evidence: Evidence | Sequence[str], where: str = "schema") -> dict[str, Any] | None:
    """The schema with every grounded string closed to values of the evidence; None when nothing could satisfy it.

    What cannot be written is `false` in its place: left out, it would count as an additional property, which may be anything.
    Raises GrammarError for a grounded string beneath a keyword that is not followed, as `not` or `if`, and for its pattern when that
    does not compile or takes too long to search for.
    """
    if not _occurs(KEYWORD, schema):
        return dict(schema)
    seen = Evidence.of(evidence)
    try:
        impossible = _impossible(schema, seen, where) if _occurs("$ref", schema) else ()
        found = _bind(schema, seen, impossible, f"{where}#")
    except RecursionError as error:
        raise GrammarError("is nested too deeply", where=where, remedy="flatten the schema") from error
    return None if found is False else found


def _without_shown(schema: Any) -> Any:
    """The schema without the keyword where it asks for less than the user's word; what it says and nobody knows is kept, to be refused."""
    if isinstance(schema, Mapping):
        return {key: _without_shown(value) for key, value in schema.items() if key != KEYWORD or not _asks_less(value)}
    return [_without_shown(value) for value in schema] if isinstance(schema, list | tuple) else schema


def _asks_less(keyword: Any) -> bool:
    """Than the user's word; what nobody knows does not."""
    return isinstance(keyword, bool | list)


def _impossible(schema: Mapping[str, Any], evidence: Evidence, where: str) -> Collection[str]:
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


def _bind(schema: Any, evidence: Evidence, impossible: Collection[str], place: str) -> Any:
    """The bound schema, False when nothing could satisfy it. `impossible`: references that nothing satisfies."""
    if not isinstance(schema, Mapping):
        return schema
    if schema.get(KEYWORD, False) is not False:
        values = evidence.values(schema, place)
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


def whole_words(form: str) -> str:
    """The pattern that finds a form's words in a text: PAY-12 is not in PAY-123, 6026 not in JE-6026, 2029 not in 2029-10, 20.00 not
    in 120.00; a Chinese character ends a word."""
    inner = form.removeprefix("^").removesuffix("$")
    return rf"(?<![A-Za-z0-9_.])(?<![A-Za-z0-9]-)(?<!\d,)(?:{inner})(?![A-Za-z0-9_])(?![.-]\d)"


class _Texts:
    """Messages as they are searched: each with its JSON value, if it is one, and the months that all of them name."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.all = tuple(texts)

    @cached_property
    def parsed(self) -> list[tuple[str, Any]]:
        return [(text, _json(text)) for text in self.all]

    @cached_property
    def months(self) -> list[str]:
        return [month for text in self.all for month in months(text)]


class Evidence:
    """What a conversation offers to grounded strings: each form is looked for once, and all patterns within one time budget.
    `said`: which of it the user said; all of it, where nobody knows. `most`: values of what only the user says, None for all."""

    def __init__(
        self, texts: Iterable[str], seconds: float = _SECONDS, *, said: Iterable[str] | None = None, most: int | None = _MOST_SAID
    ) -> None:
        self._left, self._most = seconds, most
        self._shown = _Texts(texts)
        self._said = self._shown if said is None else _Texts(said)
        self._found: dict[tuple[bool, str | float | None], list[str]] = {}

    @classmethod
    def of(cls, evidence: Evidence | Sequence[str]) -> Evidence:
        return evidence if isinstance(evidence, Evidence) else cls(evidence)

    def values(self, schema: Mapping[str, Any], place: str) -> list[str]:
        """The values of a grounded string, the last seen first, and those that need no evidence. Raises GrammarError for a pattern
        that does not compile, or takes too long, and for a keyword that says nothing known."""
        free, longest = schema[KEYWORD], schema.get("maxLength")
        if free != USER and not _asks_less(free):
            remedy = f"write true, {json.dumps(USER)}, or the list of values that need no evidence"
            raise GrammarError(f"{KEYWORD} cannot be read", where=place, value=free, remedy=remedy)
        form = str(schema["pattern"]) if "pattern" in schema else longest if isinstance(longest, int | float) else None
        own = free == USER
        if (own, form) not in self._found:
            texts = self._said if own else self._shown
            seen = self._words(texts, form, place, both=own) if isinstance(form, str) else self._runs(texts, form)
            last_first = list(dict.fromkeys(reversed(seen)))
            self._found[own, form] = last_first[: self._most if own else _MOST][::-1]
        last = self._found[own, form]
        return [*last, *(value for value in (free if isinstance(free, list) else ()) if value not in last)]

    def _words(self, seen: _Texts, form: str, place: str, *, both: bool) -> list[str]:
        """The words of a form. Whole numbers are read as amounts, 5000 as 5000.00, where there are no others; `both`: there too,
        for a fee with cents must not hide the amount to pay."""
        # in JSON a comma parts values
        texts = [text if value is not None else _SEPARATOR.sub("", text) for text, value in seen.parsed]
        try:
            if len(form) > _LONGEST:
                raise regex.error(f"it is longer than {_LONGEST} characters")
            with self._spending():
                pattern = regex.compile(whole_words(form))
                monthly = bool(pattern.fullmatch("2026-05", timeout=self._left)) and not pattern.fullmatch(
                    "2026-55", timeout=self._left
                )
            found = self._matches(pattern, [*texts, *(seen.months if monthly else ())])
            if both or not found:
                found += self._matches(pattern, [_WHOLE.sub(r"\g<0>.00", text) for text in texts])
            return found
        except regex.error as error:
            what, remedy = f"its pattern cannot be searched for ({error})", "correct the pattern"
        except TimeoutError:
            what, remedy = "searching the conversation for its pattern takes too long", "write it without nested repetitions"
        raise GrammarError(what, where=place, value=form, remedy=remedy)

    def _matches(self, pattern: regex.Pattern[str], texts: Iterable[str]) -> list[str]:
        """The pattern may be a client's, so it is timed, and other threads run meanwhile."""
        found: list[str] = []
        for text in texts:
            with self._spending():
                found += (match.group() for match in pattern.finditer(text, concurrent=True, timeout=self._left))
        return found

    @contextmanager
    def _spending(self) -> Iterator[None]:
        """Take the time of what is done within from the budget. Raises TimeoutError when it is spent."""
        if self._left <= 0:
            raise TimeoutError
        start = time.thread_time()
        try:
            yield
        finally:
            self._left -= time.thread_time() - start

    def _runs(self, seen: _Texts, longest: float | None) -> list[str]:
        found: list[str] = []
        for text, value in seen.parsed:
            found += _leaves(value) if value is not None else _phrases(text)
        return [run for run in found if run and (longest is None or len(run) <= longest)]


def _json(text: str) -> Any:
    """The object or list that a text holds, None for prose."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _leaves(value: Any) -> Iterator[str]:
    """The texts in a JSON value, in their order."""
    rest = [value]
    while rest:
        inner = rest.pop()
        if isinstance(inner, dict | list):
            rest += reversed(inner.values() if isinstance(inner, dict) else inner)
        elif isinstance(inner, str):
            yield inner


def _phrases(text: str) -> Iterator[str]:
    """Runs of words, without the marks around them."""
    words = text.split()
    for start in range(len(words)):
        for count in range(1, min(_WORDS, len(words) - start) + 1):
            yield " ".join(words[start : start + count]).strip(_EDGES)
