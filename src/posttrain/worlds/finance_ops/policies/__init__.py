"""Policies of the three tenants: passages to retrieve, approval limits, and the Cedar rules of the permission guard."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from posttrain.errors import DataError

Passage = Mapping[str, str]  # {id, tenant, title, text}
Searcher = Callable[[str, str], Sequence[Passage]]  # (tenant, query) -> passages, best first


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant's name, the prefix of its policy ids, and the amount (minor units) from which an entry needs dual approval."""

    name: str
    prefix: str
    dual_from: int
    transfer_limit: int


TENANTS: Mapping[str, Tenant] = {
    tenant.name: tenant
    for tenant in (
        Tenant("bank_A", "BA", 100_000, 2_000_000),
        Tenant("retail_B", "RB", 1_000_000, 4_000_000),
        Tenant("saas_C", "SC", 500_000, 3_000_000),
    )
}


def tenant_of(name: str) -> Tenant:
    """The tenant of that name. Raises DataError: an unknown tenant is refused, never served as another."""
    if name not in TENANTS:
        raise DataError("unknown tenant", where="finance_ops", value=name, remedy=f"use one of {', '.join(TENANTS)}")
    return TENANTS[name]


HOUSE_LIMIT = 500_000


def dual_from(tenant: str | None) -> int:
    """The amount in minor units from which an entry needs two approvers; the house limit where no tenant is named."""
    return HOUSE_LIMIT if tenant is None else tenant_of(tenant).dual_from


def approval_level(tenant: str | None, amount: int) -> str:
    """'dual' from the limit upwards, else 'single'. The system decides it, never the model."""
    return "dual" if amount >= dual_from(tenant) else "single"


def read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


_HEADING = re.compile(r"^## (\S+) (.+)\n(.+)$", re.MULTILINE)


@cache
def passages(tenant: str) -> tuple[Passage, ...]:
    """The tenant's passages in file order."""
    name = tenant_of(tenant).name
    return tuple(
        {"id": found.group(1), "tenant": name, "title": found.group(2), "text": found.group(3)}
        for found in _HEADING.finditer(read(f"{name}.md"))
    )


def passage(tenant: str, topic: str) -> Passage:
    """The passage of a topic code such as 'PAY-02'."""
    wanted = f"{tenant_of(tenant).prefix}-{topic}"
    return next(found for found in passages(tenant) if found["id"] == wanted)


def words(text: str) -> list[str]:
    """Lower-case word stems, crude on purpose: 'Transfers' and 'transfer' meet, 'approval' and 'approvals' too."""
    return [re.sub(r"(ting|ing|ies|es|ed|s|e|y)$", "", word) for word in re.findall(r"[a-z]+", text.lower()) if word not in _STOP]


_STOP_WORDS = """
a an and are as at be by can do does for from how i in is it may must of on or our rule rules say says that
the their to we what when which who with policy policies
"""
_STOP = frozenset(_STOP_WORDS.split())


def overlap_search(tenant: str, query: str) -> list[Passage]:
    """Passages of this tenant only, ranked by idf-weighted word overlap (a title word counts twice); those without overlap are left out."""
    bags = [(found, {*words(found["title"])}, {*words(found["title"]), *words(found["text"])}) for found in passages(tenant)]
    asked = {*words(query)}

    def weight(word: str) -> float:
        return math.log(1 + len(bags) / sum(1 for _, _, bag in bags if word in bag))

    scored = [(sum(weight(word) * (2 if word in title else 1) for word in asked & bag), found) for found, title, bag in bags]
    return [found for score, found in sorted(scored, key=lambda pair: (-pair[0], pair[1]["id"])) if score > 0]
