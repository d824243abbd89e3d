"""A device that is not there is named before anything is loaded, by every command that loads a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli import app


@pytest.mark.parametrize("command", [["evaluate", "no-such-base"], ["serve"], ["serve-engine", "--base", "no-such-base"]])
def test_a_command_names_the_device_that_is_not_there(command: list[str], tmp_path: Path) -> None:
    runs = [] if command[0] == "serve-engine" else ["--runs", str(tmp_path)]
    done = CliRunner().invoke(app, [*command, *runs, "--device", "cuda:77"])
    assert done.exit_code == 1 and "no such GPU" in done.output and "device=cpu" in done.output  # not: no such base
    assert not list(tmp_path.iterdir())
