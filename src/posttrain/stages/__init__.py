"""The six levers, one flat file each: sft, adapters, preference, tools, reason, distill. bench.py holds the loop they share."""

from posttrain.stages.bench import Work, Workbench, train

__all__ = ["Work", "Workbench", "train"]
