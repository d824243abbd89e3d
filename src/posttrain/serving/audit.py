"""The audit log: one chained line per request, who got what from which release. No content, only hashes of it."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from posttrain.files.chainlog import ChainLog


class Decision(StrEnum):
    """What became of a request."""

    SERVED = "served"  # an answer was sent
    REFUSED = "refused"  # the router refused it: `reason` is the RoutingReason
    REJECTED = "rejected"  # the request itself cannot be answered (malformed, too large, an unenforceable schema)
    FAILED = "failed"  # the model or the server failed (malformed call, overload, storage)
    CANCELLED = "cancelled"  # the client went away before the answer was there


@dataclass(slots=True)
class AuditRecord:
    """One line, filled in as the request goes. Unknown parts stay None.

    `request` is the SHA-256 of the body as received, `response` of the canonical JSON of [message, finish_reason] as sent,
    `adapter` of the weights file that answered. `detail` is an error's full text for the operator (it may name files, never
    message content).
    """

    decision: Decision = Decision.FAILED
    reason: str = "internal_error"
    status: int = 500
    tenant: str | None = None
    key: str | None = None
    release: str | None = None
    adapter: str | None = None
    contract: str | None = None
    request: str | None = None
    response: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str | None = None
    stream: bool = False
    latency_ms: float = 0.0
    detail: str | None = None


class Audit:
    """Appends to one ChainLog file. `write` blocks until the line is on the disk: an answer leaves only after it."""

    def __init__(self, path: Path) -> None:
        self.log = ChainLog(path)
        self._lock = threading.Lock()

    def write(self, record: AuditRecord) -> dict[str, Any]:
        """The line as written. Raises StorageError or IntegrityError; the answer must then not be sent."""
        with self._lock:
            return self.log.append(asdict(record))
