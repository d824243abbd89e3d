"""Property tests of this room run without a deadline: two busy cores are no defect."""

from hypothesis import settings

settings.register_profile("posttrain", deadline=None, derandomize=True)
settings.load_profile("posttrain")
