"""From a release to the dense weights its children start from: the base, a dense release, or a parent with its adapter merged in.

Merged weights are a cache, content-addressed by their fingerprint: they can be deleted and are made again from the releases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain.contract import Contract, Sequence
from posttrain.contract.probes import PROBES
from posttrain.errors import BindingError
from posttrain.files.atomic import atomic_folder, write_json
from posttrain.policy.base import resolve_base
from posttrain.policy.pack import Pack
from posttrain.policy.policy import Policy
from posttrain.policy.weights import merge_adapter, save_dense
from posttrain.releases import Kind, Registry, Release

_NOTE = "parent.json"


@dataclass(frozen=True, slots=True)
class Weights:
    """A dense weights folder with what it is: its fingerprint, the release it stands for (None: the base) and the merge's parity."""

    folder: Path
    fingerprint: str
    release: str | None = None
    parity: Mapping[str, float] | None = None


class Parents:
    """Finds or makes the dense weights of releases, under `cache`."""

    def __init__(self, registry: Registry, base: str, cache: Path, dtype: torch.dtype | None) -> None:
        self.registry, self.base, self.cache, self.dtype = registry, base, cache, dtype

    def base_weights(self) -> Weights:
        folder = resolve_base(self.base)
        return Weights(folder, _fingerprint_of(folder, self.dtype, self.cache))

    def runs_on(self, release: Release) -> Weights:
        """The weights a release is loaded on: its own when dense, else the exact parent it is bound to."""
        if release.lineage.kind is Kind.DENSE:
            return Weights(release.folder, release.runs_on, release.id)
        return self.origin(release)

    def origin(self, release: Release) -> Weights:
        """The weights a release's training started from. Raises BindingError where others are found."""
        parent, base = release.lineage.parent, release.lineage.base
        weights = self.base_weights() if parent.release is None else self.merged(self.registry.get(parent.release))
        if weights.fingerprint == parent.fingerprint:
            return weights
        if parent.release is None:
            what, remedy = f"{self.base} is not the base it was trained on", f"name its own (--base {base}), with the weights of"
        else:
            what, remedy = f"the weights merged from {parent.release} are not those it was trained on", "restore the weights of"
        remedy = f"{remedy} fingerprint {parent.fingerprint}"
        raise BindingError(what, where=release.id, value=weights.fingerprint, remedy=remedy)

    def merged(self, release: Release) -> Weights:
        """The weights children of a release start from: its adapter merged in fp32 and rounded once; a dense release is itself."""
        if release.lineage.kind is Kind.DENSE:
            return Weights(release.folder, release.runs_on, release.id)
        folder = self.cache / release.id
        if not (folder / _NOTE).exists():
            self._merge(release, self.runs_on(release), folder)
        return _read_note(folder, release.id)

    def _merge(self, release: Release, on: Weights, folder: Path) -> None:
        policy, contract = Policy.load(on.folder, self.dtype), Contract.load(release.folder)
        policy.load_adapter("main", release.folder, expected_parent=release.runs_on)
        before = _probe_logprobs(policy, contract)
        merge_adapter(policy, "main")
        gap = (_probe_logprobs(policy, contract) - before).abs()
        parity = {"max_abs_logprob": float(gap.max()), "mean_abs_logprob": float(gap.mean()), "probes": float(len(gap))}
        with atomic_folder(folder, replace=True) as scratch:
            save_dense(policy.base, scratch)
            contract.save(scratch)
            write_json(scratch / _NOTE, {"fingerprint": policy.fingerprint, "release": release.id, "parity": parity})


def _probe_logprobs(policy: Policy, contract: Contract) -> torch.Tensor:
    """Log-probabilities of the contract's probe conversations, every token scored."""
    with torch.no_grad():
        return policy.logprobs(Pack.of([_all_learned(contract.render(probe)) for probe in PROBES]))


def _all_learned(sequence: Sequence) -> Sequence:
    weights = sequence.weights.copy()
    weights[1:] = 1
    return Sequence(sequence.ids, weights, sequence.origin)


def _fingerprint_of(folder: Path, dtype: torch.dtype | None, cache: Path) -> str:
    """Fingerprint of a base folder, remembered beside its weights' size and time so that a run does not hash it for every stage."""
    import json

    files = sorted(folder.glob("*.safetensors"))
    key = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    note = cache / "base.json"
    if note.exists():
        known = json.loads(note.read_text("utf-8"))
        if known["folder"] == str(folder) and known["files"] == key:
            return str(known["fingerprint"])
    found = Policy.load(folder, dtype).fingerprint
    cache.mkdir(parents=True, exist_ok=True)
    write_json(note, {"folder": str(folder), "files": key, "fingerprint": found})
    return found


def _read_note(folder: Path, release: str) -> Weights:
    import json

    note = json.loads((folder / _NOTE).read_text("utf-8"))
    return Weights(folder, note["fingerprint"], release, note["parity"])
