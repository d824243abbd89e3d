"""API keys: who is calling. The file holds SHA-256 sums only; a key is shown once, when it is issued."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import IntegrityError, RegistryError, nearest_of
from posttrain.files.atomic import exclusive, storage_errors, write_json

_FORMAT = 1
_ID = 12  # hex digits of a key's SHA-256: what logs and people name it by


@dataclass(frozen=True, slots=True)
class Caller:
    """Who holds a key: the tenant, and the key's public id (the first hex digits of its SHA-256)."""

    tenant: str
    key_id: str


@dataclass(frozen=True, slots=True)
class Access:
    """What the access file says: each tenant's channel, and each key's (SHA-256, tenant)."""

    tenants: Mapping[str, str]
    keys: tuple[tuple[str, str], ...]

    def listed(self) -> list[Caller]:
        """Every key's holder and id, in the order they were issued."""
        return [Caller(tenant, digest[:_ID]) for digest, tenant in self.keys]

    def channel_of(self, tenant: str) -> str:
        """Where a tenant's next key leads unless it is said: to its present channel, or to one of its own name."""
        return self.tenants.get(tenant, tenant)

    def caller(self, key: str) -> Caller | None:
        """The holder of `key`. Every stored sum is compared in constant time, so timing says nothing about any of them."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
        found = None
        for stored, tenant in self.keys:
            if hmac.compare_digest(stored, digest):
                found = Caller(tenant, digest[:_ID])
        return found

    @classmethod
    def read(cls, path: Path) -> Access:
        """Read `{"format": 1, "tenants": {NAME: {"channel": CHANNEL}}, "keys": [{"sha256": HEX, "tenant": NAME}]}`.

        Raises IntegrityError naming the part that is wrong.
        """
        with storage_errors(path, reading=True):
            text = path.read_text(encoding="utf-8")
        try:
            value = json.loads(text)
            if value["format"] != _FORMAT:
                raise ValueError(f"format {value['format']!r}")
            tenants = {str(name): str(entry["channel"]) for name, entry in value["tenants"].items()}
            keys = tuple((_checked_sum(entry["sha256"]), str(entry["tenant"])) for entry in value["keys"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(
                f"not an access file ({error})", where=str(path), remedy="issue keys with posttrain, or restore the file"
            ) from error
        return cls(tenants, keys)


class AccessFile:
    """The access file, read again when it changes: a revoked key stops working without a restart."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[tuple[int, int, int], Access] | None = None
        self.current()

    def current(self) -> Access:
        with storage_errors(self.path, reading=True):
            stat = self.path.stat()
        stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if self._seen is None or self._seen[0] != stamp:
            self._seen = (stamp, Access.read(self.path))
        return self._seen[1]


def issue_key(path: Path, tenant: str, channel: str | None = None) -> str:
    """Make a key for a tenant, store its sum, and return the key: it cannot be had again. `channel` defaults to
    `Access.channel_of`."""
    key = f"pt-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    with _changing(path):
        access = Access.read(path) if path.exists() else Access({}, ())
        channel = channel or access.channel_of(tenant)
        write_json(path, _to_json(Access({**access.tenants, tenant: channel}, (*access.keys, (digest, tenant)))))
    return key


def revoke_key(path: Path, key_id: str) -> str:
    """Take a key away by its id; its tenant. A server that runs refuses it from its next request on. RegistryError for an id that is not
    there."""
    with _changing(path):
        access = Access.read(path)
        holders = {caller.key_id: caller.tenant for caller in access.listed()}
        if key_id not in holders:
            raise RegistryError("there is no such key", where=str(path), value=key_id, remedy=nearest_of(key_id, [*holders]))
        write_json(path, _to_json(Access(access.tenants, tuple(k for k in access.keys if k[0][:_ID] != key_id))))
    return holders[key_id]


def _changing(path: Path) -> AbstractContextManager[None]:
    """Whoever changes the access file is alone with it, or one of two keys would be lost."""
    return exclusive(path.with_name(f".{path.name}.lock"))


def _to_json(access: Access) -> dict[str, Any]:
    tenants = {name: {"channel": channel} for name, channel in access.tenants.items()}
    return {
        "format": _FORMAT,
        "tenants": tenants,
        "keys": [{"sha256": digest, "tenant": tenant} for digest, tenant in access.keys],
    }


def _checked_sum(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 64 or any(c not in "0123456789abcdef" for c in value):
        raise ValueError("a key's sha256 must be 64 lower-case hex digits; the key itself is never stored")
    return value
