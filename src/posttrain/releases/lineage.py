"""Where a release came from: its exact parent, its base, data, seeds, versions and teacher, as plain records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from posttrain.data.records import ToolSpec
from posttrain.errors import GateError, IntegrityError
from posttrain.evaluation.verdict import Check, Outcome, Verdict
from posttrain.files.hashing import sha256_of


class Kind(StrEnum):
    """What the weights in a release are."""

    ADAPTER = "adapter"  # a PEFT adapter: runs only on the exact parent weights it was trained on
    DENSE = "dense"  # a whole model in Hugging Face layout


@dataclass(frozen=True, slots=True)
class Parent:
    """The weights a stage started from. `release` None means the base itself.

    `fingerprint` is of the weights as they were loaded. When `release` is an adapter, those are its own parent with the adapter
    merged in, and `merge` records how far the merged model is from base + adapter (in natural-log units).
    """

    fingerprint: str
    release: str | None = None
    merge: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Teacher:
    """Who taught a student, and under which contract: the teacher lock."""

    release: str
    fingerprint: str
    contract: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """Everything needed to say how a release was made. It holds no clock time: the same run gives the same release id.

    `weights` is the fingerprint of a dense release's own weights (None for an adapter). `data` maps a data set to its hash,
    `versions` a library to its version; `recipe` is the hash of the resolved recipe.
    """

    kind: Kind
    stage: str
    base: str
    base_fingerprint: str
    parent: Parent
    weights: str | None = None
    tenant: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    recipe: str = ""
    teacher: Teacher | None = None

    @property
    def runs_on(self) -> str:
        """Fingerprint of the dense weights that must be loaded to run this release."""
        return self.weights if self.kind is Kind.DENSE and self.weights is not None else self.parent.fingerprint

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Lineage:
        """Raises IntegrityError when a part is missing or unknown."""
        try:
            parts = dict(value)
            parts["kind"] = Kind(parts["kind"])
            parts["parent"] = Parent(**parts["parent"])
            parts["teacher"] = None if parts["teacher"] is None else Teacher(**parts["teacher"])
            return cls(**parts)
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable("lineage", where, error) from error


@dataclass(frozen=True, slots=True)
class Override:
    """A person's recorded decision to release what its gate did not pass."""

    by: str
    why: str
    at: str

    def __post_init__(self) -> None:
        if not (self.by.strip() and self.why.strip() and self.at.strip()):
            raise GateError(
                "an override needs who, when and why", where="override", value=plain(self), remedy="give `by`, `why` and `at`"
            )

    @classmethod
    def now(cls, by: str, why: str) -> Override:
        return cls(by, why, utc_now())

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Override:
        try:
            return cls(**value)
        except (TypeError, AttributeError) as error:
            raise _unreadable("override", where, error) from error


def verdict_from_json(value: Mapping[str, Any], where: str) -> Verdict:
    """The inverse of `plain(verdict)`. Raises IntegrityError when a part is missing or unknown."""
    try:
        checks = tuple(Check(**check) for check in value["checks"])
        return Verdict(Outcome(value["outcome"]), checks, tuple(value["reasons"]), value["notes"])
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable("verdict", where, error) from error


def grammar_record(
    answer_schema: Mapping[str, Any] | None, tools: tuple[ToolSpec, ...], versions: Mapping[str, str]
) -> dict[str, Any]:
    """What constrains the turns: the answer schema and the tools, each with its hash, and the versions that compile them."""
    return {
        "format": 1,
        "answer_schema": None if answer_schema is None else plain(answer_schema),
        "answer_schema_sha256": None if answer_schema is None else sha256_of(plain(answer_schema)),
        "tools": [{**plain(tool), "sha256": sha256_of(plain(tool))} for tool in tools],
        "versions": dict(versions),
    }


def plain(value: Any) -> Any:
    """Records, mappings, tuples, enums and paths as JSON values."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _unreadable(what: str, where: str, error: Exception) -> IntegrityError:
    remedy = "build the release again with this version of posttrain, or read it with the one that made it"
    return IntegrityError(f"the {what} cannot be read ({type(error).__name__}: {error})", where=where, remedy=remedy)
