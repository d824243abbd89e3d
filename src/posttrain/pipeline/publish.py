"""After the gate: a passed stage becomes releases and its channels move; a failed one is kept as a candidate and nothing moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

from posttrain.agents.world import World
from posttrain.evaluation.scorecard import Scorecard
from posttrain.evaluation.verdict import Verdict
from posttrain.pipeline.folder import RunFolder
from posttrain.pipeline.parents import Weights
from posttrain.pipeline.pull import MAIN, Pulled
from posttrain.recipe import Recipe, StageRecipe
from posttrain.releases import Channels, Kind, Lineage, Parent, Parts, Registry, Teacher, grammar_record

PRODUCTION = "production"


@dataclass(frozen=True, slots=True)
class Measured:
    """A stage's evidence: what it was measured at, and what the gate said."""

    card: Scorecard
    verdict: Verdict
    data: Mapping[str, str]
    seed: int


@dataclass(frozen=True, slots=True)
class Publisher:
    """Builds releases and candidates of one run."""

    recipe: Recipe
    world: World
    registry: Registry
    channels: Channels
    folder: RunFolder
    base: Weights

    def publish(self, stage: StageRecipe, pulled: Pulled, parent: Weights, measured: Measured) -> dict[str, str]:
        """Ids by adapter name ('main' or a tenant): releases where the verdict passed, candidates where not."""
        ids = {}
        for name, weights in pulled.folders.items():
            parts = Parts(
                weights,
                self._lineage(stage, name, pulled, parent, measured),
                measured.verdict,
                measured.card,
                self._grammar(name),
            )
            ids[name] = self.registry.build(parts).id if measured.verdict.passed else self.registry.keep(parts).id
        if measured.verdict.passed:
            self._promote(stage, ids)
        return ids

    def _promote(self, stage: StageRecipe, ids: Mapping[str, str]) -> None:
        """The recipe's channel and every tenant's follow the road; a tenant's own adapter moves only that tenant's channel."""
        by, why = f"run {self.recipe.name}", f"stage {stage.name}: real gain"
        moves = {self._channel_of(tenant): release for tenant, release in ids.items() if tenant != MAIN}
        if MAIN in ids:
            moves = {self.recipe.channel: ids[MAIN], **{self._channel_of(t): ids[MAIN] for t in self.world.tenants}, **moves}
        pointers = self.channels.pointers()
        for channel, release in moves.items():
            if pointers.get(channel) != release:
                self.channels.promote(channel, release, by, why)

    def _channel_of(self, tenant: str) -> str:
        """A tenant's channel bears its name; a run on another channel than production must not move what the tenant is served."""
        return tenant if self.recipe.channel == PRODUCTION else f"{self.recipe.channel}-{tenant}"

    def _lineage(self, stage: StageRecipe, name: str, pulled: Pulled, parent: Weights, measured: Measured) -> Lineage:
        came_from = Parent(parent.fingerprint, parent.release, parent.parity)
        dense = pulled.dense
        teacher = (
            Teacher(parent.release or "base", parent.fingerprint, pulled.runtime.contract.lock().fingerprint) if dense else None
        )
        return Lineage(
            Kind.DENSE if dense else Kind.ADAPTER, stage.name, self.recipe.base, self.base.fingerprint, came_from,
            weights=pulled.runtime.policy.fingerprint if dense else None, tenant=None if name == MAIN else name,
            data=dict(measured.data), seeds={"run": self.recipe.seed, "stage": measured.seed}, versions=self.folder.versions,
            recipe=self.recipe.hash, teacher=teacher,
        )  # fmt: skip

    def _grammar(self, name: str) -> dict[str, object]:
        tenant = None if name == MAIN else name
        return grammar_record(self.world.answer_schema(tenant), self.world.tools(tenant), {"llguidance": version("llguidance")})
