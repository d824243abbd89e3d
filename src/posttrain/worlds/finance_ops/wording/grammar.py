"""The phrase grammar: load the sets, give each split its own fragments, expand."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from posttrain.errors import DataError
from posttrain.worlds.finance_ops.names import check_split

FILES = ("common.yaml", "lookup.yaml", "policy.yaml", "control.yaml", "judgement.yaml")
_REFERENCE = re.compile(r"<([~a-z_.]+)>")


@cache
def load() -> Mapping[str, tuple[str, ...]]:
    """Every set of every phrase file. Raises DataError on a set that occurs twice or a reference to an unknown set."""
    sets: dict[str, tuple[str, ...]] = {}
    for name in FILES:
        found = yaml.safe_load(files(__package__).joinpath(name).read_text(encoding="utf-8"))
        for key, fragments in found.items():
            if key in sets or not all(isinstance(fragment, str) for fragment in fragments):
                raise DataError("phrase set is defined twice or holds something else than text", where=f"{name}:{key}")
            sets[key] = tuple(fragments)
    for key, fragments in sets.items():
        for reference in {found for fragment in fragments for found in _REFERENCE.findall(fragment)}:
            if reference not in sets:
                raise DataError("phrase refers to an unknown set", where=key, value=reference)
    return sets


def _rank(fragment: str) -> bytes:
    return hashlib.sha256(f"wording|{fragment}".encode()).digest()


@cache
def fragments(name: str, split: str) -> tuple[str, ...]:
    """The fragments of a set that a split owns: by hash order a quarter is test, an eighth dev, the rest train.

    Dev and test get two fragments at least, one in sets of fewer than eight."""
    every = load()[name]
    if name.startswith("~"):
        return every
    if len(every) < 4:
        raise DataError("a set that is split needs four fragments or more", where=name, value=len(every))
    ordered = sorted(every, key=_rank)
    least = 2 if len(every) >= 8 else 1
    test = max(least, round(len(every) * 0.25))
    dev = max(least, round(len(every) * 0.12))
    parts = {"test": ordered[:test], "dev": ordered[test : test + dev], "train": ordered[test + dev :]}
    return tuple(parts[check_split(split)])


@dataclass(frozen=True, slots=True)
class Wording:
    """The phrase grammar as one split sees it."""

    split: str

    def expand(self, name: str, rng: random.Random) -> str:
        """A random expansion of a set, slots left open."""
        text = rng.choice(fragments(name, self.split))
        while found := _REFERENCE.search(text):
            text = text[: found.start()] + rng.choice(fragments(found.group(1), self.split)) + text[found.end() :]
        return text

    def forms(self, name: str) -> int:
        """How many different texts a set can expand to, before slots and register."""
        total = 0
        for fragment in fragments(name, self.split):
            product = 1
            for reference in _REFERENCE.findall(fragment):
                product *= self.forms(reference)
            total += product
        return total


@cache
def wording(split: str) -> Wording:
    return Wording(check_split(split))
