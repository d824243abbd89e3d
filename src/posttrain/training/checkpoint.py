"""Checkpoints: complete or absent. A background thread writes the newest state, as often as a twentieth of the time allows; a kill
loses the steps since the last one, and the resumed run repeats them to the bit."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.errors import CheckpointError
from posttrain.files.atomic import atomic_folder, write_json
from posttrain.files.hashing import hash_file

_STATE, _TENSORS, _PREFIX = "state.json", "tensors.safetensors", "step-"
_REMEDY = "delete this folder; the one before it is used"


_REST = (
    20  # seconds without a checkpoint per second spent writing the last one: a large state costs no more time than a small one
)


class Checkpointer:
    """Writes numbered checkpoint folders under `folder`, keeps the newest two, and never blocks training on the disk:
    while one is being written, only the newest waiting one is kept."""

    def __init__(self, folder: Path, identity: str) -> None:
        """`identity` ties checkpoints to one run and stage (a hash of options, data and parent)."""
        self.folder, self.identity = folder, identity
        self._waiting: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._wake, self._closed = threading.Condition(), False
        self._error: BaseException | None = None
        self._rested = 0.0  # the monotonic time from which the next checkpoint is due
        folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def due(self) -> bool:
        """Whether it is time for another checkpoint. Whoever writes regardless (the last step does) is served too."""
        self._raise()
        return time.monotonic() >= self._rested

    def write(self, tensors: dict[str, Tensor], state: Mapping[str, Any]) -> None:
        self._raise()
        with self._wake:
            self._rested = float("inf")  # until it is written
            self._waiting = (tensors, {**state, "identity": self.identity})
            self._wake.notify()

    def close(self) -> None:
        """Wait for what is still waiting to be written."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self._raise()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                tensors, state = self._waiting
                self._waiting = None
            started = time.monotonic()
            try:
                self._write(tensors, state)
            except BaseException as error:  # handed to the training thread
                self._error = error
                return
            ended = time.monotonic()
            self._rested = ended + _REST * (ended - started)

    def _write(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        target = self.folder / f"{_PREFIX}{state['steps_done']:07d}"
        if target.exists():
            return
        with atomic_folder(target) as scratch:
            save_file(tensors, scratch / _TENSORS)
            write_json(scratch / _STATE, {**state, "sha256": hash_file(scratch / _TENSORS)})
        for old in _complete(self.folder)[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / _STATE).exists()) if folder.exists() else []


def read_checkpoint(folder: Path, identity: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest checkpoint, or None. Raises CheckpointError when it is altered or another run's."""
    complete = _complete(folder)
    if not complete:
        return None
    newest = complete[-1]
    state = _state(newest)
    if state["identity"] != identity:
        raise CheckpointError(
            "the checkpoint was made with other options, data or parent",
            where=str(newest),
            remedy="start the run under a new name, or delete the stage's checkpoint folder",
        )
    if not (newest / _TENSORS).exists() or hash_file(newest / _TENSORS) != state["sha256"]:
        raise CheckpointError("the checkpoint's tensors were altered or are gone", where=str(newest), remedy=_REMEDY)
    return load_file(newest / _TENSORS), state


def _state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / _STATE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's state cannot be read ({error})", where=str(folder), remedy=_REMEDY) from error
    lacking = sorted({"identity", "sha256", "steps_done"} - set(state if isinstance(state, dict) else ()))
    if lacking:
        raise CheckpointError(f"the checkpoint's state lacks {', '.join(lacking)}", where=str(folder), remedy=_REMEDY)
    return dict(state)
