"""A stage's process ends with what it says heard: nothing, an error for the user, an interrupt, or a death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import yaml

from pipeline.conftest import tiny_recipe
from posttrain.errors import RecipeError, TrainingError
from posttrain.evaluation import RunSummary
from posttrain.pipeline.apart import apart, can_be_apart
from posttrain.pipeline.run import run_recipe
from posttrain.recipe import parse_recipe


def test_what_is_done_apart_is_done_elsewhere(tmp_path: Path) -> None:
    apart(lambda: (tmp_path / "who").write_text(str(os.getpid())) and None, "stage")
    assert int((tmp_path / "who").read_text()) != os.getpid()


def test_an_error_for_the_user_is_raised_here_in_its_own_words() -> None:
    wanted = TrainingError("it diverged", where="step 3", value=float("nan"), remedy="lower the rate")

    def work() -> NoReturn:
        raise wanted

    with pytest.raises(TrainingError) as caught:
        apart(work, "stage")
    assert str(caught.value) == str(wanted)


def test_a_defect_shows_its_traceback_and_ends_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        apart(lambda: print(1 // 0), "stage")
    assert caught.value.code == 1
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_process_that_is_killed_is_an_error_that_says_how_to_go_on() -> None:
    with pytest.raises(TrainingError, match=r"sft: .*SIGKILL.*run the same command again"):
        apart(lambda: os.kill(os.getpid(), signal.SIGKILL), "sft")


def test_an_interrupt_of_the_stage_is_one_of_the_command() -> None:
    def work() -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apart(work, "stage")


_ADAPTER = "stages/sft/weights/main/adapter_model.safetensors"
_IN_ONE = """
import sys
from pathlib import Path
from posttrain.pipeline.run import run_recipe
from posttrain.recipe import load_recipe
run_recipe(load_recipe(Path(sys.argv[1]), []), quiet=True)
"""
_PARENT = """
import os, time
from posttrain.pipeline.apart import apart
def work():
    print(os.getpid(), flush=True)
    time.sleep(600)
apart(work, "stage")
"""


def test_a_killed_command_takes_its_stage_with_it() -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the stage lives on")


def test_a_gpu_or_several_processes_keep_their_stages() -> None:
    assert can_be_apart(torch.device("cpu")) == (sys.platform == "linux")
    assert not can_be_apart(torch.device("cuda"))


def test_a_road_of_processes_is_the_road_of_one(tiny_base: Path, tmp_path: Path) -> None:
    whole = tiny_recipe(tiny_base, tmp_path / "many")
    whole["stages"] = [whole["stages"][0], whole["stages"][4]]  # an adapter and dense weights
    paths = {place: tmp_path / f"{place}.yaml" for place in ("many", "one")}
    for place, path in paths.items():
        path.write_text(yaml.safe_dump({**whole, "output": str(tmp_path / place)}))

    def ran(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], check=True, timeout=300, capture_output=True, text=True)
        return done.stdout + done.stderr

    ran("-m", "posttrain", "run", str(paths["many"]))
    ran("-c", _IN_ONE, str(paths["one"]))
    adapters = [(tmp_path / place / "tiny" / _ADAPTER).read_bytes() for place in paths]
    assert adapters[0] == adapters[1]
    cards = [RunSummary.load(tmp_path / place / "tiny" / "summary.json").to_json() for place in paths]
    for ours, theirs in zip(*([card["base"], *card["stages"]] for card in cards), strict=True):
        assert ours["metrics"].keys() == theirs["metrics"].keys()
        for name in ours["metrics"].keys() - {"latency_s", "latency_ratio", "episode_s"}:
            assert ours["metrics"][name] == theirs["metrics"][name]
    assert "nothing to do" in ran("-m", "posttrain", "run", str(paths["many"]))


def test_what_is_refused_before_a_run_is_refused_without_a_process(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        run_recipe(parse_recipe(tiny_recipe(tiny_base, tmp_path, device="cuda:77")), quiet=True, alone=True)
