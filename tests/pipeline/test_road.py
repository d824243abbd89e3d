"""The whole road on a tiny random model: every stage, its gate, its release or its record, the report, the way back, and serving."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from pipeline.conftest import make_base, tiny_recipe
from posttrain.errors import BindingError, ContractError, DataError, RecipeError, RegistryError
from posttrain.pipeline.evaluating import evaluate_target, load_target
from posttrain.pipeline.parents import Parents
from posttrain.pipeline.registry import open_registry, promote_release, registry_lines, registry_view
from posttrain.pipeline.run import run_recipe
from posttrain.policy import Policy
from posttrain.recipe import parse_recipe
from posttrain.releases import Kind
from posttrain.report import write_report
from posttrain.training.team import Sharding, Team, sharding_of

STAGES = ["sft", "tools", "preference", "reason", "distill", "adapters"]
TENANTS = ["bank_A", "retail_B", "saas_C"]


@pytest.fixture(scope="module")
def road(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The finished run: (runs folder, summary)."""
    output = tmp_path_factory.mktemp("runs")
    return output, run_recipe(parse_recipe(tiny_recipe(tiny_base, output)), quiet=True)


def test_every_stage_has_a_verdict_metrics_with_intervals_time_and_memory(road: tuple[Path, dict[str, Any]]) -> None:
    _, summary = road
    assert [stage["name"] for stage in summary["stages"]] == STAGES
    assert summary["status"] == "finished"
    for stage in [summary["base"], *summary["stages"]]:
        metric = stage["metrics"]["schema_validity_constrained"]
        assert metric["low"] <= metric["value"] <= metric["high"]
        assert metric["n"] > 0
        assert stage["seconds"] > 0
    assert all(stage["peak_memory_mb"] > 0 for stage in summary["stages"])
    assert json.loads((road[0] / "tiny" / "summary.json").read_text()) == summary


def test_a_trial_moves_nothing_that_is_served(tiny_base: Path, tmp_path: Path) -> None:
    whole = tiny_recipe(tiny_base, tmp_path, channel="trial")
    summary = run_recipe(parse_recipe({**whole, "stages": whole["stages"][:1]}), quiet=True)
    release = summary["stages"][0]["releases"]["main"]
    assert summary["channels"] == dict.fromkeys(["trial", *(f"trial-{tenant}" for tenant in TENANTS)], release)


def test_what_was_trained_on_four_bits_is_measured_and_released_on_the_dense_parent(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    whole = tiny_recipe(make_base(tmp_path / "base", hidden_size=64, intermediate_size=128, head_dim=16), tmp_path / "runs")
    stage = {**whole["stages"][0]}
    stage["options"] = {**stage["options"], "adapter": {"rank": 2, "base": "nf4"}}
    summary = run_recipe(parse_recipe({**whole, "stages": [stage, {**stage, "name": "next"}]}), quiet=True)
    registry, _ = open_registry(tmp_path / "runs")
    first, second = (registry.get(done["releases"]["main"]) for done in summary["stages"])
    assert second.lineage.parent.release == first.id  # the dense parent with the first adapter merged in
    assert first.lineage.kind is second.lineage.kind is Kind.ADAPTER
    assert first.runs_on == Policy.load(tmp_path / "base").fingerprint
    assert all(done["accepted"] and done["metrics"]["kl_to_parent"]["n"] > 0 for done in summary["stages"])


def test_four_bits_are_not_sharded_and_it_is_said_before_anything_is_loaded(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_recipe(tiny_base, tmp_path)
    whole["stages"][3]["options"]["adapter"]["base"] = "nf4"
    monkeypatch.setattr("posttrain.pipeline.checks.team", lambda: Team(0, 2, Sharding()))
    with pytest.raises(RecipeError, match=r"stages\.reason\.options\.adapter\.base"):
        run_recipe(parse_recipe(whole), quiet=True)


def test_a_failed_gate_stops_the_promotion_and_keeps_the_record(road: tuple[Path, dict[str, Any]]) -> None:
    output, summary = road
    tools = summary["stages"][1]
    assert not tools["accepted"]
    registry, channels = open_registry(output)
    assert registry.candidate(tools["releases"]["main"]).lineage.stage == "tools"
    assert all(move.release != tools["releases"]["main"] for move in channels.history())
    assert summary["stages"][2]["parent"] == summary["stages"][0]["releases"]["main"], (
        "the road goes on from the last accepted release"
    )


def test_channels_follow_the_road_and_tenants_get_their_own_adapter(road: tuple[Path, dict[str, Any]]) -> None:
    output, summary = road
    distilled, adapters = summary["stages"][4]["releases"]["main"], summary["stages"][5]["releases"]
    assert summary["channels"] == {"production": distilled, **adapters}
    assert sorted(adapters) == TENANTS
    registry, _ = open_registry(output)
    assert registry.get(distilled).lineage.kind is Kind.DENSE
    assert registry.get(distilled).lineage.teacher.release == summary["stages"][3]["releases"]["main"]
    assert {registry.get(release).lineage.tenant for release in adapters.values()} == set(TENANTS)
    assert {registry.get(release).runs_on for release in adapters.values()} == {registry.get(distilled).runs_on}


def test_a_release_is_measured_again_beside_the_weights_it_came_from(road: tuple[Path, dict[str, Any]], tiny_base: Path) -> None:
    output, summary = road
    teacher, student = (summary["stages"][place]["releases"]["main"] for place in (3, 4))
    assert load_target(teacher, str(tiny_base), output).parent is None  # its adapter's own, switched off
    beside = load_target(student, str(tiny_base), output).parent
    assert beside is not None
    assert beside.policy.fingerprint == open_registry(output)[0].get(student).lineage.teacher.fingerprint
    asked: dict[str, Any] = {"suite": "finance_ops", "split": "dev", "seed": 5, "n": 6, "base": str(tiny_base), "runs": output}
    again = evaluate_target(student, quiet=True, **asked)
    assert again.candidate == student
    assert again.metrics["latency_ratio"].n > 0
    assert again.metrics["kl_to_parent"].value > 0  # two of four layers


def test_a_release_is_not_measured_beside_another_base_than_its_own(
    road: tuple[Path, dict[str, Any]], tiny_base: Path, tmp_path: Path
) -> None:
    other = make_base(tmp_path / "other", initializer_range=0.2)
    registry, _ = open_registry(road[0])
    adapter = registry.get(road[1]["stages"][0]["releases"]["main"])
    dense = replace(adapter, lineage=replace(adapter.lineage, kind=Kind.DENSE, weights="a" * 64))
    parents = Parents(registry, str(other), tmp_path / "weights", None)
    for look in (lambda: parents.runs_on(adapter), lambda: parents.origin(dense)):
        with pytest.raises(BindingError, match=rf"other is not the base it was trained on.*--base {tiny_base}"):
            look()


def test_what_is_no_release_channel_or_base_is_said_to_be_neither(road: tuple[Path, dict[str, Any]], tiny_base: Path) -> None:
    with pytest.raises(RegistryError, match=r"unknown release, channel or base.*'prodution'.*did you mean production"):
        load_target("prodution", str(tiny_base), road[0])
    with pytest.raises(RegistryError, match=r"no registry here.*--runs"):
        load_target("production", str(tiny_base), road[0] / "elsewhere")


def test_moving_a_parent_names_the_adapters_that_must_be_made_again(road: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    output, summary = road
    copy = tmp_path / "runs"
    shutil.copytree(output, copy)
    lines = promote_release(copy, "production", summary["stages"][0]["releases"]["main"], by="alice", why="test", override=False)
    stale = {line.split(": ")[1].split(" ")[0] for line in lines if line.startswith("must be made again")}
    assert stale == set(summary["stages"][5]["releases"].values())


def test_rollback_goes_to_the_release_before_with_a_line_of_history(road: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copy = tmp_path / "runs"
    shutil.copytree(road[0], copy)
    _, channels = open_registry(copy)
    channels.rollback("production", "alice", "complaints")
    assert channels.current("production") == road[1]["stages"][3]["releases"]["main"]
    assert "complaints" in "\n".join(registry_lines(registry_view(copy)))


def test_a_person_may_release_what_the_gate_refused_on_their_name(road: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copy = tmp_path / "runs"
    shutil.copytree(road[0], copy)
    promote_release(copy, "production", road[1]["stages"][1]["releases"]["main"], by="alice", why="needed today", override=True)
    registry, channels = open_registry(copy)
    override = registry.get(channels.current("production")).override
    assert override is not None
    assert (override.by, override.why) == ("alice", "needed today")


def test_a_finished_run_does_nothing(road: tuple[Path, dict[str, Any]], tiny_base: Path) -> None:
    before = (road[0] / "tiny" / "metrics.jsonl").read_bytes()
    assert run_recipe(parse_recipe(tiny_recipe(tiny_base, road[0])), quiet=True) == road[1]
    assert (road[0] / "tiny" / "metrics.jsonl").read_bytes() == before


def test_a_run_folder_belongs_to_one_recipe(road: tuple[Path, dict[str, Any]], tiny_base: Path) -> None:
    with pytest.raises(RecipeError, match="another recipe"):
        run_recipe(parse_recipe(tiny_recipe(tiny_base, road[0], seed=2)), quiet=True)


def test_the_report_names_every_stage(road: tuple[Path, dict[str, Any]]) -> None:
    page = (road[0] / "tiny" / "report.html").read_text()
    assert all(stage in page for stage in STAGES)


def test_the_report_says_what_was_measured_before_the_first_step(road: tuple[Path, dict[str, Any]]) -> None:
    page = (road[0] / "tiny" / "report.html").read_text()
    assert "collect solved share <b>0</b> · collect demonstrated <b>2</b> · collect kept <b>2</b>" in page  # a random model
    assert "fit distance <b>" in page


def test_the_report_is_one_page_that_loads_nothing_and_runs_nothing(road: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(road[0] / "tiny", tmp_path / "tiny")
    samples = tmp_path / "tiny" / "stages" / "sft" / "samples.json"
    found = json.loads(samples.read_text())
    found[0]["output"] = "<script>alert(1)</script>"
    samples.write_text(json.dumps(found[:1]))
    page = write_report(tmp_path / "tiny").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", page)


def test_the_report_of_a_killed_run_shows_what_is_done_and_says_so(road: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(road[0] / "tiny", tmp_path / "tiny")
    summary = tmp_path / "tiny" / "summary.json"
    done = json.loads(summary.read_text())
    summary.write_text(json.dumps({**done, "status": "running", "stages": done["stages"][:2]}))
    with (tmp_path / "tiny" / "metrics.jsonl").open("a") as log:
        log.write('{"torn')
    page = write_report(tmp_path / "tiny").read_text()
    assert "This run is running" in page and "tools did not pass its gate" in page and "distill" not in page


def test_too_few_tasks_are_found_before_anything_is_trained(tiny_base: Path, tmp_path: Path) -> None:
    raw = tiny_recipe(tiny_base, tmp_path)
    raw["stages"][3]["data"]["n"] = 3
    with pytest.raises(DataError, match=r"too few tasks.*at least 4") as caught:
        run_recipe(parse_recipe(raw), quiet=True)
    assert caught.value.where == "stages.reason.data"
    assert not list(tmp_path.rglob("scorecard.json"))


def test_a_folder_without_a_run_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no summary"):
        write_report(tmp_path)


def test_an_adapter_is_refused_on_other_weights(road: tuple[Path, dict[str, Any]], tiny_base: Path) -> None:
    from posttrain.policy import Policy

    registry, _ = open_registry(road[0])
    release = registry.get(road[1]["stages"][5]["releases"]["bank_A"])
    with pytest.raises(BindingError, match="another parent"):
        Policy.load(tiny_base).load_adapter("x", release.folder, expected_parent=release.runs_on)


def test_a_release_with_another_contract_is_refused(road: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from posttrain.contract import Contract

    registry, _ = open_registry(road[0])
    folder = tmp_path / "release"
    shutil.copytree(registry.get(road[1]["stages"][0]["releases"]["main"]).folder, folder)
    lock = folder / "contract.lock.json"
    lock.chmod(0o644)
    value = json.loads(lock.read_text())
    value["goldens"][0]["ids"][0] += 1
    lock.write_text(json.dumps(value))
    with pytest.raises(ContractError, match="golden"):
        Contract.load(folder)


def test_the_channels_are_served_to_their_tenants_only(
    road: tuple[Path, dict[str, Any]], tiny_base: Path, tmp_path: Path
) -> None:
    from starlette.testclient import TestClient

    from posttrain.pipeline.served import application, ensure_keys

    registry, channels = open_registry(road[0])
    keys = ensure_keys(tmp_path / "keys.json", channels)
    assert sorted(keys) == sorted([*TENANTS, "production"])
    app = application(registry, channels, str(tiny_base), road[0] / "weights", tmp_path / "keys.json", tmp_path / "audit.jsonl")
    with TestClient(app) as client:
        body = {"model": "default", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        body["model"] = client.get("/v1/models", headers=_key(keys["bank_A"])).json()["data"][0]["id"]
        assert client.post("/v1/chat/completions", json=body, headers=_key(keys["bank_A"])).status_code == 200
        assert client.post("/v1/chat/completions", json=body, headers=_key(keys["saas_C"])).status_code in (403, 404)
        assert client.post("/v1/chat/completions", json=body, headers=_key("pt-wrong")).status_code == 401
    assert road[1]["channels"]["bank_A"] in (tmp_path / "audit.jsonl").read_text()


def test_channels_on_other_weights_than_most_are_refused_and_the_others_served(
    road: tuple[Path, dict[str, Any]], tiny_base: Path, tmp_path: Path
) -> None:
    from starlette.testclient import TestClient

    from posttrain.pipeline.served import application, ensure_keys, left_out

    runs = tmp_path / "runs"
    shutil.copytree(road[0], runs)
    registry, channels = open_registry(runs)
    assert left_out(channels) == []
    channels.promote("production", road[1]["stages"][0]["release"], by="a test", why="an earlier stage's weights")
    assert left_out(channels) == ["production"]
    keys = ensure_keys(runs / "keys.json", channels)
    app = application(registry, channels, str(tiny_base), runs / "weights", runs / "keys.json", runs / "audit.jsonl")
    with TestClient(app) as client:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        for channel, status in (("bank_A", 200), ("production", 503)):
            answer = client.post("/v1/chat/completions", json={**body, "model": channel}, headers=_key(keys[channel]))
            assert answer.status_code == status, answer.text


def test_a_running_server_heeds_keys_that_are_issued_and_revoked(
    road: tuple[Path, dict[str, Any]], tiny_base: Path, tmp_path: Path
) -> None:
    from starlette.testclient import TestClient
    from typer.testing import CliRunner

    from posttrain.cli import app as commands
    from posttrain.pipeline.served import application, ensure_keys

    runs = tmp_path / "runs"
    shutil.copytree(road[0], runs)
    registry, channels = open_registry(runs)
    ensure_keys(runs / "keys.json", channels)

    def said(*command: str, code: int = 0) -> str:
        done = CliRunner().invoke(commands, ["keys", *command, "--runs", str(runs)])
        assert done.exit_code == code, done.output
        return done.output

    app = application(registry, channels, str(tiny_base), runs / "weights", runs / "keys.json", runs / "audit.jsonl")
    with TestClient(app) as client:
        body = {"model": "bank_A", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        key = said("issue", "newcomer", "--channel", "bank_A").split()[-1]
        assert client.post("/v1/chat/completions", json=body, headers=_key(key)).status_code == 200
        (line,) = [line for line in said("list").splitlines() if "newcomer" in line]
        assert line.endswith("newcomer -> bank_A") and key not in line
        assert said("revoke", line.split()[0]) == f"revoked {line.split()[0]} of newcomer\n"
        assert client.post("/v1/chat/completions", json=body, headers=_key(key)).status_code == 401
    assert "newcomer" not in said("list")
    assert "no such channel" in said("issue", "nobody", code=1) and "no such key" in said("revoke", "123456789abc", code=1)


def _key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


ACCELERATE = Path(__file__).parents[2] / "configs" / "accelerate"
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate, sharded": ["accelerate.commands.launch", "--config_file", str(ACCELERATE / "2_gpus_sharded.yaml")],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_walk_the_road_of_one(
    launcher: str, road: tuple[Path, dict[str, Any]], tiny_base: Path, tmp_path: Path
) -> None:
    """As docs/recipes.md has it: same losses, one set of releases, nothing written twice."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(tiny_base, tmp_path / "runs")), "utf-8")
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "posttrain", "run", str(recipe)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert [s["accepted"] for s in summary["stages"]] == [s["accepted"] for s in road[1]["stages"]]
    ours, theirs = (_losses(output / "tiny") for output in (tmp_path / "runs", road[0]))
    assert ours.keys() == theirs.keys() and len(ours) > 6
    for place in ours:
        assert ours[place] == pytest.approx(theirs[place], abs=1e-3), place


@pytest.mark.parametrize("name", sorted(path.name for path in ACCELERATE.glob("*.yaml")))
def test_accelerate_reads_every_configuration_and_it_asks_for_nothing_that_is_refused(name: str) -> None:
    config = load_config_from_file(str(ACCELERATE / name))
    assert name in (ACCELERATE / name).read_text("utf-8").splitlines()[1]  # the command in the file names the file
    assert config.num_processes == math.prod(map(int, re.findall(r"\d+", name)))
    sharded = "sharded" in name
    assert (config.distributed_type == "FSDP") == sharded
    told = {key.upper(): str(value) for key, value in (config.fsdp_config if sharded else {}).items()}
    launch = {"ACCELERATE_USE_FSDP": str(sharded), "ACCELERATE_MIXED_PRECISION": str(config.mixed_precision), **told}
    assert sharding_of(launch) == (Sharding(reshard=True) if sharded else None)


def _losses(run: Path) -> dict[tuple[Any, ...], float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [((line["stage"], line["phase"], line["step"]), line["loss"]) for line in lines if "loss" in line]
    assert len(dict(found)) == len(found), "a step was logged twice"
    return dict(found)
