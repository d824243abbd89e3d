"""What a kill, a stray file or a second look may not change about releases and channels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.conftest import Killed, tiny_recipe
from posttrain.errors import IntegrityError
from posttrain.pipeline import measure
from posttrain.pipeline.registry import open_registry, promote_release
from posttrain.pipeline.run import run_recipe
from posttrain.recipe import Recipe, parse_recipe
from posttrain.releases import Channels, Move, Parts, Registry, Release
from releases.release_making import add_release


@pytest.fixture(scope="module")
def stopped(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A run of one stage that was killed when two of its four channels had moved."""
    runs = tmp_path_factory.mktemp("stopped") / "runs"
    recipe = small(tiny_base, runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channels, "promote", killed_after(2, Channels.promote))
        with pytest.raises(Killed):
            run_recipe(recipe, quiet=True)
    return recipe, runs


def small(base: Path, runs: Path, **changes: Any) -> Recipe:
    whole = tiny_recipe(base, runs)
    whole["evaluation"] = {**whole["evaluation"], "kinds": {"lookup": 1, "high_risk": 1}}
    return parse_recipe({**whole, "stages": whole["stages"][:1], **changes})


def killed_after(count: int, promote: Callable[..., Move]) -> Callable[..., Move]:
    moved: list[Move] = []

    def moving(self: Channels, *what: str) -> Move:
        if len(moved) == count:
            raise Killed
        moved.append(promote(self, *what))
        return moved[-1]

    return moving


def elsewhere(stopped: tuple[Recipe, Path], folder: Path) -> tuple[Recipe, Path]:
    """A copy of the stopped run of its own."""
    runs = folder / "runs"
    shutil.copytree(stopped[1], runs)
    return stopped[0].model_copy(update={"output": str(runs)}), runs


def parts_of(release: Release) -> Parts:
    return Parts(release.folder, release.lineage, release.verdict, release.scorecard, release.grammar)


def test_a_run_killed_while_publishing_publishes_what_it_had_decided(
    stopped: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, runs = elsewhere(stopped, tmp_path)
    monkeypatch.setattr(measure.Measurer, "measure", lambda *_: pytest.fail("measured again"))
    (before,) = open_registry(runs)[0].list()
    summary = run_recipe(recipe, quiet=True)
    registry, channels = open_registry(runs)
    assert [release.id for release in registry.list()] == [before.id] == [summary["stages"][0]["release"]]
    assert set(channels.pointers().values()) == {before.id}
    assert len(channels.history()) == len(channels.names()) == 4, "no channel moved twice"
    assert json.loads((runs / "tiny/stages/sft/scorecard.json").read_text()) == registry.get(before.id).scorecard


def test_a_channel_that_somebody_moved_while_the_run_was_down_stays_there(stopped: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, runs = elsewhere(stopped, tmp_path)
    registry, channels = open_registry(runs)
    (release,) = registry.list()
    other = registry.build(replace(parts_of(release), scorecard={**release.scorecard, "candidate": "another"})).id
    channels.promote("production", other, "alice", "the other one is better")
    run_recipe(recipe, quiet=True)
    assert channels.current("production") == other
    assert channels.current("saas_C") == release.id


def test_weights_that_changed_since_they_were_measured_are_not_published(stopped: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, runs = elsewhere(stopped, tmp_path)
    with (runs / "tiny/stages/sft/weights/main/adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(IntegrityError, match=r"weights/main: .*not those that were measured.*delete the stage's folder"):
        run_recipe(recipe, quiet=True)


def test_promoting_says_what_is_stale_before_it_moves_and_a_stray_file_is_no_release(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    old, new = (add_release(registry, tmp_path / "w", fill=fill) for fill in (1.0, 2.0))
    channels = Channels(registry)
    channels.promote("production", old, "ann", "first")
    (registry.releases_folder / "README.txt").write_text("ours")
    assert promote_release(tmp_path, "production", new, by="ann", why="x", override=False) == [f"production: {old} -> {new}"]
    (registry.releases_folder / "r-torn").mkdir()
    with pytest.raises(IntegrityError, match="r-torn"):
        promote_release(tmp_path, "production", old, by="ann", why="y", override=False)
    assert channels.current("production") == new
