"""The answer every tenant's downstream system reads: one compact JSON object with five fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import jsonschema_rs

from posttrain.worlds.finance_ops.money import AMOUNT_PATTERN


class Decision(StrEnum):
    """What an answer does."""

    ANSWER = "answer"  # states facts
    REFUSE = "refuse"  # declines a high-risk request and names the compliant way
    PROPOSE = "propose"  # recommends or has drafted something that people must approve
    CLARIFY = "clarify"  # asks for what is missing


def _text(length: int) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": length}


SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "decision": {"type": "string", "enum": list(Decision)},
        "summary": _text(240),
        "figures": {
            "type": "array",
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"name": _text(40), "amount": {"type": "string", "pattern": AMOUNT_PATTERN, "x-grounded": True}},
                "required": ["name", "amount"],
                "additionalProperties": False,
            },
        },
        "sources": {"type": "array", "maxItems": 3, "items": _text(40)},
        "next_steps": {"type": "array", "maxItems": 4, "items": _text(120)},
    },
    "required": ["decision", "summary", "figures", "sources", "next_steps"],
    "additionalProperties": False,
}
_VALIDATOR = jsonschema_rs.validator_for(dict(SCHEMA))


@dataclass(frozen=True, slots=True)
class Answer:
    """A final answer. `figures` are (name, amount) pairs with amounts as decimal strings."""

    decision: Decision
    summary: str
    figures: tuple[tuple[str, str], ...] = ()
    sources: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()

    def json(self) -> str:
        value = {
            "decision": str(self.decision),
            "summary": self.summary,
            "figures": [{"name": name, "amount": amount} for name, amount in self.figures],
            "sources": list(self.sources),
            "next_steps": list(self.next_steps),
        }
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def but(self, **changes: Any) -> Answer:
        return replace(self, **changes)


def parse(text: str) -> Answer | None:
    """The answer in a text, or None when the text is not exactly one valid answer object."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    if not _VALIDATOR.is_valid(value):
        return None
    figures = tuple((figure["name"], figure["amount"]) for figure in value["figures"])
    return Answer(Decision(value["decision"]), value["summary"], figures, tuple(value["sources"]), tuple(value["next_steps"]))
