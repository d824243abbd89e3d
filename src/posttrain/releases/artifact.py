"""A release: an immutable folder, named by what is in it, that PEFT, vLLM or transformers load as it stands."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.contract.lock import LOCK_FILE, ContractLock
from posttrain.errors import BindingError, GateError, IntegrityError, StorageError
from posttrain.evaluation.scorecard import Scorecard
from posttrain.evaluation.verdict import Verdict
from posttrain.files.atomic import atomic_folder, write_bytes
from posttrain.files.hashing import canonical_json, hash_file
from posttrain.releases.lineage import Kind, Lineage, Override, plain, verdict_from_json
from posttrain.releases.manifest import (
    MANIFEST,
    Manifest,
    check_content,
    read_json,
    read_manifest,
    require,
    safe_files,
    verify_files,
)
from posttrain.releases.signing import sign, verify_signature

ADAPTER_WEIGHTS, DENSE_WEIGHTS, DENSE_INDEX = "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"
_REQUIRED = {Kind.ADAPTER: ("adapter_config.json", ADAPTER_WEIGHTS), Kind.DENSE: ("config.json",)}
_RECORDS = ("scorecard.json", "verdict.json", "lineage.json", "grammar.json", "override.json")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a stage hands over. `weights` is a flat folder with the adapter or model, tokenizer files and contract.lock.json;
    `grammar` is a `grammar_record(...)`."""

    weights: Path
    lineage: Lineage
    verdict: Verdict
    scorecard: Scorecard | Mapping[str, Any]
    grammar: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Release:
    """An accepted artifact. It exists only with a passed verdict, or with a person's recorded override."""

    id: str
    folder: Path
    manifest: Manifest
    lineage: Lineage
    verdict: Verdict
    contract: ContractLock
    override: Override | None

    @classmethod
    def build(cls, into: Path, parts: Parts, *, override: Override | None = None, sign_with: Path | None = None) -> Release:
        """Write `into/<id>/` in one step; the same parts give the same id and change nothing the second time.

        Raises GateError without a passed verdict or an override, IntegrityError for unsafe or missing files, StorageError when
        the disk is full.
        """
        if not parts.verdict.passed and override is None:
            raise GateError(
                f"the gate did not pass this candidate: {'; '.join(parts.verdict.reasons) or 'see verdict.json'}",
                where=parts.lineage.stage,
                value=parts.verdict.outcome.value,
                remedy="keep it as a Candidate, or record a person's override (by, why)",
            )
        return cls.open(_build(into, "release", parts, override=override, sign_with=sign_with))

    @classmethod
    def open(cls, folder: Path, *, key: Path | None = None, hashes: bool = True) -> Release:
        """A verified release. With `key` (a public PEM file) it must also be signed by that key.

        Raises IntegrityError naming the file that is missing, extra, altered or unsafe, GateError for what nobody accepted.
        `hashes=False` reads the records only, for listings; never load weights from what it returns.
        """
        manifest = _open(folder, "release", key, hashes)
        override = (
            Override.from_json(read_json(folder / "override.json"), str(folder)) if "override.json" in manifest.files else None
        )
        verdict = _verdict(folder)
        if not verdict.passed and override is None:
            raise GateError(
                "the release carries neither a passed verdict nor an override",
                where=str(folder),
                value=verdict.outcome.value,
                remedy="it was not built by posttrain; do not serve it",
            )
        return cls(manifest.id, folder, manifest, _lineage(folder), verdict, ContractLock.read(folder / LOCK_FILE), override)

    @property
    def runs_on(self) -> str:
        """Fingerprint of the dense weights that must be loaded to run it."""
        return self.lineage.runs_on

    @property
    def weights_sha256(self) -> str:
        """Hash of the adapter's or model's weights file (of the index, when they are in shards)."""
        files = self.manifest.files
        return files[next(name for name in (ADAPTER_WEIGHTS, DENSE_WEIGHTS, DENSE_INDEX) if name in files)]

    @property
    def scorecard(self) -> Mapping[str, Any]:
        return dict(read_json(self.folder / "scorecard.json"))

    @property
    def grammar(self) -> Mapping[str, Any]:
        return dict(read_json(self.folder / "grammar.json"))


@dataclass(frozen=True, slots=True)
class Candidate:
    """The record of what a gate did not pass: kept to be read, never promoted. `weights` says whether they were kept too."""

    id: str
    folder: Path
    manifest: Manifest
    lineage: Lineage
    verdict: Verdict
    weights: bool

    @classmethod
    def build(cls, into: Path, parts: Parts, *, keep_weights: bool = True) -> Candidate:
        """Write `into/<id>/` in one step, with the weights or with the records only."""
        return cls.open(_build(into, "candidate", parts, keep_weights=keep_weights))

    @classmethod
    def open(cls, folder: Path, *, hashes: bool = True) -> Candidate:
        """A verified candidate; errors as for `Release.open`."""
        manifest = _open(folder, "candidate", None, hashes)
        return cls(manifest.id, folder, manifest, _lineage(folder), _verdict(folder), LOCK_FILE in manifest.files)

    def parts(self) -> Parts:
        """What it was built from, so that a person's override can make a release of it."""
        if not self.weights:
            raise GateError(
                "only the record of this candidate was kept, not its weights", where=self.id, remedy="run its stage again"
            )
        scorecard, grammar = (read_json(self.folder / f"{name}.json") for name in ("scorecard", "grammar"))
        return Parts(self.folder, self.lineage, self.verdict, scorecard, grammar)


def check_binding(release: Release, fingerprint: str) -> None:
    """Raise BindingError unless `fingerprint` is of the exact weights the release runs on."""
    if release.runs_on != fingerprint:
        is_adapter = release.lineage.kind is Kind.ADAPTER
        parent = release.lineage.parent.release or f"base {release.lineage.base}"
        raise BindingError(
            f"the {'adapter was trained on parent' if is_adapter else 'release holds'} weights {release.runs_on}",
            where=release.id,
            value=fingerprint,
            remedy=f"load {parent if is_adapter else release.id}, or train it again on these weights",
        )


def _open(folder: Path, kind: str, key: Path | None, hashes: bool) -> Manifest:
    manifest = read_manifest(folder)
    where = str(folder)
    if manifest.kind != kind:
        raise GateError(
            f"this is a {manifest.kind}, not a {kind}",
            where=where,
            remedy="a candidate is promoted only through a person's recorded override",
        )
    if folder.name[:2] in ("r-", "c-") and folder.name != manifest.id:
        raise IntegrityError(
            "the folder's name is not the id of its content",
            where=where,
            value=manifest.id,
            remedy="it was swapped or edited: fetch it again",
        )
    if key is not None:
        verify_signature(folder, key)
    require(_RECORDS[:-1], manifest.files, where)  # the override is there only when there was one
    if hashes:
        verify_files(folder, manifest)
    if LOCK_FILE in manifest.files or kind == "release":
        _require_weights(_lineage(folder), manifest.files, where)
    return manifest


def _lineage(folder: Path) -> Lineage:
    return Lineage.from_json(read_json(folder / "lineage.json"), str(folder / "lineage.json"))


def _verdict(folder: Path) -> Verdict:
    return verdict_from_json(read_json(folder / "verdict.json"), str(folder / "verdict.json"))


def _require_weights(lineage: Lineage, files: Mapping[str, str], where: str) -> None:
    require((*_REQUIRED[lineage.kind], LOCK_FILE), files, where)
    if lineage.kind is Kind.DENSE and DENSE_WEIGHTS not in files:
        require((DENSE_INDEX,), files, where)
    if (lineage.kind is Kind.DENSE) == (lineage.weights is None):
        raise IntegrityError(
            "dense weights need their fingerprint in the lineage, an adapter has none",
            where=where,
            value=lineage.weights,
            remedy="set Lineage.weights for dense releases only",
        )


def _build(
    into: Path,
    kind: str,
    parts: Parts,
    *,
    override: Override | None = None,
    sign_with: Path | None = None,
    keep_weights: bool = True,
) -> Path:
    """The id follows from the content, so it is known, and the folder's name with it, before the first byte is copied."""
    records = {
        f"{name}.json": canonical_json(plain(getattr(parts, name))) + b"\n"
        for name in ("lineage", "verdict", "scorecard", "grammar")
    }
    if override is not None:
        records["override.json"] = canonical_json(plain(override)) + b"\n"
    weights = [path for path in safe_files(parts.weights) if path.name not in _RECORDS] if keep_weights else []
    for path in weights:
        check_content(path)
    hashes = {path.name: hash_file(path) for path in weights} | {
        name: hashlib.sha256(data).hexdigest() for name, data in records.items()
    }
    manifest = Manifest(kind, dict(sorted(hashes.items())))
    if keep_weights:
        _require_weights(parts.lineage, manifest.files, str(parts.weights))
    target = into / manifest.id
    if not target.is_dir():
        with new_folder(target) as folder:
            for path in weights:
                shutil.copyfile(path, folder / path.name)
            for name, data in {**records, MANIFEST: manifest.data}.items():
                write_bytes(folder / name, data)
            verify_files(folder, manifest)
    if sign_with is not None:
        sign(target, sign_with)
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes `target`, read-only, in one step; losing that race to another process is success too,
    because a folder of that name has the same content."""
    try:
        with atomic_folder(target) as folder:
            yield folder
            for path in folder.iterdir():
                path.chmod(0o444)
    except StorageError:
        if not target.is_dir():
            raise
