"""Training: the learner, its schedule and its checkpoints."""

from posttrain.training.checkpoint import Checkpointer, read_checkpoint
from posttrain.training.learner import Learner, Objective, Scored
from posttrain.training.schedule import OptimiserOptions, learning_rate

__all__ = ["Checkpointer", "Learner", "Objective", "OptimiserOptions", "Scored", "learning_rate", "read_checkpoint"]
