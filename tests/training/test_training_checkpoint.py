"""Checkpoints: complete or absent, of this run or refused, and never in training's way."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.errors import CheckpointError, StorageError
from posttrain.training import Checkpointer, read_checkpoint
from posttrain.training import checkpoint as checkpoint_module


def write(folder: Path, *steps: int, identity: str = "run") -> None:
    for step in steps:  # one writer each: only what is waiting when it closes is sure to be written
        writer = Checkpointer(folder, identity)
        writer.write({"x": torch.full((3,), float(step))}, {"steps_done": step, "cursor": {"step": step}})
        writer.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path, 7)
    found = read_checkpoint(tmp_path, "run")
    assert found is not None
    tensors, state = found
    assert tensors["x"].tolist() == [7.0, 7.0, 7.0]
    assert state["steps_done"] == 7 and state["cursor"] == {"step": 7}


def test_without_a_checkpoint_there_is_nothing_to_read(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path, "run") is None
    assert read_checkpoint(tmp_path / "absent", "run") is None


def test_the_newest_is_read_and_only_two_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 9, 10, 11)
    assert names(tmp_path) == ["step-0000010", "step-0000011"]
    found = read_checkpoint(tmp_path, "run")
    assert found is not None and found[1]["steps_done"] == 11


def test_only_safe_formats_are_written(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert names(tmp_path / "step-0000001") == ["state.json", "tensors.safetensors"]


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 3, identity="run")
    with pytest.raises(CheckpointError, match="other options, data or parent") as caught:
        read_checkpoint(tmp_path, "other run")
    assert caught.value.where == str(tmp_path / "step-0000003") and caught.value.remedy


def test_altered_tensors_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 3)
    file = tmp_path / "step-0000003" / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="altered"):
        read_checkpoint(tmp_path, "run")


def test_tensors_cut_short_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 3)
    file = tmp_path / "step-0000003" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="altered"):
        read_checkpoint(tmp_path, "run")


def test_after_deleting_the_altered_one_the_one_before_it_is_used(tmp_path: Path) -> None:
    write(tmp_path, 3, 4)
    shutil.rmtree(tmp_path / "step-0000004")
    found = read_checkpoint(tmp_path, "run")
    assert found is not None and found[1]["steps_done"] == 3


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"steps_done": 3}'])
def test_a_garbled_state_is_a_checkpoint_error(tmp_path: Path, text: str) -> None:
    write(tmp_path, 3)
    (tmp_path / "step-0000003" / "state.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path, "run")


def test_missing_tensors_are_a_checkpoint_error(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / "step-0000003" / "tensors.safetensors").unlink()
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path, "run")


def test_a_folder_a_killed_writer_left_behind_is_not_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 3)
    half = tmp_path / ".step-0000004.abc.partial"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    (tmp_path / "step-0000005").mkdir()
    (tmp_path / "step-0000005" / "tensors.safetensors").write_bytes(b"no state beside it")
    found = read_checkpoint(tmp_path, "run")
    assert found is not None and found[1]["steps_done"] == 3


def test_training_never_waits_for_the_disk_and_the_newest_state_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, started = threading.Event(), threading.Event()
    inner = checkpoint_module.save_file
    written: list[int] = []

    def slow(tensors: dict[str, torch.Tensor], path: Any) -> None:
        started.set()
        assert gate.wait(20)
        written.append(int(tensors["x"][0]))
        inner(tensors, path)

    monkeypatch.setattr(checkpoint_module, "save_file", slow)
    writer = Checkpointer(tmp_path, "run")
    writer.write({"x": torch.full((1,), 1.0)}, {"steps_done": 1})
    assert started.wait(20)
    for step in (2, 3, 4):  # returns at once while the first is being written
        writer.write({"x": torch.full((1,), float(step))}, {"steps_done": step})
    gate.set()
    writer.close()
    assert written == [1, 4]


def test_closing_writes_what_still_waits(tmp_path: Path) -> None:
    writer = Checkpointer(tmp_path, "run")
    for step in range(1, 30):
        writer.write({"x": torch.zeros(1)}, {"steps_done": step})
    writer.close()
    found = read_checkpoint(tmp_path, "run")
    assert found is not None and found[1]["steps_done"] == 29


def test_a_disk_that_fails_is_reported_to_the_training_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise StorageError("the disk is full", where="checkpoint")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    writer = Checkpointer(tmp_path, "run")
    writer.write({"x": torch.zeros(1)}, {"steps_done": 1})
    with pytest.raises(StorageError, match="disk is full"):
        writer.close()
    assert read_checkpoint(tmp_path, "run") is None


def test_a_disk_that_failed_is_reported_at_the_next_write_at_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise StorageError("the disk is full", where="checkpoint")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    writer = Checkpointer(tmp_path, "run")
    writer.write({"x": torch.zeros(1)}, {"steps_done": 1})
    writer._thread.join(20)
    with pytest.raises(StorageError, match="disk is full"):
        writer.write({"x": torch.zeros(1)}, {"steps_done": 2})


def test_a_step_that_is_already_there_is_not_written_again(tmp_path: Path) -> None:
    write(tmp_path, 3)
    before = (tmp_path / "step-0000003" / "state.json").stat().st_mtime_ns
    write(tmp_path, 3)
    assert (tmp_path / "step-0000003" / "state.json").stat().st_mtime_ns == before


def test_the_state_is_readable_json_with_its_identity(tmp_path: Path) -> None:
    write(tmp_path, 3)
    state = json.loads((tmp_path / "step-0000003" / "state.json").read_text("utf-8"))
    assert state["identity"] == "run" and len(state["sha256"]) == 64
