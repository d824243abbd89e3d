"""Files of records: JSON lines, plain or gzipped, or one JSON list. Read with a report, written so that nothing is lost."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from posttrain.data.fields import Trace, strict_json, want_object
from posttrain.data.formats import (
    CONVERSATIONS,
    PREFERENCES,
    TASKS,
    Defaults,
    Format,
    detect,
    to_conversation,
    to_preference,
    to_task,
)
from posttrain.data.records import Conversation, Preference, Task
from posttrain.data.rows import to_row
from posttrain.errors import DataError
from posttrain.files.atomic import storage_errors, write_bytes
from posttrain.files.hashing import hash_file, sha256_of

Record = Conversation | Preference | Task
R = TypeVar("R", Conversation, Preference, Task)

MAX_ERRORS = 20
_ROW, _FORMAT = "row", "format"  # places of what is wrong with a row as a whole
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What was read from one file, and what was left out of it.

    `dropped` counts, for each field that has no place in our records, the rows that had it. `sha256` is of the file's bytes.
    """

    path: str
    format: Format
    records: int
    sha256: str
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each field that was left out."""
        return tuple(
            f"{self.path}: `{name}` has no place in a record: left out of {count} of {self.records} rows"
            for name, count in self.dropped.items()
        )

    def __str__(self) -> str:
        lost = ", ".join(f"{name} ({count})" for name, count in sorted(self.dropped.items()))
        return f"{self.path}: {self.records} records, format {self.format}" + (f"; dropped fields: {lost}" if lost else "")


def read_conversations(
    path: Path | str, defaults: Defaults | None = None, split: str | None = None
) -> tuple[list[Conversation], ReadReport]:
    """Every row of a file of conversations. `split`: the one that rows must be of, and are of where they do not say. Raises DataError
    naming file, row, field, cause and remedy (20 rows at most)."""
    given = _given(defaults, split)
    return _read(Path(path), CONVERSATIONS, lambda row, form, name, trace: to_conversation(row, form, name, given, trace), split)


def read_preferences(
    path: Path | str, defaults: Defaults | None = None, split: str | None = None
) -> tuple[list[Preference], ReadReport]:
    """Every row of a file of preference pairs. Reads and raises like `read_conversations`."""
    given = _given(defaults, split)
    return _read(Path(path), PREFERENCES, lambda row, form, name, trace: to_preference(row, form, name, given, trace), split)


def read_tasks(
    path: Path | str,
    defaults: Defaults | None = None,
    split: str | None = None,
    complete: Callable[[Task], Task] | None = None,
) -> tuple[list[Task], ReadReport]:
    """Every row of a file of tasks. Reads and raises like `read_conversations`; tools may be names in `defaults.catalogue`. `complete`
    gives the task to keep, or raises DataError, its `where` a field of the row, for what only the reader's caller can know."""
    given = _given(defaults, split)

    def convert(row: dict[str, Any], _: Format, name: str, trace: Trace) -> Task:
        if row.get("id") is None:  # a number of the row would pair other tasks after a line was put in
            raise DataError("is missing", where="id", remedy="give each task its own: results are compared by it")
        task = to_task(row, name, given, trace)
        return task if complete is None else complete(task)

    return _read(Path(path), TASKS, convert, split)


def write_jsonl(path: Path | str, records: Iterable[Record]) -> str:
    """Write records as JSON lines in our own shape, gzipped when the name ends in .gz; returns the SHA-256 of the file.

    The file is complete or as it was before. Reading it back gives equal records. Raises DataError, StorageError.
    """
    path = Path(path)
    lines = "".join(json.dumps(to_row(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records).encode("utf-8")
    write_bytes(path, gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
    return hash_file(path)


def dataset_hash(records: Iterable[Record]) -> str:
    """SHA-256 over records in their order, the same on every machine and whatever file or format they came from."""
    return sha256_of([sha256_of(to_row(record)) for record in records])


Convert = Callable[[dict[str, Any], Format, str, Trace], R]


def _given(defaults: Defaults | None, split: str | None) -> Defaults:
    given = defaults or Defaults()
    return given if split is None else replace(given, split=split)


def _read(path: Path, wanted: frozenset[Format], convert: Convert[R], split: str | None) -> tuple[list[R], ReadReport]:
    records: list[R] = []
    ids: dict[str, int] = {}
    dropped: Counter[str] = Counter()
    problems: list[tuple[int, DataError]] = []
    format: Format | None = None
    objects = False
    for number, line in _rows(path):
        trace = Trace()
        try:
            row = want_object(line() if callable(line) else line, _ROW)
            _check_values(row)
            found = _format_of(row, wanted, format)
            record = convert(row, found, f"{_stem(path)}:{number}", trace)
            _check_id(record.id, number, ids)
            _check_split(record.split, split)
        except DataError as error:
            problems.append((number, error))
            if len(problems) == MAX_ERRORS or (format is None and error.where == _FORMAT):
                break  # another kind of file altogether needs saying once
            continue
        format = found
        objects = objects or trace.argument_objects
        records.append(record)
        dropped.update(trace.dropped)
    if problems:
        raise _malformed(path, problems)
    if format is None:
        raise DataError("holds no records", where=str(path), remedy="put one JSON object on each line")
    if format is Format.OPENAI_MESSAGES and objects:
        format = Format.TRL_MESSAGES
    return records, ReadReport(str(path), format, len(records), hash_file(path), dict(sorted(dropped.items())))


def _format_of(row: Mapping[str, Any], wanted: frozenset[Format], before: Format | None) -> Format:
    found = Format.TASK if wanted == TASKS and ("messages" in row or "request" in row) else detect(row)
    if found not in wanted or found is None:
        kinds = ", ".join(sorted(wanted))
        what = "is none that is known" if found is None else f"is {found}"
        raise DataError(what, where=_FORMAT, value=sorted(row), remedy=f"expected here: {kinds}")
    if before is not None and found is not before:
        raise DataError(f"is {found} in a file of format {before}", where=_FORMAT, remedy="keep one format per file")
    return found


def _check_values(row: Mapping[str, Any]) -> None:
    """JSON can spell what no text and no number is: half a surrogate pair, 1e999."""
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise DataError("holds half a character", where=_ROW, value=half, remedy="write the whole surrogate pair") from error
    except ValueError as error:
        raise DataError("holds a number out of range", where=_ROW, remedy="use finite numbers") from error


def _check_id(identity: str, number: int, ids: dict[str, int]) -> None:
    if identity in ids:
        raise DataError(f"was used in row {ids[identity]} already", where="id", value=identity, remedy="give each row its own id")
    ids[identity] = number


def _check_split(found: str, wanted: str | None) -> None:
    if wanted is not None and found != wanted:
        remedy = f"only rows of the {wanted} split are read here: take it out of the file, or correct its split"
        raise DataError(f"is not {wanted}", where="split", value=found, remedy=remedy)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, its value or a call that parses it). Blank lines are passed over but counted."""
    text = _text(path)
    if text.lstrip()[:1] == "[":
        try:
            listed = strict_json(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"begins like a JSON list but is not one ({error})", where=str(path), remedy="correct the JSON"
            ) from error
        yield from enumerate(listed, start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, partial(_parse, line)


def _parse(line: str) -> Any:
    try:
        return strict_json(line)
    except (ValueError, RecursionError) as error:
        remedy = "write one whole JSON object on each line"
        raise DataError(f"is not JSON ({error})", where=_ROW, value=line, remedy=remedy) from error


def _text(path: Path) -> str:
    with storage_errors(path, reading=True):
        data = path.read_bytes()
    try:
        plain = gzip.decompress(data) if data.startswith(_GZIP) else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"is not a whole gzip file ({error})", where=str(path), remedy="fetch or write the file again") from error
    try:
        return plain.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = plain[: error.start].count(b"\n") + 1
        raise DataError(f"is not UTF-8 ({error.reason})", where=f"{path}:{row}", remedy="convert the file to UTF-8") from error


def _malformed(path: Path, problems: list[tuple[int, DataError]]) -> DataError:
    if len(problems) == 1:
        number, error = problems[0]
        return DataError(error.what, where=f"{path}:{number}: {error.where}", value=error.value, remedy=error.remedy)
    count = f"the first {MAX_ERRORS}" if len(problems) == MAX_ERRORS else str(len(problems))
    lines = "\n".join(f"  {path.name}:{number}: {error}" for number, error in problems)
    return DataError(f"{count} malformed rows:\n{lines}", where=str(path))


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[0] or path.name
