"""From the inputs of a conformance case to the functions of this room: one short function per objective key."""

from posttrain.objectives.cases.table import ADAPTERS

__all__ = ["ADAPTERS"]
