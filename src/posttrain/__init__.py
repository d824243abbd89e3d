"""posttrain: from an open base model to a gated, served release."""

__version__ = "0.1.0"
__all__ = ["__version__"]
