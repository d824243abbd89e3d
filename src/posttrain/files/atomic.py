"""Files and folders that are complete or absent: written beside their place, forced to the disk, then renamed into it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from posttrain.errors import DataError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_SCRATCH_SUFFIX = ".partial"
_GRACE_SECONDS = 60.0  # between making a scratch folder and locking it


def write_bytes(path: Path | str, data: bytes) -> None:
    """Replace `path` by `data`, or leave it exactly as it was. Missing parent folders are made.

    An existing file keeps its permission bits (a secret stays secret); a link is followed. Raises StorageError.
    """
    path = Path(os.path.realpath(path))
    with storage_errors(path, needed=len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = _scratch_name(path)
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666
        try:
            _write_synced(scratch, data, mode, exact_mode=path.exists())
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """`write_bytes` of the text in UTF-8, line ends as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """`write_bytes` of the value as JSON for people: indented, keys in their order, no NaN. Raises DataError, StorageError."""
    try:
        text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"cannot be written as JSON ({error})", where=str(path), remedy="use text, whole and finite numbers, lists, dicts"
        ) from error
    write_text(path, text + "\n")


@contextmanager
def atomic_folder(path: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """A scratch folder beside `path` to fill; on leaving the block it is forced to the disk and renamed to `path`.

    If the block raises, the scratch folder is removed and `path` is as it was. A scratch folder that a killed process left
    is removed by the next writer of the same path. With `replace` an existing folder is moved aside and deleted after the
    rename (a kill between the two renames leaves neither name, never a mixture); without it, an existing one is a StorageError.
    """
    path = Path(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        if path.exists() and not replace:
            raise _exists(path)
        scratch = _scratch_name(path)
        scratch.mkdir()
        held = os.open(scratch, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks: then nobody sweeps either
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with _only_full_disk(path):
            yield scratch
        with storage_errors(path):
            _sync_tree(scratch)
            _rename_folder(scratch, path, replace)
    finally:
        os.close(held)
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def storage_errors(path: Path, *, needed: int | None = None, reading: bool = False) -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError that names the file, the free space and what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if reading:
            remedy = "check that it exists and that this user may read it"
            raise StorageError(f"cannot be read ({error.strerror or error})", where=str(path), remedy=remedy) from error
        raise _storage_error(path, error, needed) from error


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One holder at a time, over processes, of the lock file `path`; the lock goes with the process that held it."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("w")
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems refuse fsync on a folder; the rename itself is still atomic
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, data: bytes, mode: int, *, exact_mode: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        if exact_mode:  # the umask was applied to a new file's bits, an existing file's are kept as they are
            os.fchmod(descriptor, mode)
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_folder(scratch: Path, path: Path, replace: bool) -> None:
    aside: Path | None = None
    if replace and path.exists():
        aside = _scratch_name(path)
        os.rename(path, aside)
    try:
        os.rename(scratch, path)
    except OSError as error:
        if aside is not None:
            os.rename(aside, path)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process finished first
            raise _exists(path) from error
        raise
    sync_folder(path.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(root, name)):
                descriptor = os.open(os.path.join(root, name), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        sync_folder(Path(root))


def _scratch_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{_SCRATCH_SUFFIX}")


def _sweep(path: Path) -> None:
    """Remove scratch folders of this path whose maker is gone: a living maker holds the folder's lock."""
    for old in path.parent.glob(f".{path.name}.*{_SCRATCH_SUFFIX}"):
        with suppress(OSError):
            if not old.is_dir() or time.time() - old.stat().st_mtime < _GRACE_SECONDS:
                continue
            descriptor = os.open(old, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextmanager
def _only_full_disk(path: Path) -> Iterator[None]:
    """Inside the caller's block only a full disk is ours to explain; every other error is the caller's own."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        # safetensors raises its own type and keeps the number in its text only
        if (isinstance(error, OSError) and error.errno in _FULL) or f"os error {errno.ENOSPC}" in str(error):
            raise _storage_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), None) from error
        raise


def _storage_error(path: Path, error: OSError, needed: int | None) -> StorageError:
    where = str(path)
    if error.errno in _FULL:
        size = "" if needed is None else f", {_megabytes(needed)} needed"
        return StorageError(
            f"cannot be written, the disk or quota is full ({_free(path)}{size})",
            where=where,
            remedy="free space or choose another folder; nothing half-written was left",
        )
    if error.errno in _FORBIDDEN:
        return StorageError(
            f"cannot be written ({error.strerror})",
            where=where,
            remedy=f"make {path.parent} writable for this user, or choose another folder",
        )
    return StorageError(
        f"storage failed ({error.strerror or error})",
        where=where,
        remedy="check the path and the disk, then run the same command again",
    )


def _exists(path: Path) -> StorageError:
    return StorageError("the folder exists already", where=str(path), remedy="use it, or remove it first")


def _free(path: Path) -> str:
    folder = next((parent for parent in path.parents if parent.is_dir()), None)
    try:
        return f"{_megabytes(shutil.disk_usage(folder).free)} free" if folder else "free space unknown"
    except OSError:
        return "free space unknown"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
