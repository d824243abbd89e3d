"""One process of several: `python together.py {sft|dpo|grpo} FOLDER STOP`. The first one writes the adapter's weights and the losses.

STOP is the step after which every process gives up, as if the machine had gone down; -1: never.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import killable
import torch

from posttrain.training import team


def run(kind: str, folder: Path, stop: int) -> dict[str, object] | None:
    """The losses and the adapter's final weights; None when it gave up."""
    losses: list[float] = []

    def log(phase: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        losses.append(float(metrics.get("loss", 0.0)))
        if step == stop:
            raise KeyboardInterrupt

    try:
        weights = killable.run(kind, folder, log=log)
    except KeyboardInterrupt:
        return None
    return {"weights": weights, "losses": losses}


def main() -> None:
    kind, folder, stop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    end = run(kind, folder, stop)
    if end is not None and team().first:
        torch.save(end, folder / "end.pt")


if __name__ == "__main__":
    main()
