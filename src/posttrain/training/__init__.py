"""Training: the learner, its schedule and its checkpoints."""

from posttrain.training.checkpoint import Checkpointer, read_checkpoint
from posttrain.training.learner import Learner, Objective, Scored
from posttrain.training.schedule import OptimiserOptions, learning_rate
from posttrain.training.team import Team, team

__all__ = [
    "Checkpointer",
    "Learner",
    "Objective",
    "OptimiserOptions",
    "Scored",
    "Team",
    "learning_rate",
    "read_checkpoint",
    "team",
]
