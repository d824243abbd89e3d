"""Before any training: is there something to learn in every record, does it fit, and is the end of the turn learned?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from posttrain.contract.sequence import Sequence
from posttrain.errors import PreflightError

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Preflight:
    """What passed: counts of records and tokens, and the longest record."""

    records: int
    tokens: int
    learned: int
    longest: int


def preflight(named: Iterable[tuple[str, Sequence]], *, max_tokens: int, end_of_turn: int) -> Preflight:
    """Check rendered records, given as (id, sequence). Raises PreflightError listing the first offenders of each kind.

    Nothing is truncated and nothing is dropped silently: an over-long record is the user's decision to shorten or leave out.
    """
    mute: list[str] = []
    long: list[str] = []
    endless: list[str] = []
    records = tokens = learned = longest = 0
    for name, sequence in named:
        records += 1
        tokens += len(sequence)
        learned += sequence.learned
        longest = max(longest, len(sequence))
        if sequence.learned == 0:
            mute.append(name)
        elif not bool(((sequence.ids == end_of_turn) & (sequence.weights > 0)).any()):
            endless.append(name)
        if len(sequence) > max_tokens:
            long.append(f"{name} ({len(sequence)} tokens)")
    if records == 0:
        raise PreflightError(
            "there are no records", where="preflight", remedy="check the data path, split and filters of the recipe"
        )
    _refuse(mute, "train on zero tokens", "give them an assistant turn to learn, or remove them")
    _refuse(endless, "never learn the end-of-turn token", "end the last assistant turn and let it be learned")
    _refuse(long, f"are longer than max_tokens={max_tokens}", "shorten or leave them out, or raise max_tokens")
    return Preflight(records, tokens, learned, longest)


def _refuse(names: list[str], what: str, remedy: str) -> None:
    if names:
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise PreflightError(f"{len(names)} record(s) {what}: {shown}", where="preflight", remedy=remedy)
