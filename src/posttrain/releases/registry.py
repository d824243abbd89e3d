"""The registry: a folder of releases and candidates. Adding is one rename; what is there is found by looking."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import GateError, RegistryError, nearest
from posttrain.releases.artifact import Candidate, Parts, Release, new_folder
from posttrain.releases.lineage import Kind, Override
from posttrain.releases.manifest import verify_files


@dataclass(frozen=True, slots=True)
class Registry:
    """`root/releases/<id>/` and `root/candidates/<id>/`. With `key` (a public PEM file) every release must be signed by it."""

    root: Path
    key: Path | None = None

    @property
    def releases_folder(self) -> Path:
        return self.root / "releases"

    @property
    def candidates_folder(self) -> Path:
        return self.root / "candidates"

    # -- putting in ----------------------------------------------------------------------------------------------------

    def build(self, parts: Parts, *, override: Override | None = None, sign_with: Path | None = None) -> Release:
        """Build a release straight into the registry; the same parts twice are one release. Errors as `Release.build`."""
        return Release.build(self.releases_folder, parts, override=override, sign_with=sign_with)

    def keep(self, parts: Parts, *, keep_weights: bool = True) -> Candidate:
        """Keep the record of a candidate its gate did not pass."""
        return Candidate.build(self.candidates_folder, parts, keep_weights=keep_weights)

    def accept(self, candidate: str, override: Override, *, sign_with: Path | None = None) -> Release:
        """A release out of a kept candidate, on a person's recorded decision."""
        return self.build(self.candidate(candidate).parts(), override=override, sign_with=sign_with)

    def add(self, folder: Path) -> Release:
        """Bring in a release made elsewhere, verified first. Doing it twice changes nothing."""
        release = Release.open(folder, key=self.key)
        target = self.releases_folder / release.id
        if not target.is_dir():
            with new_folder(target) as copy:
                for path in sorted(folder.iterdir()):
                    shutil.copyfile(path, copy / path.name)
                verify_files(copy, release.manifest)
        return self.get(release.id)

    # -- finding -------------------------------------------------------------------------------------------------------

    def get(self, release_id: str) -> Release:
        """The release, with every byte verified.

        Raises RegistryError with the nearest ids, GateError for the id of a candidate, IntegrityError for an altered one.
        """
        folder = self.releases_folder / release_id
        if release_id not in _ids(self.releases_folder):
            if release_id in _ids(self.candidates_folder):
                raise GateError(
                    "its gate did not pass, so it is a candidate and cannot be served",
                    where=release_id,
                    remedy="run its stage again, or accept it with a recorded override",
                )
            raise unknown("release", release_id, _ids(self.releases_folder))
        return Release.open(folder, key=self.key)

    def candidate(self, candidate_id: str) -> Candidate:
        """The kept candidate, verified."""
        if candidate_id not in _ids(self.candidates_folder):
            raise unknown("candidate", candidate_id, _ids(self.candidates_folder))
        return Candidate.open(self.candidates_folder / candidate_id)

    def list(self) -> tuple[Release, ...]:
        """All releases by id, records only: bytes are verified by `get`."""
        return tuple(Release.open(self.releases_folder / name, key=self.key, hashes=False) for name in _ids(self.releases_folder))

    def candidates(self) -> tuple[Candidate, ...]:
        """All kept candidates by id, records only."""
        return tuple(Candidate.open(self.candidates_folder / name, hashes=False) for name in _ids(self.candidates_folder))

    # -- lineage -------------------------------------------------------------------------------------------------------

    def children(self, of: str) -> tuple[Release, ...]:
        """Releases whose parent is `of`: a release id or the fingerprint of weights."""
        return tuple(release for release in self.list() if _is_child(release, of))

    def lineage(self, release_id: str) -> tuple[Release, ...]:
        """The release, its parent, and so on down to the base, as far as this registry holds them."""
        by_id = {release.id: release for release in self.list()}
        if release_id not in by_id:
            raise unknown("release", release_id, by_id)
        return tuple(_ancestry(release_id, by_id.get))

    def stale_adapters(self, old: str, new: str) -> tuple[Release, ...]:
        """Adapters that must be made again when their parent moves from `old` to `new` (release ids or fingerprints).

        Those bound to `old` and whatever stands on them, parents before children; `new` itself, what it stands on and what stands
        on it stay good.
        """
        by_id = {release.id: release for release in self.list()}
        good = {
            release.id
            for start in by_id.values()
            if start.id == new or _is_child(start, new)
            for release in _ancestry(start.id, by_id.get)
        }
        stale: dict[str, Release] = {}
        waiting = [old] if old != new else []
        while waiting:
            parent = waiting.pop(0)
            for release in by_id.values():
                if _is_child(release, parent) and release.id not in good and release.id not in stale:
                    stale[release.id] = release
                    waiting.append(release.id)
        return tuple(release for release in stale.values() if release.lineage.kind is Kind.ADAPTER)


def unknown(kind: str, name: str, known: Iterable[str]) -> RegistryError:
    """A RegistryError that offers the nearest known names."""
    names = sorted(known)
    remedy = nearest(name, names, most=3, cutoff=0.4)
    if not remedy:
        remedy = f"known: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else f"there is no {kind} yet"
    return RegistryError(f"unknown {kind}", where="registry", value=name, remedy=remedy)


def _ids(folder: Path) -> list[str]:
    """Names of the folders there; hidden ones are builds in progress, and a file is nothing of ours."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_child(release: Release, of: str) -> bool:
    return of in (release.lineage.parent.release, release.lineage.parent.fingerprint)


def _ancestry(release_id: str, get: Callable[[str], Release | None]) -> Iterable[Release]:
    """Ids are hashes of content that names the parent's id, so a circle cannot be built."""
    release = get(release_id)
    while release is not None:
        yield release
        parent = release.lineage.parent.release
        release = get(parent) if parent is not None else None
