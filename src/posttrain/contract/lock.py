"""The lock file of a contract: fingerprints and golden snapshots, stored with every artifact, verified on every load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import ContractError
from posttrain.files.hashing import sha256_of

LOCK_FILE = "contract.lock.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ContractLock:
    """What a contract must still do. `goldens` holds (probe id, token ids, sha256 of ids and weights)."""

    template: str
    template_sha256: str
    tokenizer_sha256: str
    special_ids: tuple[tuple[str, int], ...]
    vocabulary_size: int
    goldens: tuple[tuple[str, tuple[int, ...], str], ...]

    @property
    def fingerprint(self) -> str:
        return sha256_of(self.to_json())

    def compare(self, actual: ContractLock, where: str) -> None:
        """Raise ContractError at the first difference: the cheap names first, then the golden that moved."""
        for part in ("template", "template_sha256", "tokenizer_sha256", "special_ids", "vocabulary_size"):
            expected, got = getattr(self, part), getattr(actual, part)
            if expected != got:
                raise ContractError(
                    f"contract does not match its lock: {part} should be {expected!r}",
                    where=where,
                    value=got,
                    remedy="use the tokenizer and the posttrain version the artifact was made with",
                )
        names, got_names = ([golden[0] for golden in lock.goldens] for lock in (self, actual))
        if names != got_names:
            raise ContractError(
                f"the lock holds other golden renderings: {names}",
                where=where,
                value=got_names,
                remedy="restore the lock file from the release it belongs to, or use the posttrain version that made it",
            )
        for (name, ids, digest), (_, got_ids, got_digest) in zip(self.goldens, actual.goldens, strict=True):
            if digest != got_digest or ids != got_ids:
                at = next((i for i, (a, b) in enumerate(zip(ids, got_ids, strict=False)) if a != b), min(len(ids), len(got_ids)))
                raise ContractError(
                    f"golden rendering {name!r} differs from token {at} on",
                    where=where,
                    remedy="the template or the tokenizer changed behaviour; load the artifact with its own",
                )

    def to_json(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "template": self.template,
            "template_sha256": self.template_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "special_ids": dict(self.special_ids),
            "vocabulary_size": self.vocabulary_size,
            "goldens": [{"probe": name, "ids": list(ids), "sha256": digest} for name, ids, digest in self.goldens],
        }

    @classmethod
    def from_json(cls, value: Any, where: str = LOCK_FILE) -> ContractLock:
        try:
            if value["format"] != _FORMAT:
                raise ContractError("unknown lock format", where=where, value=value["format"], remedy="use a newer posttrain")
            return cls(
                value["template"],
                value["template_sha256"],
                value["tokenizer_sha256"],
                tuple(sorted((str(k), int(v)) for k, v in value["special_ids"].items())),
                int(value["vocabulary_size"]),
                tuple((g["probe"], tuple(int(i) for i in g["ids"]), g["sha256"]) for g in value["goldens"]),
            )
        except ContractError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ContractError(
                f"the lock file lacks or garbles a field ({error})",
                where=where,
                remedy="restore it from the release it belongs to",
            ) from error

    @classmethod
    def read(cls, path: Path) -> ContractLock:
        try:
            value = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ContractError(
                f"the lock file cannot be read ({error})", where=str(path), remedy="restore it from the release it belongs to"
            ) from error
        return cls.from_json(value, str(path))
