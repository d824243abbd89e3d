"""Hashes of values, files and folders that are the same on every machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from posttrain.errors import DataError, IntegrityError
from posttrain.files.atomic import storage_errors


def canonical_json(value: Any) -> bytes:
    """The one way to write a value as bytes: keys sorted, no white space, UTF-8, numbers as Python prints them.

    Raises DataError for what has no single JSON form: NaN and infinity, keys that are not text (1 and "1" would become the
    same key), lone surrogates, other types. A tuple is written as a list; 1 and 1.0 are different values.
    """
    _check_keys(value)
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise DataError(
            f"has no canonical JSON form ({error})", remedy="use text, whole and finite numbers, lists, dicts with text keys"
        ) from error


def _check_keys(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise DataError("a key is not text and has no canonical JSON form", value=key, remedy="turn keys into text first")
            _check_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_keys(item)


def sha256_of(value: Any) -> str:
    """SHA-256 of `canonical_json(value)`, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def hash_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits. Raises StorageError."""
    with storage_errors(Path(path), reading=True), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(path: Path | str) -> dict[str, str]:
    """{relative path with `/`: SHA-256} of every file below a folder, sorted by path.

    A link to a file counts as its content. A link to a folder, a pipe or a device raises IntegrityError: its content would
    not be covered by the hashes. Raises StorageError when the folder cannot be read.
    """
    root = Path(path)
    with storage_errors(root, reading=True):
        found = sorted(_files(root, root))
    return {relative: hash_file(root / relative) for relative in found}


def _files(root: Path, folder: Path) -> list[str]:
    found: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found += _files(root, Path(entry.path))
            elif entry.is_file():
                found.append(Path(entry.path).relative_to(root).as_posix())
            else:
                raise IntegrityError(
                    "only plain files and folders can be hashed", where=entry.path, remedy="replace the link or device by a file"
                )
    return found
