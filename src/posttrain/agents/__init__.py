"""Agents: tools behind a guard, retrieval within a tenant, and episodes played in private copies of a world."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.agents.budget import Budget, Spent
from posttrain.agents.guard import Decision, Guard, PolicyError, Ruling, SuppliesContext, SuppliesSchema
from posttrain.agents.replay import replay_in
from posttrain.agents.retrieval import Hit, Retriever
from posttrain.agents.tools import Toolbox
from posttrain.agents.world import Environment, ToolResult, World, load_world

if TYPE_CHECKING:
    from posttrain.agents.rollout import OnDenial, RolloutOptions, Turns, run_episodes, run_judged, turn_seed

__all__ = [
    "Budget",
    "Decision",
    "Environment",
    "Guard",
    "Hit",
    "OnDenial",
    "PolicyError",
    "Retriever",
    "RolloutOptions",
    "Ruling",
    "Spent",
    "SuppliesContext",
    "SuppliesSchema",
    "ToolResult",
    "Toolbox",
    "Turns",
    "World",
    "load_world",
    "replay_in",
    "run_episodes",
    "run_judged",
    "turn_seed",
]

_ROLLOUT = ("OnDenial", "RolloutOptions", "Turns", "run_episodes", "run_judged", "turn_seed")


def __getattr__(name: str) -> Any:
    """Rollouts bring the sampling room and with it torch; worlds and the command line need the rest of this room without it."""
    if name in _ROLLOUT:
        from posttrain.agents import rollout

        return getattr(rollout, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
