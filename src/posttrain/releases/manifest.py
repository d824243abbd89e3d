"""The manifest: SHA-256 per file of a flat folder, and the refusal of everything that could run or point elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import IntegrityError
from posttrain.files.atomic import storage_errors
from posttrain.files.hashing import canonical_json, hash_file

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig.json"
SAFE_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")
_MAX_JSON = 256 << 20  # a tokenizer.json has tens of MB at most; beyond this it is not one of ours
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """`kind` is 'release' or 'candidate'; `files` maps each file's name to its SHA-256."""

    kind: str
    files: Mapping[str, str]

    @property
    def data(self) -> bytes:
        return canonical_json({"format": _FORMAT, "kind": self.kind, "files": dict(self.files)}) + b"\n"

    @property
    def id(self) -> str:
        """`r-` or `c-` and the first 16 hex digits of the manifest's SHA-256."""
        return f"{self.kind[0]}-{hashlib.sha256(self.data).hexdigest()[:16]}"


def read_manifest(folder: Path) -> Manifest:
    """The folder's manifest as written, not yet compared with the files. Raises IntegrityError when there is none."""
    where = str(folder / MANIFEST)
    value = read_json(folder / MANIFEST)
    if not isinstance(value, dict) or set(value) != {"format", "kind", "files"} or value["format"] != _FORMAT:
        raise IntegrityError(
            "not a manifest of a known format", where=where, remedy="use a newer posttrain, or build the release again"
        )
    manifest = Manifest(str(value["kind"]), dict(value["files"]))
    if manifest.kind not in ("release", "candidate") or (folder / MANIFEST).read_bytes() != manifest.data:
        raise IntegrityError(
            "the manifest is not in canonical form", where=where, remedy="it was edited: fetch the release again from its source"
        )
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest. Raises IntegrityError naming the first file that is missing, extra or altered."""
    found = {path.name: path for path in safe_files(folder)}
    remedy = "fetch the release again from its source, or roll the channel back"
    for name in sorted(set(manifest.files) | set(found)):
        where = str(folder / name)
        if name not in found:
            raise IntegrityError("a file named in the manifest is missing", where=where, remedy=remedy)
        if name not in manifest.files:
            raise IntegrityError(
                "a file is not named in the manifest", where=where, remedy="remove it, or fetch the release again"
            )
        actual = hash_file(found[name])
        if actual != manifest.files[name]:
            raise IntegrityError(
                "the file was altered", where=where, value=actual, remedy=f"expected SHA-256 {manifest.files[name]}; {remedy}"
            )
    for path in found.values():
        check_content(path)


def safe_files(folder: Path) -> list[Path]:
    """Plain files of a flat folder in name order, without the manifest and its signature.

    Raises IntegrityError for links, sub-folders and any format outside SAFE_SUFFIXES (pickles, .bin, .py, ...).
    """
    if not folder.is_dir() or folder.is_symlink():
        raise IntegrityError(
            "there is no such release folder", where=str(folder), remedy="name a folder that holds manifest.json"
        )
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            raise IntegrityError("a link in a release could point anywhere", where=str(path), remedy="put the file itself there")
        if not path.is_file():
            raise IntegrityError("a release is a flat folder of plain files", where=str(path), remedy="move it out of the folder")
        if path.suffix not in SAFE_SUFFIXES:
            raise IntegrityError(
                "not a safe format: it may run code when loaded",
                where=str(path),
                remedy=f"only {', '.join(SAFE_SUFFIXES)} are allowed; save weights as safetensors",
            )
        if path.name not in (MANIFEST, SIGNATURE):
            found.append(path)
    return found


def check_content(path: Path) -> None:
    """A file is what its suffix says: a safetensors header, JSON that names no remote code, or UTF-8 text."""
    if path.suffix == ".safetensors":
        _check_safetensors(path)
    elif path.suffix == ".json":
        value = read_json(path)
        if isinstance(value, dict) and value.get("auto_map"):
            raise IntegrityError(
                "`auto_map` asks the loader to run code from the folder",
                where=str(path),
                remedy="remove the key; remote code is never run",
            )
    elif path.suffix != ".model":
        try:
            path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise IntegrityError(
                "a text file that is not UTF-8 text", where=str(path), remedy="remove it from the folder"
            ) from error


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise IntegrityError(
            f"not a safetensors file ({error})", where=str(path), remedy="save the weights with safetensors"
        ) from error


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises IntegrityError when it is missing, too large or not JSON."""
    if not path.is_file():
        raise IntegrityError("the file is missing", where=str(path), remedy="name a complete folder")
    with storage_errors(path, reading=True):
        if path.stat().st_size > _MAX_JSON:
            raise IntegrityError(
                "a JSON file this large is not read",
                where=str(path),
                value=path.stat().st_size,
                remedy=f"the bound is {_MAX_JSON} bytes",
            )
        data = path.read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"not JSON ({error})", where=str(path), remedy="restore it from its source or a backup") from error


def require(names: Iterable[str], present: Iterable[str], where: str) -> None:
    """Raise IntegrityError naming the first required file that is not there."""
    there = set(present)
    for name in names:
        if name not in there:
            raise IntegrityError(
                f"{name} is missing", where=where, remedy="write it into the weights folder before building the release"
            )
