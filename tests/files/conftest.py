"""Property tests of this folder are the same on every run and have no time limit per example (shared machines stall)."""

from hypothesis import settings

settings.register_profile("posttrain", deadline=None, derandomize=True)
settings.load_profile("posttrain")
