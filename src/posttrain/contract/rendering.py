"""Rendering once: the sequences of a set of records under a contract, kept in memory-mapped arrays under their content's hash."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from posttrain.contract.contract import Contract
from posttrain.contract.sequence import Sequence
from posttrain.data import dataset_hash
from posttrain.data.records import Conversation, Preference
from posttrain.files.atomic import atomic_folder
from posttrain.files.hashing import sha256_of

Progress = Callable[[int], None]
_PARALLEL = 4000  # records from which starting more processes costs less than it saves
_CHUNK = 250
_COLUMNS = ("ids", "weights", "origin", "offsets")


@dataclass(frozen=True, slots=True, eq=False)
class Rendered(Seq[Sequence]):
    """Sequences as slices of flat arrays: sequence i is `[offsets[i], offsets[i + 1])`. The arrays may be memory-mapped."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    origin: NDArray[np.int16]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Seq[Sequence]) -> Rendered:
        columns = [[getattr(s, name) for s in sequences] for name in ("ids", "weights", "origin")]
        empty = (np.int32, np.float32, np.int16)
        ids, weights, origin = (
            np.concatenate(column) if column else np.zeros(0, kind) for column, kind in zip(columns, empty, strict=True)
        )
        return cls(ids, weights, origin, np.cumsum([0, *(len(s) for s in sequences)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Sequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sequence]: ...
    def __getitem__(self, index: int | slice) -> Sequence | list[Sequence]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Sequence(self.ids[rows], self.weights[rows], self.origin[rows])

    def __iter__(self) -> Iterator[Sequence]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders records under one contract. `cache`: a folder of earlier renderings, by the hash of records and contract (None: none
    is kept); it may be deleted at any time."""

    contract: Contract
    cache: Path | None = None

    def conversations(self, records: Seq[Conversation], progress: Progress | None = None) -> Seq[Sequence]:
        """One sequence a record, in order."""
        return self._all(records, progress)

    def preferences(self, records: Seq[Preference], progress: Progress | None = None) -> Seq[Sequence]:
        """Chosen and rejected of each record, in turn."""
        return self._all(records, progress)

    def _all(self, records: Seq[Any], progress: Progress | None) -> Seq[Sequence]:
        if self.cache is None or not records:
            return Rendered.of(_render(self.contract, records, progress))
        folder = self.cache / sha256_of([dataset_hash(records), self.contract.lock().fingerprint])
        if not folder.exists():
            found = Rendered.of(_render(self.contract, records, progress))
            with atomic_folder(folder) as scratch:
                for name in _COLUMNS:
                    np.save(scratch / f"{name}.npy", getattr(found, name))
        return Rendered(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS))


def _render(contract: Contract, records: Seq[Any], progress: Progress | None) -> list[Sequence]:
    workers = min(os.cpu_count() or 1, len(records) // (_PARALLEL // 2))
    chunks = [records[i : i + _CHUNK] for i in range(0, len(records), _CHUNK)]
    found: list[Sequence] = []
    if workers < 2:
        for chunk in chunks:
            found += _sequences(contract, chunk)
            if progress is not None:
                progress(len(chunk))
        return found
    # fresh processes: a fork of one in which torch has threads may hang
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start, initargs=(contract.tokenizer, contract.template.name)
    ) as pool:
        for chunk, part in zip(chunks, pool.map(_work, chunks), strict=True):
            found += part
            if progress is not None:
                progress(len(chunk))
    return found


def _sequences(contract: Contract, records: Seq[Any]) -> list[Sequence]:
    found: list[Sequence] = []
    for record in records:
        found += contract.render_preference(record) if isinstance(record, Preference) else [contract.render(record)]
    return found


_MINE: list[Contract] = []  # a worker's contract


def _start(tokenizer: Any, template: str) -> None:
    _MINE.append(Contract(tokenizer, template))


def _work(records: Seq[Any]) -> list[Sequence]:
    return _sequences(_MINE[0], records)
