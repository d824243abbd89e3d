"""From (split, seed, index) to scenarios: requests with their gold continuation, for conversations, tasks and preferences alike."""

from posttrain.worlds.finance_ops.scenarios.bench import Bench, Scenario
from posttrain.worlds.finance_ops.scenarios.build import KINDS, SHAPES, scenario_of_kind, scenario_of_shape
from posttrain.worlds.finance_ops.scenarios.pairs import preference

__all__ = ["KINDS", "SHAPES", "Bench", "Scenario", "preference", "scenario_of_kind", "scenario_of_shape"]
