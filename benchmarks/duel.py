"""Two sides, in turn, in one call: what a noisy machine does to one it does to the other, so their ratio means something."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Side:
    """A function of a module of this package, run in a process of its own. `python`: another environment's interpreter."""

    module: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable


@dataclass(frozen=True, slots=True)
class Duel:
    """`metric` names what is compared, more of it being better; `same_loss`: both sides take the same first step, so its loss must
    agree to this relative difference (None: their first steps differ by design)."""

    work: str
    ours: Side
    peer: Side
    peer_name: str
    metric: str = "tokens/s"
    same_loss: float | None = None
    rounds: int = 5
    warmup: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Per round and side: tokens per second, seconds and tokens of the steps; the peaks of memory; the losses of the first step."""

    duel: Duel
    speed: tuple[list[float], list[float]]
    seconds: tuple[list[float], list[float]]
    peak_mib: tuple[float, float]
    first_loss: tuple[float | None, float | None]

    def rows(self) -> list[dict[str, Any]]:
        """The result as documented in benchmarks/README.md: one row for speed, one for memory. Ratio above 1: ours is better."""
        ratios = [ours / peer for ours, peer in zip(*self.speed, strict=True)]
        common = {"work": self.duel.work, "peer_name": self.duel.peer_name}
        memory = self.peak_mib[1] / self.peak_mib[0]
        return [
            {
                **common,
                "metric": self.duel.metric,
                "ours": round(statistics.median(self.speed[0]), 2),
                "peer": round(statistics.median(self.speed[1]), 2),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
                "ours_step_seconds": round(statistics.median(self.seconds[0]), 3),
                "peer_step_seconds": round(statistics.median(self.seconds[1]), 3),
                "rounds": len(ratios),
                **({} if self.first_loss[0] is None else {"first_loss": list(self.first_loss)}),
            },
            {
                **common,
                "metric": "peak MiB",
                "ours": round(self.peak_mib[0]),
                "peer": round(self.peak_mib[1]),
                "ratio": round(memory, 3),
                "ratio_min": round(memory, 3),
                "ratio_max": round(memory, 3),
            },
        ]


class _Worker:
    """A side's process."""

    def __init__(self, side: Side, material: Path, log: TextIO) -> None:
        self.name = f"{side.module}.{side.function}"
        self._log = log
        self._process = subprocess.Popen(
            [side.python, "-m", "benchmarks.side", side.module, side.function, str(material), json.dumps(dict(side.options))],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
        self.hear()

    def hear(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended without an answer; its output is in {self._log.name}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def ask(self, word: str) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self.hear()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def run(duel: Duel, material: Path, log: TextIO, say: Callable[[str], None]) -> Outcome:
    """Warm both sides up, then measure them in turn, the order swapped every round. Raises SystemExit where a side fails, or where the
    losses of the same first step differ: then the two do not do the same work and no ratio is given."""
    workers = []
    try:
        for side in (duel.ours, duel.peer):
            workers.append(_Worker(side, material, log))
        steps: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
        for round_ in range(duel.warmup + duel.rounds):
            for place in (0, 1) if round_ % 2 == 0 else (1, 0):
                steps[place].append(workers[place].ask("go"))
            say(
                f"{duel.work} {round_ + 1}/{duel.warmup + duel.rounds}: "
                f"{steps[0][-1]['seconds']:.2f} s against {steps[1][-1]['seconds']:.2f} s"
            )
        peaks = [worker.ask("end")["peak_mib"] for worker in workers]
    finally:
        for worker in workers:
            worker.stop()
    losses = (steps[0][0].get("loss"), steps[1][0].get("loss"))
    if duel.same_loss is not None:
        assert losses[0] is not None and losses[1] is not None
        if abs(losses[0] - losses[1]) > duel.same_loss * max(1e-3, abs(losses[1])):
            raise SystemExit(f"{duel.work}: the first step's losses differ, {losses[0]} against {losses[1]}: not the same work")
    kept = [side[duel.warmup :] for side in steps]
    return Outcome(
        duel,
        ([s["tokens"] / s["seconds"] for s in kept[0]], [s["tokens"] / s["seconds"] for s in kept[1]]),
        ([s["seconds"] for s in kept[0]], [s["seconds"] for s in kept[1]]),
        (peaks[0], peaks[1]),
        losses,
    )
