"""The workbench of a stage: what it may use, and the one training loop, resumable from any step.

A stage describes step i as a pure function of i and of the policy as it stands (its data order and seeds derive from the stage
seed and i), so a checkpoint needs no data cursor beyond the step number and a resumed run repeats nothing and skips nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.contract import Contract
from posttrain.contract import Sequence as Rendered
from posttrain.contract.rendering import Renderer
from posttrain.policy.heap import Growth
from posttrain.policy.pack import Pack
from posttrain.policy.policy import Policy
from posttrain.training import Checkpointer, Learner, Objective, team

Log = Callable[[str, int, int, Mapping[str, float]], None]  # phase, step (-1: before the first), total steps, metrics
Watch = Callable[[int, Mapping[str, float]], str | None]


def _quiet(phase: str, step: int, total: int, metrics: Mapping[str, float]) -> None: ...


def _trust(step: int, metrics: Mapping[str, float]) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Workbench:
    """policy: the accepted parent's weights; folder: where checkpoints go; identity: hash of options, data and parent; pack_tokens:
    size of a pack; log: one line of metrics a step; clock: `with clock("sample")` counts time apart; watch: drift and guardrails,
    returns a reason to stop early or None; renderings: folder of what was rendered before."""

    policy: Policy
    contract: Contract
    folder: Path
    identity: str
    seed: int
    pack_tokens: int = 1536
    log: Log = _quiet
    clock: Callable[[str], AbstractContextManager[object]] = nullcontext
    watch: Watch = _trust
    renderings: Path | None = None

    @property
    def renderer(self) -> Renderer:
        return Renderer(self.contract, self.renderings)


@dataclass(frozen=True, slots=True)
class Work:
    """One optimiser step: packs and the objective over each. No packs: nothing to learn from in this step (it is skipped)."""

    packs: Sequence[Pack]
    objective: Objective
    metrics: Mapping[str, float] = field(default_factory=dict)


_GAPS = 512 << 20  # bytes of memory that may lie idle: a student's steps left gaps of 35 MB each


def train(bench: Workbench, learner: Learner, work: Callable[[int], Work], phase: str = "train") -> str | None:
    """Run the learner's remaining steps, with checkpoints in the background (of several processes, the first's). Returns why it stopped
    early, if it did."""
    folder = bench.folder / "checkpoints" / phase
    identity = hashlib.sha256(f"{bench.identity}/{phase}/{learner.total_steps}".encode()).hexdigest()
    cursor = learner.resume(folder, identity) or {"step": 0, "stopped": None}
    checkpointer = Checkpointer(folder, identity) if team().first else None
    stopped: str | None = cursor["stopped"]
    growth = Growth(_GAPS)
    unsaved: dict[str, Any] | None = None  # the cursor of the state as it stands, while no checkpoint has it
    try:
        for step in range(int(cursor["step"]), learner.total_steps):
            if stopped:
                break
            todo = work(step)
            metrics: dict[str, float] = {**todo.metrics}
            if todo.packs:
                metrics |= learner.forward_backward(todo.packs, todo.objective)
                metrics["pack_tokens"] = float(sum(pack.tokens for pack in todo.packs))
            unsaved = None  # within an update there is no whole state
            metrics |= learner.step()
            growth.step()
            stopped = bench.watch(step, metrics)
            bench.log(phase, step, learner.total_steps, metrics)
            unsaved = {"step": step + 1, "stopped": stopped}
            if checkpointer is not None and checkpointer.due():
                learner.save(checkpointer, unsaved)
                unsaved = None
    finally:
        if checkpointer is not None:
            if unsaved is not None:
                learner.save(checkpointer, unsaved)
            checkpointer.close()
    return stopped


def leash(watch: Watch, metric: Callable[[Mapping[str, float]], float], most: float | None, name: str) -> Watch:
    """`watch`, and besides: stop when a step's metric exceeds `most` (None: no limit) or is no number."""

    def both(step: int, metrics: Mapping[str, float]) -> str | None:
        value = metric(metrics)
        if most is not None and not value <= most:  # nan, too
            return f"{name} {value:.3f} exceeds {most} at step {step}"
        return watch(step, metrics)

    return both


def batches(count: int, size: int, epochs: float, seed: int) -> list[list[int]]:
    """Shuffled batches of indices over `epochs` passes (a fraction ends within a pass); each pass is shuffled anew."""
    wanted = max(1, round(count * epochs))
    order: list[int] = []
    epoch = 0
    while len(order) < wanted:
        order += np.random.default_rng((seed, epoch)).permutation(count).tolist()
        epoch += 1
    order = order[:wanted]
    return [order[i : i + size] for i in range(0, len(order), size)]


def learned_weight(sequences: Sequence[Rendered]) -> float:
    """Sum of weights over all sequences: the one global count of a step, known before its first pack."""
    return float(sum(s.weights.sum() for s in sequences))


def derive(seed: int, *parts: Any) -> int:
    """A 62-bit seed from a seed and any printable parts."""
    return int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode()).digest()[:8], "big") >> 2
