"""What a user can get wrong outside the recipe's keys: an error that names place, cause and remedy, and no traceback."""

from __future__ import annotations

import mmap
import shutil
import socket
from pathlib import Path

import pytest

from posttrain.contract import Contract
from posttrain.errors import BaseModelError, ContractError, DataError, RecipeError, StorageError, TrainingError
from posttrain.pipeline.checks import check_students
from posttrain.pipeline.folder import RunFolder, forget_peak_memory, peak_memory_mb
from posttrain.pipeline.run import run_recipe
from posttrain.pipeline.serve import check_address
from posttrain.policy.base import free_bytes
from posttrain.recipe import Recipe, parse_recipe
from posttrain.report import write_report
from tiny_models import tiny_model


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    gate = {"targets": [{"metric": "tool_success"}]}
    recipe = parse_recipe(
        {"name": "x", "base": "b", "output": str(tmp_path / "file"), "stages": [{"name": "s", "kind": "sft", "gate": gate}]}
    )
    with pytest.raises(StorageError, match="file"):
        RunFolder.open(recipe)
    with pytest.raises(StorageError, match="is a file, not a folder"):
        free_bytes(tmp_path / "file" / "runs")


def test_a_base_without_a_tokenizer_is_refused_in_one_line(tiny_base: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny_base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "*.lock.json"))
    with pytest.raises(ContractError, match="tokenizer cannot be read") as caught:
        Contract.load(bare)
    assert str(bare) in str(caught.value) and "\n" not in str(caught.value)


def test_layers_that_no_student_can_be_fitted_to_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    tiny_model("gemma3").config.save_pretrained(tmp_path)

    def recipe(refit: float) -> Recipe:
        gate = {"targets": [{"metric": "latency_ratio", "at_most": 0.6}]}
        stage = {"name": "s", "kind": "distill", "gate": gate, "options": {"layers": 2, "refit": refit}}
        return parse_recipe({"name": "x", "base": "b", "output": str(tmp_path), "stages": [stage]})

    with pytest.raises(BaseModelError, match=r"cannot be refitted.*set refit to 0"):
        check_students(recipe(0.1), tmp_path)
    check_students(recipe(0), tmp_path)


def test_what_failed_is_seen_although_the_other_processes_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(recipe: Recipe, quiet: bool, alone: bool) -> None:
        raise TrainingError("diverged")

    def gone(order: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("posttrain.pipeline.run._first", fail)
    monkeypatch.setattr("posttrain.pipeline.run.call", gone)
    gate = {"targets": [{"metric": "tool_success"}]}
    recipe = parse_recipe({"name": "x", "base": "b", "stages": [{"name": "s", "kind": "sft", "gate": gate}]})
    with pytest.raises(TrainingError, match="diverged"):
        run_recipe(recipe)


def test_a_torn_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"run": 1')
    with pytest.raises(DataError, match=r"summary\.json: is not JSON"):
        write_report(tmp_path)


@pytest.mark.parametrize("port", [0, -1, 99999])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(RecipeError, match="between 1 and 65535"):
        check_address("127.0.0.1", port)


def test_an_address_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RecipeError, match="cannot listen there"):
            check_address("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(RecipeError, match="cannot listen there"):
        check_address("no.such.host.invalid", 8000)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not keep the peak")
def test_a_stages_peak_does_not_count_what_was_freed_before() -> None:
    with mmap.mmap(-1, 256 << 20) as held:  # given back when closed, whatever the C heap is told to keep
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        most = peak_memory_mb()
    forget_peak_memory()
    assert peak_memory_mb() < most - 200
