"""One process of several: `python together.py {KIND of killable|shares|edges} FOLDER STOP`. The first one writes what it ends with.

STOP is the step after which every process gives up, as if the machine had gone down; -1: never.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import killable
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from posttrain.errors import TrainingError
from posttrain.policy import LoraOptions, Pack, Policy
from posttrain.stages.sft import token_cross_entropy
from posttrain.training import Learner, OptimiserOptions, Scored, team
from tiny_models import sequence, tiny_model


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


def shares() -> dict[str, float]:
    """How many numbers of the blocks this process holds, and what a pass alone gives while all are gathered."""
    policy, whole = (Policy(tiny_model()) for _ in range(2))
    pack = Pack.of([sequence([5, 6, 7, 8, 9])])
    blocks = policy.base.base_model.layers
    found = {"whole": float(sum(p.numel() for p in blocks.parameters()))}

    def held() -> float:
        return float(sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in blocks.parameters()))

    policy.shard()
    found["blocks"] = held()
    with policy.gathered(), torch.no_grad():
        found["gathered"] = held()
        if team().first:
            found["difference"] = float((policy.logprobs(pack) - whole.logprobs(pack)).abs().max())
    found["blocks again"] = held()
    return found


def edges() -> dict[str, Any]:
    """Steps on nothing and on no numbers, and an order that comes after the backend's time limit."""
    policy = Policy(tiny_model())
    policy.add_adapter("main", LoraOptions(rank=2), seed=0)
    learner = Learner.for_adapter(policy, "main", OptimiserOptions(lr=1e-2, warmup=0.0), 9)
    packs = [Pack.of([sequence([5, 6, 7, 8, first])]) for first in (9, 10)]

    def weights() -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in learner.parameters.values()])

    def no_number(scored: Scored) -> tuple[torch.Tensor, Mapping[str, Any]]:
        return scored.hidden.sum() * (1.0 if team().first else float("nan")), {}

    learner.forward_backward(packs, token_cross_entropy(8.0))
    learner.step()
    before = weights()
    learner.step()  # as after `Work([], ...)`
    found = {"moved by nothing": float((weights() - before).norm())}
    learner.forward_backward(packs, no_number)
    try:
        learner.step()
        refused = False
    except TrainingError:
        refused = True
    found |= {"refused": team().gather(refused), "moved by no numbers": float((weights() - before).norm())}
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.3))
    if team().first:
        time.sleep(1.0)
    return {**found, "order": team().order("go on" if team().first else None)}


def left() -> None:
    """Runs after what `team` asked for at the end: the backend's threads must be gone by then."""
    if dist.is_initialized():
        print("the process group outlives the run", file=sys.stderr, flush=True)
        os._exit(3)


def main() -> None:
    kind, folder, stop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    atexit.register(left)
    team()
    apart = {"shares": shares, "edges": edges}
    end: Mapping[str, Any] | None = apart[kind]() if kind in apart else run(kind, folder, stop)
    if end is not None and team().first:
        torch.save(dict(end), folder / "end.pt")


if __name__ == "__main__":
    main()
