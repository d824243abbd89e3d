"""Names of parties, cost centres and people. Each split owns its own name stems, so no name of one split occurs in another."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

import yaml

from posttrain.errors import DataError

SPLITS = ("train", "dev", "test")


@cache
def _parts() -> Mapping[str, Sequence[str]]:
    parts: Mapping[str, Sequence[str]] = yaml.safe_load(files(__package__).joinpath("names.yaml").read_text(encoding="utf-8"))
    return parts


_FORMS = ("", "", "", " Ltd", " GmbH", " Inc", " BV", " & Co")


def split_of(fragment: str) -> str:
    """The split that owns a name fragment: 65 % train, 10 % dev, 25 % test, by hash, so that it never moves."""
    bucket = hashlib.sha256(f"name|{fragment}".encode()).digest()[0] * 100 // 256
    return "train" if bucket < 65 else "dev" if bucket < 75 else "test"


def check_split(split: str) -> str:
    if split not in SPLITS:
        raise DataError("unknown split", where="finance_ops", value=split, remedy=f"use one of {', '.join(SPLITS)}")
    return split


@cache
def stems(split: str) -> tuple[str, ...]:
    """Company-name stems of a split."""
    return tuple(
        stem for head in _parts()["heads"] for tail in _parts()["tails"] if split_of(stem := head + tail) == check_split(split)
    )


@cache
def areas(split: str) -> tuple[str, ...]:
    """Cost-centre names of a split."""
    return tuple(
        name
        for area in _parts()["areas"]
        for duty in _parts()["duties"]
        if split_of(name := f"{area} {duty}") == check_split(split)
    )


@cache
def surnames(split: str) -> tuple[str, ...]:
    return tuple(name for name in _parts()["surnames"] if split_of(name) == check_split(split))


def companies(rng: random.Random, split: str, count: int) -> list[str]:
    """`count` company names with distinct stems."""
    return [f"{stem} {rng.choice(_parts()['trades'])}{rng.choice(_FORMS)}" for stem in rng.sample(stems(split), count)]


def cost_centres(rng: random.Random, split: str, count: int) -> list[str]:
    return rng.sample(areas(split), count)


def people(rng: random.Random, split: str, count: int) -> list[str]:
    return [f"{rng.choice('ABCDEFGHIJKLMNOPRSTVWY')}. {name}" for name in rng.sample(surnames(split), count)]
