"""An append-only log of JSON lines in which every line vouches for the one before: metrics, audit and channel history.

A line is one JSON object: `seq` from 0, `time` (UTC), the caller's fields in their order, `previous` (the hash of the line
before, 64 zeros at the start) and last `hash`, the SHA-256 of the line's own bytes up to there. Changing, removing or
reordering a line breaks the chain at a line that `verify` names. Cutting whole lines off the end cannot be seen in the file
itself: keep a `Head` elsewhere (a release, another log) and give it to `verify`. Whoever can rewrite the whole file can also
make a new chain, which only a kept head betrays.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from posttrain.errors import DataError, IntegrityError
from posttrain.files.atomic import storage_errors, sync_folder

GENESIS = "0" * 64
RESERVED = ("seq", "time", "previous", "hash", "cut_bytes")
_TAIL = len(',"hash":""}') + 64
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Head:
    """Where a log stands: number of whole lines, hash of the last one, and bytes of a line torn by a crash (usually 0)."""

    lines: int
    hash: str
    torn_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _End:
    """The end of the file as this object last left it: reading the tail again is not needed while the size is the same."""

    size: int
    lines: int
    hash: str


class ChainLog:
    """One log file. Any number of processes and threads may append through their own or a shared object."""

    def __init__(self, path: Path | str, *, sync: bool = True) -> None:
        """`sync=False` leaves forcing to the disk to the system: for metrics, where a power cut may cost the last seconds."""
        self.path, self.sync = Path(path), sync
        self._end = _End(0, 0, GENESIS)

    def append(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Add one line and return it as written. Raises DataError (not JSON, reserved key), StorageError, or IntegrityError
        when the log's last line was altered or the log became shorter: nothing is ever built on a broken chain.

        A last line that a crash tore off is cut first, and the new line notes it as `cut_bytes`.
        """
        clash = [key for key in record if key in RESERVED]
        if clash:
            raise DataError(
                "a field of the chain itself",
                where=str(self.path),
                value=clash[0],
                remedy=f"rename it; reserved: {', '.join(RESERVED)}",
            )
        with storage_errors(self.path), self._locked() as descriptor:
            end, torn = self._find_end(descriptor)
            if torn:
                os.ftruncate(descriptor, end.size)
            fields = {"seq": end.lines, "time": _now(), **record, **({"cut_bytes": torn} if torn else {}), "previous": end.hash}
            line, digest = _seal(fields, self.path)
            self._write(descriptor, line, end.size)
            self._end = _End(end.size + len(line), end.lines + 1, digest)
        return {**fields, "hash": digest}

    def read(self) -> list[dict[str, Any]]:
        """Every whole line, oldest first; a torn last line is left out. Raises IntegrityError for a line that is not JSON."""
        return list(self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, line in self._lines():
            if line.endswith(b"\n"):
                yield _parse(line, self.path, number)

    def verify(self, head: Head | None = None) -> Head:
        """Check the whole chain, and that `head` (kept from earlier) is still part of it; returns where the log stands now.
        Raises IntegrityError naming the first line that is altered, missing or out of order. A torn last line is no tampering.
        """
        previous, lines, torn = GENESIS, 0, 0
        for number, line in self._lines():
            if not line.endswith(b"\n"):
                torn = len(line)
                break
            previous = _check(line, number, lines, previous, self.path)
            lines += 1
            if head is not None and lines == head.lines and previous != head.hash:
                _broken(self.path, number, "is not the line that was there before", "restore the log from a copy")
        if head is not None and lines < head.lines:
            _broken(self.path, lines + 1, f"is missing: there were {head.lines} lines before", "restore the log from a copy")
        return Head(lines, previous, torn)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file, opened anew and locked: opened each time, because a lock belongs to an opening, so that threads and
        forked children exclude each other too."""
        new = not self.path.exists()
        if new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if new and self.sync:
                sync_folder(self.path.parent)
            yield descriptor
        finally:
            os.close(descriptor)

    def _find_end(self, descriptor: int) -> tuple[_End, int]:
        """The end of the last whole line, and how many torn bytes lie behind it."""
        size = os.fstat(descriptor).st_size
        known = self._end
        if size < known.size:
            _broken(self.path, known.lines, "is gone: the log became shorter while it was in use", "restore the log from a copy")
        if size == known.size:
            return known, 0
        whole, last = _last_line(descriptor, size)
        if not last:
            return _End(0, 0, GENESIS), size
        digest = _own_hash(last)
        record = _parse(last, self.path, None)
        if digest is None or not isinstance(record.get("seq"), int):
            _broken(self.path, None, "was altered: its hash does not fit it", "run verify, then restore the log from a copy")
        return _End(whole, record["seq"] + 1, digest), size - whole

    def _write(self, descriptor: int, line: bytes, at: int) -> None:
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(descriptor, line[written:], at + written)
            if self.sync:
                os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, at)  # a full disk must not leave half a line
            raise

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        if not self.path.exists():
            return
        with storage_errors(self.path, reading=True), open(self.path, "rb") as file:
            yield from enumerate(file, start=1)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _seal(fields: dict[str, Any], path: Path) -> tuple[bytes, str]:
    try:
        body = json.dumps(fields, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise DataError(
            f"cannot be logged as JSON ({error})", where=str(path), remedy="use text, whole and finite numbers, lists, dicts"
        ) from error
    digest = hashlib.sha256(body).hexdigest()
    return body[:-1] + b',"hash":"' + digest.encode() + b'"}\n', digest


def _own_hash(line: bytes) -> str | None:
    """The line's hash if it fits the line's bytes."""
    line = line.removesuffix(b"\n")
    digest = hashlib.sha256(line[:-_TAIL] + b"}").hexdigest()
    return digest if line[-_TAIL:] == b',"hash":"' + digest.encode() + b'"}' else None


def _check(line: bytes, number: int, seq: int, previous: str, path: Path) -> str:
    """Check one whole line against its place in the chain; returns its hash."""
    remedy = "restore the log from a copy; lines before this one are intact"
    digest = _own_hash(line)
    if digest is None:
        _broken(path, number, "was altered: its hash does not fit it", remedy)
    record = _parse(line, path, number)
    if record.get("seq") != seq:
        _broken(path, number, f"has seq {record.get('seq')} where {seq} belongs: lines are missing or out of order", remedy)
    if record.get("previous") != previous:
        _broken(path, number, "does not continue the line before it", remedy)
    return digest


def _parse(line: bytes, path: Path, number: int | None) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        _broken(path, number, "is not a JSON object", "run verify, then restore the log from a copy")
    return record


def _last_line(descriptor: int, size: int) -> tuple[int, bytes]:
    """Offset just behind the last newline before `size`, and the line that ends there (empty when there is none)."""
    tail, start = b"", size
    while start > 0 and tail.count(b"\n") < 2:
        step = min(_BLOCK, start)
        start -= step
        tail = os.pread(descriptor, step, start) + tail
    end = tail.rfind(b"\n") + 1
    if end == 0:
        return 0, b""
    begin = tail.rfind(b"\n", 0, end - 1) + 1
    return start + end, tail[begin:end]


def _broken(path: Path, number: int | None, what: str, remedy: str) -> NoReturn:
    line = "the last line" if number is None else f"line {number}"
    raise IntegrityError(f"{line} {what}", where=str(path), remedy=remedy)
