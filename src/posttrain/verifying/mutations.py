"""Ways to spoil, or harmlessly rewrite, a good episode: the material that a verifier is audited with.

A mutation edits what was said and called (messages, turns, outcomes); `ids` stay, so a verifier that reads tokens is not audited
by it. It returns None where it does not apply.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from posttrain.data.records import Episode, Message, StopReason, ToolCall
from posttrain.verifying.answers import parse_answer
from posttrain.verifying.matching import AMOUNT

_KEEP = ToolCall("", "", "")
CallEdit = Callable[[ToolCall, int], ToolCall | None]


@dataclass(frozen=True, slots=True)
class Mutation:
    """`harmful`: a sound verifier must fail the result; otherwise it must still pass it."""

    name: str
    apply: Callable[[Episode], Episode | None]
    harmful: bool = True


def edit_calls(episode: Episode, edit: CallEdit) -> Episode | None:
    """The episode with every call of the model replaced by `edit(call, number)` (None: the call and its result never were).
    None when nothing changed. Turns that came with the request are left alone."""
    edited: dict[int, tuple[ToolCall | None, ...]] = {}
    number = 0
    for index in _own_turns(episode):
        calls = episode.messages[index].tool_calls
        edited[index] = tuple(edit(call, number + offset) for offset, call in enumerate(calls))
        number += len(calls)
    if all(episode.messages[index].tool_calls == calls for index, calls in edited.items()):
        return None
    messages: list[Message] = []
    results: Iterator[ToolCall | None] = iter(())
    rewritten: list[Message] = []
    for index, message in enumerate(episode.messages):
        if message.role == "tool" and next(results, _KEEP) is None:
            continue
        if index in edited:
            results = iter(edited[index])
            kept = tuple(call for call in edited[index] if call is not None)
            emptied = bool(message.tool_calls) and not kept and not message.content
            message = replace(message, tool_calls=kept)
            rewritten.append(message)
            if emptied:
                continue
        messages.append(message)
    fates = [call for calls in edited.values() for call in calls]
    pairs = zip(episode.outcomes, fates, strict=False)  # calls after a stop have no outcome
    outcomes = tuple(replace(outcome, call=call) for outcome, call in pairs if call is not None)
    turns = tuple(replace(turn, message=message) for turn, message in zip(episode.turns, rewritten, strict=False))
    return replace(episode, messages=tuple(messages), outcomes=outcomes, turns=turns)


def edit_answer(episode: Episode, edit: Callable[[str], str | None]) -> Episode | None:
    """The episode with its final answer replaced. None when it has none or `edit` leaves it."""
    text = edit(episode.answer) if episode.answer else None
    if text is None or text == episode.answer:
        return None
    messages = (*episode.messages[:-1], replace(episode.messages[-1], content=text))
    turns = (*episode.turns[:-1], replace(episode.turns[-1], message=messages[-1])) if episode.turns else ()
    return replace(episode, messages=messages, turns=turns)


def edit_arguments(episode: Episode, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Episode | None:
    """The episode with the arguments of the last call that `edit` applies to replaced: actions come after look-ups."""
    calls = _own_calls(episode)
    for chosen in range(len(calls) - 1, -1, -1):
        arguments = edit(json.loads(calls[chosen].arguments))
        if arguments is not None:
            return edit_calls(episode, _put(chosen, json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))))
    return None


def drop_call(episode: Episode) -> Episode | None:
    """The last call was never made."""
    last = len(_own_calls(episode)) - 1
    return edit_calls(episode, lambda call, number: None if number == last else call)


def wrong_tool(episode: Episode) -> Episode | None:
    """The last call went to a tool of another name."""
    last = len(_own_calls(episode)) - 1
    return edit_calls(episode, lambda call, number: replace(call, name=f"{call.name}_2") if number == last else call)


def change_amount(episode: Episode) -> Episode | None:
    """The first amount of a call is one unit of its last digit higher."""
    return edit_arguments(episode, lambda arguments: _first(arguments, _one_more))


def flip_sign(episode: Episode) -> Episode | None:
    """The first amount of a call has the other sign."""
    return edit_arguments(
        episode, lambda arguments: _first(arguments, lambda text: text[1:] if text.startswith("-") else f"-{text}")
    )


def swap_accounts(episode: Episode) -> Episode | None:
    """Two different texts of one object in a call's arguments are exchanged: debit for credit, payer for payee."""
    return edit_arguments(episode, _swap_texts)


def unbalance(episode: Episode) -> Episode | None:
    """One line of a call with several lines is higher than its counterpart."""

    def edit(arguments: dict[str, Any]) -> dict[str, Any] | None:
        for key, value in arguments.items():
            if isinstance(value, list) and len(value) > 1 and isinstance(value[-1], dict):
                line = _first(value[-1], _one_more)
                if line is not None:
                    return {**arguments, key: [*value[:-1], line]}
        return None

    return edit_arguments(episode, edit)


def empty_answer(episode: Episode) -> Episode | None:
    return edit_answer(episode, lambda _: "")


def truncated_answer(episode: Episode) -> Episode | None:
    """The answer was cut by the token budget: a prefix, stopped by length."""
    cut = edit_answer(episode, lambda text: text[: len(text) // 2])
    return None if cut is None else replace(cut, stop=StopReason.LENGTH)


def other_decision(episode: Episode) -> Episode | None:
    """A JSON answer decides otherwise: refuses what it answered, or the reverse."""

    def edit(text: str) -> str | None:
        value = parse_answer(text).value
        if value is None or "decision" not in value:
            return None
        return json.dumps({**value, "decision": "answer" if value["decision"] == "refuse" else "refuse"}, ensure_ascii=False)

    return edit_answer(episode, edit)


def change_figure(episode: Episode) -> Episode | None:
    """The first amount in a JSON answer is one unit of its last digit higher."""

    def edit(text: str) -> str | None:
        value = parse_answer(text).value
        changed = None if value is None else _first(value, _one_more)
        return None if changed is None else json.dumps(changed, ensure_ascii=False)

    return edit_answer(episode, edit)


def reorder_keys(episode: Episode) -> Episode | None:
    """Harmless: a JSON answer with its fields in another order and free white space."""

    def edit(text: str) -> str | None:
        value = parse_answer(text).value
        return None if value is None else json.dumps(dict(reversed(value.items())), ensure_ascii=False, indent=1)

    return edit_answer(episode, edit)


def respace_arguments(episode: Episode) -> Episode | None:
    """Harmless: every call's arguments in another order and with free white space."""

    def edit(call: ToolCall, _: int) -> ToolCall:
        return replace(
            call, arguments=json.dumps(dict(reversed(json.loads(call.arguments).items())), ensure_ascii=False, indent=1)
        )

    return edit_calls(episode, edit)


CALL_MUTATIONS = (
    Mutation("drop_call", drop_call),
    Mutation("wrong_tool", wrong_tool),
    Mutation("change_amount", change_amount),
    Mutation("flip_sign", flip_sign),
    Mutation("swap_accounts", swap_accounts),
    Mutation("unbalance", unbalance),
    Mutation("respace_arguments", respace_arguments, harmful=False),
)
ANSWER_MUTATIONS = (
    Mutation("empty_answer", empty_answer),
    Mutation("truncated_answer", truncated_answer),
    Mutation("other_decision", other_decision),
    Mutation("change_figure", change_figure),
    Mutation("reorder_keys", reorder_keys, harmful=False),
)


def _one_more(text: str) -> str:
    value = Decimal(text)
    return str(value + Decimal((0, (1,), int(value.as_tuple().exponent))))


def _first(value: Any, change: Callable[[str], str]) -> Any:
    """The value with its first amount (a text with a decimal point) changed, or None when it holds none."""
    if isinstance(value, str):
        return change(value) if AMOUNT.fullmatch(value) else None
    return _inside(value, lambda item: _first(item, change))


def _swap_texts(value: Any) -> Any:
    """The value with two different texts exchanged, or None: of one object, or of one field in two objects of a list."""
    if isinstance(value, dict):
        swapped = _exchange([(value, key) for key in value])
        if swapped is not None:
            return swapped[0]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for key in value[0]:
            swapped = _exchange([(item, key) for item in value]) if all(key in item for item in value) else None
            if swapped is not None:
                return swapped
    return _inside(value, _swap_texts)


def _exchange(places: list[tuple[dict[str, Any], str]]) -> list[dict[str, Any]] | None:
    """The objects, in order, after the texts at the first two places that hold different ones change places."""
    texts = [(index, owner[key]) for index, (owner, key) in enumerate(places) if _is_text(owner[key])]
    other = next(((index, text) for index, text in texts if text != texts[0][1]), None)
    if other is None:
        return None
    (first, one), (second, two) = texts[0], other
    new = {first: two, second: one}
    shared = all(owner is places[0][0] for owner, _ in places)
    if shared:
        return [{**places[0][0], **{places[index][1]: text for index, text in new.items()}}]
    return [{**owner, key: new.get(index, owner[key])} for index, (owner, key) in enumerate(places)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not AMOUNT.fullmatch(value)


def _inside(value: Any, change: Callable[[Any], Any]) -> Any:
    """The object or list with the first element that `change` does not answer None for replaced; None when there is none."""
    if not isinstance(value, dict | list):
        return None
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        changed = change(item)
        if changed is not None:
            return {**value, key: changed} if isinstance(value, dict) else [*value[:key], changed, *value[key + 1 :]]
    return None


def _own_turns(episode: Episode) -> list[int]:
    """Places of the messages that the model wrote. An episode without token turns (written by hand) is all the model's."""
    found = [index for index, message in enumerate(episode.messages) if message.role == "assistant"]
    return found[-len(episode.turns) :] if episode.turns else found


def _own_calls(episode: Episode) -> list[ToolCall]:
    return [call for index in _own_turns(episode) for call in episode.messages[index].tool_calls]


def _put(chosen: int, arguments: str) -> CallEdit:
    return lambda call, number: replace(call, arguments=arguments) if number == chosen else call
