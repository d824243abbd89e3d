"""How people write: openers and closers, capitals or none, missing punctuation, a slip of the finger; values stay as they are."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from posttrain.worlds.finance_ops.wording.grammar import Wording

_SLOT = re.compile(r"(\{[a-z_0-9]+\})")
_SENTENCE = re.compile(r"(?<=[a-z)}\"][.?!] )[a-z]")
_SPAN = re.compile(r"\*([^*]+)\*")


@dataclass(frozen=True, slots=True)
class Utterance:
    """What a user says, and the span marked in it (policy topics), if any."""

    text: str
    span: str = ""


def speak(book: Wording, name: str, rng: random.Random, slots: Mapping[str, str], *, plain: bool = False) -> Utterance:
    """Expand a set, dress it in a register and fill the slots. `plain` leaves out opener and closer."""
    body = book.expand(name, rng)
    opener = "" if plain or rng.random() < 0.5 else book.expand("opener", rng)
    closer = "" if plain or rng.random() < 0.6 else book.expand("closer", rng)
    end = "" if body.endswith(("?", "!", ".", '"')) else "."
    text = f"{opener} {_capital(body) if not opener or opener.endswith(('.', '!', '?')) else body}{end} {closer}".strip()
    text = _SENTENCE.sub(lambda found: found.group().upper(), text)
    mood = rng.random()
    if mood < 0.12:
        text = _outside(text, str.lower)
    elif mood < 0.20:
        text = text.rstrip(".?!")
    if rng.random() < 0.06:
        text = _slip(text, rng)
    span = _SPAN.search(text)
    text = _SPAN.sub(r"\1", text)
    return Utterance(text.format_map(dict(slots)), span.group(1).format_map(dict(slots)) if span else "")


def _capital(text: str) -> str:
    start = 1 if text.startswith("*") else 0
    return text[:start] + text[start : start + 1].upper() + text[start + 1 :]


def _outside(text: str, change: Callable[[str], str]) -> str:
    """Apply a text function everywhere but in slots."""
    pieces = _SLOT.split(text)
    return "".join(piece if index % 2 else change(piece) for index, piece in enumerate(pieces))


def _slip(text: str, rng: random.Random) -> str:
    """Swap two inner letters of one longer word outside slots and marked spans."""
    bare = _SPAN.sub(lambda found: " " * len(found.group()), _SLOT.sub(lambda found: " " * len(found.group()), text))
    spots = list(re.finditer(r"[a-z]{7,}", bare))
    if not spots:
        return text
    at = (found := rng.choice(spots)).start() + rng.randint(1, len(found.group()) - 3)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
