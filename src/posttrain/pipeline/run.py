"""`posttrain run`: the recipe's stages in order, a gate after each, a release for what passed, a record for what did not."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.agents.world import World, load_world
from posttrain.evaluation import RunSummary, Scorecard, StageSummary, Suite, Verdict, decide
from posttrain.files.atomic import write_json
from posttrain.files.hashing import sha256_of
from posttrain.pipeline.console import Console
from posttrain.pipeline.folder import Clock, RunFolder, peak_memory_mb
from posttrain.pipeline.material import gather
from posttrain.pipeline.measure import Measurer
from posttrain.pipeline.parents import Parents, Weights
from posttrain.pipeline.play import player
from posttrain.pipeline.publish import Publisher
from posttrain.pipeline.pull import Pulled, pull
from posttrain.pipeline.runtime import Runtime, parse_dtype, prepare_process
from posttrain.recipe import Recipe, StageRecipe, gate_policy
from posttrain.releases import Channels, Registry, Release
from posttrain.report import write_report
from posttrain.stages.bench import Workbench, derive


@dataclass(slots=True)
class Road:
    """Where the run stands: the last accepted release (None: the base) and its scorecard."""

    accepted: Release | None
    card: Scorecard


def run_recipe(recipe: Recipe, quiet: bool = False) -> dict[str, Any]:
    """Run what is not done yet; returns `summary.json`'s content. A finished run does nothing and says so."""
    return _Run(recipe, Console(quiet)).go()


class _Run:
    def __init__(self, recipe: Recipe, console: Console) -> None:
        self.recipe, self.console = recipe, console
        prepare_process(recipe.threads)
        self.folder = RunFolder.open(recipe)
        self.world: World = load_world(recipe.world)
        output = Path(recipe.output)
        self.registry = Registry(output / "registry")
        self.channels = Channels(self.registry)
        dtype = parse_dtype(recipe.dtype)
        self.dtype = dtype
        self.parents = Parents(self.registry, recipe.base, output / "weights", dtype)
        self.publisher = Publisher(recipe, self.world, self.registry, self.channels, self.folder)
        self.measurer = Measurer(recipe.evaluation, self.world, self._suite(), console)

    def go(self) -> dict[str, Any]:
        summary_path = self.folder.root / "summary.json"
        names = [stage.name for stage in self.recipe.stages]
        if all(self.folder.done(name) for name in ["base", *names]) and summary_path.exists():
            self.console.say(f"this run is finished: {self.folder.root / 'report.html'}")
            return RunSummary.load(summary_path).to_json()
        road = self._base()
        for stage in self.recipe.stages:
            road = self._stage(stage, road)
        summary = self._summary("finished")
        page = write_report(self.folder.root)
        self.console.finished(summary, page, self.recipe)
        return summary.to_json()

    # -- the base ------------------------------------------------------------------------------------------------------

    def _base(self) -> Road:
        done = self.folder.done("base")
        if done is None:
            clock = Clock()
            with clock.part("load"):
                weights = self.parents.base_weights()
                runtime = Runtime.load(weights.folder, self.dtype)
            self.console.stage("base", self.recipe.base)
            with clock.part("evaluate"):
                card = self.measurer.measure(runtime, lambda task: None, candidate=self.recipe.base)
            done = {"scorecard": card.to_json(), "seconds": clock.seconds, "parts": clock.parts, "peak_memory_mb": peak_memory_mb()}
            self._write(self.folder.stage("base"), card, None)
            self.folder.finish("base", done)
            self._summary("running")
        return Road(None, Scorecard.from_json(done["scorecard"]))

    # -- one stage -----------------------------------------------------------------------------------------------------

    def _stage(self, stage: StageRecipe, road: Road) -> Road:
        done = self.folder.done(stage.name)
        if done is None:
            done = self._pull_and_judge(stage, road)
            self.folder.finish(stage.name, done)
            self._summary("running")
            write_report(self.folder.root)
        if not done["accepted"] or stage.kind == "adapters":
            return road  # tenants' adapters are leaves: the road goes on from their parent
        return Road(self.registry.get(done["releases"]["main"]), Scorecard.from_json(done["scorecard"]))

    def _pull_and_judge(self, stage: StageRecipe, road: Road) -> dict[str, Any]:
        clock = Clock()
        self.console.stage(stage.name, stage.kind)
        with clock.part("load"):
            material = gather(stage, self.world, self.recipe.seed)
            weights = self.parents.base_weights() if road.accepted is None else self.parents.merged(road.accepted)
            runtime = Runtime.load(weights.folder, self.dtype)
        with clock.part("train"):
            pulled = pull(stage, material, self._bench(stage, weights, material.hashes, runtime), player(runtime, self.world, clock, self.console), runtime, str(weights.folder))
        with clock.part("evaluate"):
            parent = runtime if pulled.runtime is not runtime else None
            card = self.measurer.measure(pulled.runtime, pulled.adapter_for, candidate=stage.name, parent=parent)
        verdict = decide(road.card, card, gate_policy(stage))
        with clock.part("release"):
            releases = self.publisher.publish(stage, pulled, weights, road.accepted, material.hashes, card, verdict)
        self._write(self.folder.stage(stage.name), card, verdict)
        self.console.verdict(stage.name, verdict)
        return {
            "accepted": verdict.passed, "releases": releases, "parent": road.accepted.id if road.accepted else None,
            "parent_fingerprint": weights.fingerprint, "parity": dict(weights.parity or {}), "scorecard": card.to_json(), "verdict": verdict.to_json(),
            "stopped": dict(pulled.stopped), "data": material.hashes, "seconds": clock.seconds, "parts": clock.parts, "peak_memory_mb": peak_memory_mb(),
        }  # fmt: skip

    def _bench(self, stage: StageRecipe, weights: Weights, hashes: dict[str, str], runtime: Runtime) -> Workbench:
        seed = derive(self.recipe.seed, stage.name) % 2**31
        identity = sha256_of({"options": stage.model_dump(), "data": hashes, "parent": weights.fingerprint, "seed": seed, "dtype": str(runtime.policy.dtype)})
        metrics = self.folder.metrics()
        seen = {(line["stage"], line["step"], line["phase"]) for line in metrics.read() if "stage" in line}
        meter = self.console.meter(stage.name)

        def log(phase: str, step: int, values: Any) -> None:
            meter(phase, step, values)
            if (stage.name, step, phase) not in seen:  # a step repeated after a kill is the same step
                metrics.append({"stage": stage.name, "phase": phase, "step": step, "at": time.time(), **values})

        return Workbench(runtime.policy, runtime.contract, self.folder.stage(stage.name), identity, seed, self.recipe.pack_tokens, log)

    # -- files ---------------------------------------------------------------------------------------------------------

    def _suite(self) -> Suite:
        wanted = self.recipe.evaluation
        return Suite.load(wanted.suite or self.recipe.world, split=wanted.split, seed=wanted.seed, kinds=wanted.kinds or None, n=96)

    def _write(self, folder: Path, card: Scorecard, verdict: Verdict | None) -> None:
        write_json(folder / "scorecard.json", card.to_json())
        write_json(folder / "samples.json", [dict(sample) for sample in card.samples])
        if verdict is not None:
            write_json(folder / "verdict.json", verdict.to_json())

    def _summary(self, status: str) -> RunSummary:
        raise NotImplementedError
