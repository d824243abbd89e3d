"""Prompts of the generation works: the same for every side, whatever its environment has installed."""

from __future__ import annotations

from typing import Any


def prompts_of(material: dict[str, Any], options: dict[str, Any], turn: int) -> list[list[int]]:
    """The prompts of a turn: windows of records, all different, or one for all."""
    windows, batch = material["windows"], options["batch"]
    if options.get("shared"):
        return [(windows[turn % len(windows)] * 4)[: options["prompt"]]] * batch
    return [windows[(turn * batch + i) % len(windows)][: options["prompt"]] for i in range(batch)]
