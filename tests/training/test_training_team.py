"""Two processes train what one does, and a checkpoint does not know how many wrote it."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import together
import torch

from posttrain.errors import RecipeError
from posttrain.policy import Pack
from posttrain.training import Team, team
from posttrain.training.team import Sharding, sharding_of
from tiny_models import random_ids, sequence

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as `accelerate launch` says it


def launched(kind: str, folder: Path, processes: int, stop: int = -1, **environment: str) -> Any:
    """What the first of `processes` processes ends with; None when they gave up."""
    if processes == 1:
        return together.run(kind, folder, stop)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", together.__file__, kind, str(folder), str(stop)]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), **environment}
    running = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    for process in running:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    end = folder / "end.pt"
    return torch.load(end, weights_only=True) if end.exists() else None


@pytest.mark.parametrize(
    "kind", ["sft", "grpo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dpo", "dr_grpo", "dapo", "gspo", "luffy"))]
)
def test_two_processes_take_the_steps_of_one(kind: str, tmp_path: Path) -> None:
    one, two = (launched(kind, tmp_path / str(count), count) for count in (1, 2))
    assert one is not None and two is not None
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=5e-4, rtol=0)


@pytest.mark.parametrize(
    "kind", ["dpo", pytest.param("sft", marks=pytest.mark.slow), pytest.param("grpo", marks=pytest.mark.slow)]
)
def test_two_processes_that_share_the_weights_take_the_steps_of_one(kind: str, tmp_path: Path) -> None:
    one, two = launched(kind, tmp_path / "1", 1), launched(kind, tmp_path / "2", 2, **FSDP)
    assert one is not None and two is not None
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=5e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_a_checkpoint_does_not_know_whether_the_weights_were_shared(first: int, tmp_path: Path) -> None:
    whole = launched("sft", tmp_path / "whole", 1)
    environments: dict[int, dict[str, str]] = {1: {}, 2: FSDP}
    assert launched("sft", tmp_path / "parts", first, stop=5, **environments[first]) is None
    parts = launched("sft", tmp_path / "parts", 3 - first, **environments[3 - first])
    assert whole is not None and parts is not None
    assert parts["losses"][-6:] == pytest.approx(whole["losses"][-6:], abs=1e-4)


def test_each_process_holds_its_share_of_the_blocks_and_gathers_all_on_request(tmp_path: Path) -> None:
    held = launched("shares", tmp_path, 2, **FSDP)
    assert held["blocks"] == pytest.approx(held["whole"] / 2, rel=0.02)
    assert held["gathered"] == held["blocks again"] * 2 == held["whole"]
    assert held["difference"] < 1e-5  # of a pass that one process ran alone


@pytest.fixture(scope="module")
def edges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = launched("edges", tmp_path_factory.mktemp("edges"), 2)
    return found


def test_a_step_that_no_process_has_anything_to_learn_from_moves_nothing(edges: dict[str, Any]) -> None:
    assert edges["moved by nothing"] == 0


def test_gradients_of_one_process_that_are_no_numbers_stop_all_of_them_before_the_update(edges: dict[str, Any]) -> None:
    assert edges["refused"] == [True, True] and edges["moved by no numbers"] == 0


def test_an_order_may_take_longer_than_the_exchanges_of_training(edges: dict[str, Any]) -> None:
    assert edges["order"] == "go on"


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"FSDP_VERSION": "1"}, "version 2"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "dtype: bfloat16"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "recompute: true"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "FSDP version 2"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "`batch`"),
    ],
)
def test_what_accelerates_configuration_asks_for_is_done_or_refused(asked: dict[str, str], named: str) -> None:
    assert sharding_of(FSDP) == Sharding(reshard=True)
    assert sharding_of({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}) == Sharding(reshard=False)
    assert sharding_of({}) is None and sharding_of({"FSDP_OFFLOAD_PARAMS": "true"}) is None
    with pytest.raises(RecipeError, match=named):
        sharding_of({**FSDP, **asked})


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    whole = launched("sft", tmp_path / "whole", 1)
    assert launched("sft", tmp_path / "parts", before, stop=5) is None
    parts = launched("sft", tmp_path / "parts", after)
    assert whole is not None and parts is not None
    assert len(parts["losses"]) < len(whole["losses"])
    assert parts["losses"][-6:] == pytest.approx(whole["losses"][-6:], abs=1e-4)


def test_packs_are_shared_out_once_each_and_evenly() -> None:
    rng = random.Random(4)
    packs = [Pack.of([sequence(random_ids(length, rng), [length - 1])]) for length in (50, 3, 48, 20, 21, 9, 2)]
    for size in (1, 2, 3, 9):
        shares = [Team(rank, size).own(packs) for rank in range(size)]
        assert sorted(id(pack) for share in shares for pack in share) == sorted(map(id, packs))
        assert len({len(share) + Team(rank, size).idle(packs) for rank, share in enumerate(shares)}) == 1
        assert max(sum(pack.tokens for pack in share) for share in shares) <= sum(pack.tokens for pack in packs) / size + 50


def test_alone_nothing_is_exchanged() -> None:
    alone, tensor = team(), torch.ones(3)
    alone.sum_([tensor])
    alone.copy_([tensor])
    assert (alone.size, alone.first, tensor.tolist()) == (1, True, [1.0] * 3)
    assert alone.joined(alone.split("abc")) == ["a", "b", "c"] and alone.share(7) == alone.order(7) == 7
    assert alone.totals({"loss": 2.0}) == {"loss": 2.0}
