"""`posttrain run`: the recipe's stages in order, a gate after each, a release for what passed, a record for what did not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.contract import Contract
from posttrain.contract.rendering import Renderer
from posttrain.evaluation import RunSummary, Scorecard, decide
from posttrain.files.atomic import write_json
from posttrain.files.hashing import sha256_of
from posttrain.pipeline.apart import apart, can_be_apart
from posttrain.pipeline.assist import Order, assist, call
from posttrain.pipeline.checks import (
    check_demonstrations,
    check_disk,
    check_material,
    check_measured,
    check_sharding,
    check_students,
)
from posttrain.pipeline.console import Console
from posttrain.pipeline.folder import Clock, RunFolder, forget_peak_memory, peak_memory_mb
from posttrain.pipeline.material import Material, gather
from posttrain.pipeline.measure import Measurer
from posttrain.pipeline.parents import Parents, Weights
from posttrain.pipeline.play import Player
from posttrain.pipeline.publish import Decided, Measured, Publisher
from posttrain.pipeline.pull import MAIN, pull
from posttrain.pipeline.runtime import Runtime, parse_dtype, prepare_process, set_threads
from posttrain.pipeline.summary import summarise
from posttrain.policy.base import resolve_base
from posttrain.policy.device import device_name, find_device, peak_device_memory_mb
from posttrain.policy.heap import give_memory_back
from posttrain.recipe import Recipe, StageRecipe, gate_policy
from posttrain.releases import Channels, Registry, Release
from posttrain.report import write_report
from posttrain.stages.bench import Workbench, derive
from posttrain.training import team

BASE = "base"


@dataclass(frozen=True, slots=True)
class Road:
    """Where the run stands: the last accepted release (None: the base) and its scorecard."""

    accepted: Release | None
    card: Scorecard


def run_recipe(recipe: Recipe, quiet: bool = False, alone: bool = False) -> dict[str, Any]:
    """Run what is not done yet; returns the content of `summary.json`. A finished run does nothing and says so. Of several processes
    the first runs it, and the others train with it and return nothing. `alone`: nothing but this run was computed in this process, so
    each stage may have a process of its own where the system lets it (see `apart`)."""
    if not team().first:
        return assist(recipe)
    try:
        done = _first(recipe, quiet, alone)
    except BaseException:
        with suppress(RuntimeError):  # the others may have failed alike and be gone: what happened here is what is to be seen
            call(None)
        raise
    call(None)
    return done


def _first(recipe: Recipe, quiet: bool, alone: bool) -> dict[str, Any]:
    console = Console(quiet)
    folder = RunFolder.open(recipe)
    if folder.finished():
        console.say(f"this run is finished, nothing to do: {folder.report}")
        return RunSummary.load(folder.root / "summary.json").to_json()
    return _Run(recipe, folder, console, alone).go()


class _Run:
    def __init__(self, recipe: Recipe, folder: RunFolder, console: Console, alone: bool) -> None:
        self.recipe, self.folder, self.console = recipe, folder, console
        self.dtype, self.device = parse_dtype(recipe.dtype), find_device(recipe.device)
        self.apart = alone and can_be_apart(self.device)
        prepare_process(1 if self.apart else recipe.threads)
        check_students(recipe, resolve_base(recipe.base))
        check_disk(recipe, resolve_base(recipe.base))
        check_sharding(recipe)
        self.world, suite = check_measured(recipe)
        output = Path(recipe.output)
        self.registry = Registry(output / "registry")
        self.channels = Channels(self.registry)
        self.parents = Parents(self.registry, recipe.base, output / "weights", self.dtype)
        self.publisher = Publisher(recipe, self.world, self.registry, self.channels, folder)
        self.renderings = output / "rendered"
        self.measurer = Measurer(recipe.evaluation, self.world, suite, console)

    def go(self) -> dict[str, Any]:
        self.console.notes(self.measurer.suite.notes)
        # all data of all stages first: a malformed or over-long record must not be found after an hour of training
        material = {stage.name: gather(stage, self.world, self.recipe.seed) for stage in self.recipe.stages}
        contract = Contract.load(resolve_base(self.recipe.base))
        for stage in self.recipe.stages:
            check_material(stage, material[stage.name], Renderer(contract, self.renderings), self.console)
            check_demonstrations(stage, material[stage.name], contract, self.world)
        self.folder.start(self.recipe, self._inputs(material))
        road = self._base()
        for stage in self.recipe.stages:
            road = self._stage(stage, material[stage.name], road)
        summary = summarise(self.recipe, self.folder, self.channels, "finished")
        page = write_report(self.folder.root)
        self.console.finished(summary, page, self.recipe)
        return summary.to_json()

    def _inputs(self, material: Mapping[str, Material]) -> dict[str, dict[str, str]]:
        """What the recipe only names, and the hash of what is there now."""
        wanted, world = self.recipe.evaluation, self.recipe.world
        found = {
            "base": (self.recipe.base, self.parents.base_weights().fingerprint),
            "evaluation.suite" if wanted.suite else "evaluation": (wanted.suite or world, self.measurer.suite.sha256),
            **{f"stages.{s.name}.data": (s.data.path or world, sha256_of(material[s.name].hashes)) for s in self.recipe.stages},
        }
        return {key: {"source": source, "sha256": sha256} for key, (source, sha256) in found.items()}

    def _base(self) -> Road:
        """Measure the base once: every stage is shown beside it."""
        done = self.folder.done(BASE)
        if done is None:
            self._work(self._measure_base, BASE)
            done = self.folder.done(BASE)
            assert done is not None, "measured, and written"
        # 'auto' is measured once a run: a stage resumed on a busier machine must compute in the same type
        self.dtype = self.parents.dtype = parse_dtype(done["dtype"].removeprefix("torch."))
        return Road(None, Scorecard.from_json(done["scorecard"]))

    def _work(self, work: Callable[[], None], name: str) -> None:
        """What computes, in a process of its own where that may be: all it finds is in the run folder afterwards."""
        if not self.apart:
            work()
            return

        def computing() -> None:
            set_threads(self.recipe.threads)
            work()

        apart(computing, name)

    def _measure_base(self) -> None:
        self.console.stage(BASE, self.recipe.base)
        clock = Clock()
        forget_peak_memory()
        with clock.part("load"):
            runtime = Runtime.load(self.parents.base_weights().folder, self.dtype, self.device)
        with clock.part("evaluate"):
            card = self.measurer.measure(runtime, lambda task: None, candidate=BASE)
        about = {"dtype": str(runtime.policy.dtype), "device": device_name(self.device)}
        self._finish(BASE, {"scorecard": card.to_json(), **about, **self._spent(clock)})

    def _stage(self, stage: StageRecipe, material: Material, road: Road) -> Road:
        """Pull the lever unless that is done, and say where the road goes on."""
        done = self.folder.done(stage.name)
        if done is None:
            # what is published is read from the disk whether or not the run was killed since: one path, the same bytes
            if self.folder.decided(stage.name) is None:
                self._work(lambda: self._pull(stage, material, road), stage.name)
            done = self._publish(stage)
        if not done["accepted"] or MAIN not in done["releases"]:
            return road  # a rejected stage, or tenants' adapters, which are leaves: the road goes on from their parent
        return Road(self.registry.get(done["releases"][MAIN]), Scorecard.from_json(done["scorecard"]))

    def _pull(self, stage: StageRecipe, material: Material, road: Road) -> None:
        """Train, measure and decide, and keep what was decided."""
        self.console.stage(stage.name, stage.kind)
        clock = Clock()
        forget_peak_memory()
        with clock.part("load"):
            base = self.parents.base_weights()
            parent = base if road.accepted is None else self.parents.merged(road.accepted)
            runtime = Runtime.load(parent.folder, self.dtype, self.device)
            runtime.policy.recompute = self.recipe.recompute
        bench = self._bench(stage, parent, material, runtime, clock)
        call(Order(stage, parent.folder, bench.folder, bench.identity, bench.seed, bench.pack_tokens,
                   str(runtime.policy.dtype).removeprefix("torch."), self.renderings))  # fmt: skip
        with clock.part("train"):
            pulled = pull(stage, material, bench, Player(runtime, self.world, self.console), runtime, str(parent.folder))
        give_memory_back()
        with clock.part("evaluate"):
            came_from = runtime if pulled.dense else None
            card = self.measurer.measure(pulled.runtime, pulled.adapter_for, candidate=stage.name, parent=came_from)
        verdict = decide(road.card, card, gate_policy(stage))
        record = {
            "accepted": verdict.passed, "parent": parent.release, "parent_fingerprint": parent.fingerprint,
            "parity": dict(parent.parity or {}), "scorecard": card.to_json(), "verdict": verdict.to_json(), "stopped": dict(pulled.stopped),
            "data": material.hashes, "kind": stage.kind, **self._spent(clock),
        }  # fmt: skip
        parts = self.publisher.parts(stage, pulled, parent, base, Measured(card, verdict, material.hashes, bench.seed))
        self.folder.decide(stage.name, Decided(parts, record).to_json(bench.folder))

    def _publish(self, stage: StageRecipe) -> dict[str, Any]:
        """From what was decided to releases, and the stage is done."""
        decided = Decided.from_json(self.folder.decided(stage.name) or {}, self.folder.stage(stage.name))
        clock = Clock(dict(decided.record["seconds_by_part"]))
        with clock.part("release"):
            ids = self.publisher.publish(stage.name, decided.parts)
        done = {**decided.record, "releases": ids, "seconds": clock.seconds, "seconds_by_part": dict(clock.parts)}
        self.console.verdict(stage.name, done["verdict"]["outcome"], done["verdict"]["reasons"])
        self._finish(stage.name, done)
        return done

    def _bench(self, stage: StageRecipe, parent: Weights, material: Material, runtime: Runtime, clock: Clock) -> Workbench:
        seed = derive(self.recipe.seed, stage.name) % 2**31
        identity = sha256_of(
            {
                "stage": stage.model_dump(),
                "data": material.hashes,
                "parent": parent.fingerprint,
                "seed": seed,
                "dtype": str(runtime.policy.dtype),
            }
        )
        metrics = self.folder.metrics()
        seen = {(line.get("stage"), line.get("phase"), line.get("step")) for line in metrics.read()}
        show = self.console.meter()

        def log(phase: str, step: int, total: int, values: Mapping[str, float]) -> None:
            show(phase, step, total, values)
            if (stage.name, phase, step) not in seen:  # a step repeated after a kill is the same step
                metrics.append({"stage": stage.name, "phase": phase, "step": step, "at": time.time(), **_finite(values)})

        return Workbench(
            runtime.policy,
            runtime.contract,
            self.folder.stage(stage.name),
            identity,
            seed,
            self.recipe.pack_tokens,
            log,
            clock.part,
            renderings=self.renderings,
        )

    def _spent(self, clock: Clock) -> dict[str, Any]:
        on_device = peak_device_memory_mb(self.device)
        spent = {"seconds": clock.seconds, "seconds_by_part": dict(clock.parts), "peak_memory_mb": peak_memory_mb()}
        return spent if on_device is None else {**spent, "peak_device_memory_mb": on_device}

    def _finish(self, name: str, done: Mapping[str, Any]) -> None:
        folder = self.folder.stage(name)
        write_json(folder / "scorecard.json", done["scorecard"])
        write_json(folder / "samples.json", done["scorecard"]["samples"])
        if "verdict" in done:
            write_json(folder / "verdict.json", done["verdict"])
        self.folder.finish(name, done)
        summarise(self.recipe, self.folder, self.channels, "running")
        write_report(self.folder.root)


def _finite(values: Mapping[str, float]) -> dict[str, float | str]:
    """The log holds JSON: a number that is none is written as text, so that it is seen and nothing breaks."""
    return {key: value if value == value and abs(value) != float("inf") else str(value) for key, value in values.items()}
