"""Names of parties, cost centres and people. Each split owns its own name stems, so no name of one split occurs in another."""

from __future__ import annotations

import hashlib
import random
from functools import cache

from posttrain.errors import DataError

SPLITS = ("train", "dev", "test")

_HEADS = (
    "Alder Amber Ash Bal Bar Bel Bram Bran Cal Cam Cedar Clay Cor Dal Dan Dor Dun Ebon El Ever Fal Fen Fern Flint Gar Glen Gran Hal Har Haw "
    "Hazel Heath Holm Iron Ister Jas Jor Kel Ken Kes Lam Lang Lin Lor Mal Mar Mer Mor Nel Nor Oak Or Pel Pen Quin Rad Raven Ros Row Sal Sand "
    "Sel Silver Stan Stone Tal Thorn Tor Ul Val Ver Wal Wes Whit Wil Win Wolf Yar Zel"
).split()
_TAILS = "beck berg bourne brook burn bury by dale fell field ford gate haven hurst lake land ley mere mond ridge stead stow ton vale ville wick wood worth".split()
_TRADES = (
    "Paper Foods Freight Software Print Energy Tools Labs Textiles Chemicals Packaging Media Security Catering Cleaning Optics Motors Timber "
    "Plastics Glass Consulting Systems Trading Supplies Interiors Hardware Dairy Steel"
).split()
_FORMS = ("", "", "", " Ltd", " GmbH", " Inc", " BV", " & Co")
_AREAS = (
    "Field Inside Central Regional Digital Plant Harbour Northern Southern Coastal Urban Export Retail Mobile Global Alpine Eastern Western Metro "
    "Partner Online Airport Campus Valley Premium"
).split()
_DUTIES = "Service Sales Support Quality Logistics Research Training Marketing Maintenance Design Procurement Facilities Analytics Warehouse Recruiting Events".split()
_SURNAMES = (
    "Abara Almeida Amin Berger Bianchi Bose Castro Chen Costa Diaz Dubois Eriksen Farah Fischer Fonseca Gomez Haas Hansen Ito Ivanov Jensen Kaur "
    "Keller Khan Kim Kovacs Lambert Lehto Leroy Lopez Maier Mbeki Meyer Moreau Nakano Novak Okafor Olsen Park Patel Petrov Popescu Ramos Rossi "
    "Ruiz Sato Schmid Silva Singh Sousa Tanaka Torres Varga Vidal Wagner Weber Wong Yilmaz Zhang Ziegler"
).split()


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
    return tuple(stem for head in _HEADS for tail in _TAILS if split_of(stem := head + tail) == check_split(split))


@cache
def areas(split: str) -> tuple[str, ...]:
    """Cost-centre names of a split."""
    return tuple(name for area in _AREAS for duty in _DUTIES if split_of(name := f"{area} {duty}") == check_split(split))


@cache
def surnames(split: str) -> tuple[str, ...]:
    return tuple(name for name in _SURNAMES if split_of(name) == check_split(split))


def companies(rng: random.Random, split: str, count: int) -> list[str]:
    """`count` company names with distinct stems."""
    return [f"{stem} {rng.choice(_TRADES)}{rng.choice(_FORMS)}" for stem in rng.sample(stems(split), count)]


def cost_centres(rng: random.Random, split: str, count: int) -> list[str]:
    return rng.sample(areas(split), count)


def people(rng: random.Random, split: str, count: int) -> list[str]:
    return [f"{rng.choice('ABCDEFGHIJKLMNOPRSTVWY')}. {name}" for name in rng.sample(surnames(split), count)]
