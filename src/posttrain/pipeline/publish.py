"""After the gate: a passed stage becomes releases and its channels move; a failed one is kept as a candidate and nothing moves.

What was decided is on the disk before anything is published: timings are in the scorecard, so a stage measured again would be another
release, and perhaps another verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from posttrain.agents.world import World
from posttrain.errors import IntegrityError
from posttrain.evaluation.scorecard import Scorecard
from posttrain.evaluation.verdict import Verdict
from posttrain.files.hashing import hash_folder
from posttrain.pipeline.folder import RunFolder
from posttrain.pipeline.parents import Weights
from posttrain.pipeline.pull import MAIN, Pulled
from posttrain.recipe import Recipe, StageRecipe
from posttrain.releases import Channels, Kind, Lineage, Parent, Parts, Registry, Teacher, grammar_record
from posttrain.releases.lineage import plain, verdict_from_json

PRODUCTION = "production"


def channel_of(recipe: Recipe, tenant: str) -> str:
    """A tenant's channel bears its name; a run on another channel than production must not move what the tenant is served."""
    return tenant if recipe.channel == PRODUCTION else f"{recipe.channel}-{tenant}"


@dataclass(frozen=True, slots=True)
class Measured:
    """A stage's evidence: what it was measured at, and what the gate said."""

    card: Scorecard
    verdict: Verdict
    data: Mapping[str, str]
    seed: int


@dataclass(frozen=True, slots=True)
class Decided:
    """A stage's verdict with all that its releases are made of (`parts` by adapter name: 'main' or a tenant), and `record`, what
    `done.json` says of it beside their ids."""

    parts: Mapping[str, Parts]
    record: Mapping[str, Any]

    def to_json(self, folder: Path) -> dict[str, Any]:
        """`folder`: the stage's, which the weights lie in."""
        made = {
            name: {
                "weights": str(parts.weights.relative_to(folder)), "files": hash_folder(parts.weights), "lineage": plain(parts.lineage),
                "grammar": plain(parts.grammar),
            }
            for name, parts in self.parts.items()
        }  # fmt: skip
        return {"record": dict(self.record), "parts": made}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], folder: Path) -> Decided:
        """Raises IntegrityError when the weights are not those that were measured."""
        record, where = value["record"], str(folder)
        verdict, card = verdict_from_json(record["verdict"], where), Scorecard.from_json(record["scorecard"], where)
        parts = {}
        for name, made in value["parts"].items():
            weights = folder / made["weights"]
            if hash_folder(weights) != made["files"]:
                raise IntegrityError(
                    "the weights are not those that were measured",
                    where=str(weights),
                    remedy="delete the stage's folder and run again",
                )
            parts[name] = Parts(weights, Lineage.from_json(made["lineage"], where), verdict, card, made["grammar"])
        return cls(parts, record)


@dataclass(frozen=True, slots=True)
class Publisher:
    """Builds releases and candidates of one run."""

    recipe: Recipe
    world: World
    registry: Registry
    channels: Channels
    folder: RunFolder

    def parts(self, stage: StageRecipe, pulled: Pulled, parent: Weights, base: Weights, measured: Measured) -> dict[str, Parts]:
        """What each adapter's release or candidate is made of."""
        return {
            name: Parts(
                weights,
                self._lineage(stage, name, pulled, (parent, base), measured),
                measured.verdict,
                measured.card,
                self._grammar(name),
            )
            for name, weights in pulled.folders.items()
        }

    def publish(self, stage: str, made: Mapping[str, Parts]) -> dict[str, str]:
        """Ids by adapter name: releases where the verdict passed, candidates where not. Doing it again changes nothing."""
        passed = all(parts.verdict.passed for parts in made.values())
        put = self.registry.build if passed else self.registry.keep
        ids = {name: put(parts).id for name, parts in made.items()}
        if passed:
            self._promote(stage, ids)
        return ids

    def _promote(self, stage: str, ids: Mapping[str, str]) -> None:
        """The recipe's channel and every tenant's follow the road; a tenant's own adapter moves only that tenant's channel. A channel
        that has been at its release is left where it is: since then somebody may have moved it on purpose."""
        by, why = f"run {self.recipe.name}", f"stage {stage}: real gain"
        moves = {channel_of(self.recipe, tenant): release for tenant, release in ids.items() if tenant != MAIN}
        if MAIN in ids:
            moves = {
                self.recipe.channel: ids[MAIN],
                **{channel_of(self.recipe, t): ids[MAIN] for t in self.world.tenants},
                **moves,
            }
        moved = {(move.channel, move.release) for move in self.channels.history()}
        for channel, release in moves.items():
            if (channel, release) not in moved:
                self.channels.promote(channel, release, by, why)

    def _lineage(
        self, stage: StageRecipe, name: str, pulled: Pulled, started: tuple[Weights, Weights], measured: Measured
    ) -> Lineage:
        """`started`: the weights the stage started from, and the base's."""
        parent, base = started
        came_from = Parent(parent.fingerprint, parent.release, parent.parity)
        dense = pulled.dense
        teacher = (
            Teacher(parent.release or "base", parent.fingerprint, pulled.runtime.contract.lock().fingerprint) if dense else None
        )
        return Lineage(
            Kind.DENSE if dense else Kind.ADAPTER, stage.name, self.recipe.base, base.fingerprint, came_from,
            weights=pulled.runtime.policy.fingerprint if dense else None, tenant=None if name == MAIN else name,
            data=dict(measured.data), seeds={"run": self.recipe.seed, "stage": measured.seed}, versions=self.folder.versions,
            recipe=self.recipe.hash, teacher=teacher,
        )  # fmt: skip

    def _grammar(self, name: str) -> dict[str, object]:
        tenant = None if name == MAIN else name
        return grammar_record(self.world.answer_schema(tenant), self.world.tools(tenant), {"llguidance": version("llguidance")})
