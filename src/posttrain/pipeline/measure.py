"""Measuring a candidate: the suite's tasks through sampler, grammar, guard and tools; drift and latency against the parent."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from posttrain.agents import RolloutOptions, World
from posttrain.contract import Sequence as Rendered
from posttrain.data.records import Episode, Task
from posttrain.evaluation import Metric, Scorecard, Suite, evaluate
from posttrain.evaluation.statistics import mean_interval
from posttrain.objectives.distill import reverse_kl_tokens
from posttrain.pipeline.console import Console
from posttrain.pipeline.play import Player
from posttrain.pipeline.runtime import Runtime
from posttrain.policy.pack import fill_packs
from posttrain.recipe import EvaluationRecipe
from posttrain.sampling import Sample, SampleOptions, SampleRequest, Stream

T = TypeVar("T")
AdapterFor = Callable[[Task], str | None]
_LATENCY_TOKENS = 8  # at a stretch


@dataclass(frozen=True, slots=True)
class Measurer:
    """Measures candidates on one suite, always the same way."""

    recipe: EvaluationRecipe
    world: World
    suite: Suite
    console: Console

    def measure(self, runtime: Runtime, adapter_for: AdapterFor, candidate: str, parent: Runtime | None = None) -> Scorecard:
        """`parent` is the runtime that a dense candidate came from; an adapter's parent is its own runtime, adapter off."""
        tasks = list(self.suite.tasks)
        options = RolloutOptions(max_tokens_per_turn=self.recipe.max_tokens, temperature=0.0, constrained=True)
        player = Player(runtime, self.world, self.console)
        judged = player.play(tasks, options, adapter_for, seed=self.suite.seed)
        free = self._free_turns(player, tasks, options, adapter_for)
        extra = self._latency(runtime, parent, tasks, adapter_for)
        for done_decoding in (runtime, parent or runtime):
            done_decoding.policy.forget_inference()
        if parent is not None or any(adapter_for(task) for task in tasks):
            extra |= self._drift(runtime, parent, [(task, episode) for task, episode, _ in judged], adapter_for)
        return evaluate(self.suite, candidate, judged, free, extra)

    def _free_turns(
        self, player: Player, tasks: list[Task], options: RolloutOptions, adapter_for: AdapterFor
    ) -> list[tuple[Task, Episode]]:
        """First turns of evenly spread tasks, drawn without a grammar: what the model does when nothing holds its hand."""
        chosen = [replace(task, max_turns=1) for task in spread(tasks, self.recipe.free)]
        played = player.play(chosen, replace(options, constrained=False), adapter_for, seed=self.suite.seed)
        return [(task, episode) for task, episode, _ in played]

    def _drift(
        self, runtime: Runtime, parent: Runtime | None, played: list[tuple[Task, Episode]], adapter_for: AdapterFor
    ) -> dict[str, Metric]:
        """KL(candidate || parent) over the full vocabulary at the positions the candidate chose, in nats per token."""
        means: list[float] = []
        by_adapter: dict[str | None, list[Rendered]] = {}
        for task, episode in spread(played, self.recipe.drift):
            sequence = runtime.contract.render_episode(episode)
            if sequence.learned:
                by_adapter.setdefault(adapter_for(task), []).append(sequence)
        for adapter, sequences in by_adapter.items():
            means += sequence_divergences(runtime, parent, adapter, sequences)
        return {"kl_to_parent": _mean(means, "nats/token")} if means else {}

    def _latency(self, runtime: Runtime, parent: Runtime | None, tasks: list[Task], adapter_for: AdapterFor) -> dict[str, Metric]:
        """Seconds per generated token, one request at a time, candidate and parent in turn on the same prompts in one run: one, the other
        twice as long, the first again, so that a machine that slows down or recovers meanwhile favours neither. Prompts share their
        start as they do in a server."""
        seconds: list[tuple[float, float]] = []
        streams = runtime.sampler.open(1), (parent or runtime).sampler.open(1)
        for index, task in enumerate(spread(tasks, self.recipe.latency)):
            prompt = tuple(runtime.contract.prompt_ids(task.messages, task.tools))
            answers = [
                _seconds_of_tokens(stream, SampleRequest(prompt, 0, SampleOptions(2 * _LATENCY_TOKENS + 2), None, adapter))
                for stream, adapter in zip(streams, (adapter_for(task), None), strict=True)
            ]
            ticks: tuple[list[float], list[float]] = ([], [])
            for side in (0, 1, 1, 0) if index % 2 == 0 else (1, 0, 0, 1):
                ticks[side].extend(islice(answers[side], _LATENCY_TOKENS))
            for answer in answers:
                answer.close()
            if all(ticks):
                seconds.append((float(np.median(ticks[0])), float(np.median(ticks[1]))))
        if not seconds:
            return {}
        return {
            "latency_s": _mean([own for own, _ in seconds], "s/token"),
            "latency_ratio": _mean([own / other for own, other in seconds], "ratio"),
        }


@torch.no_grad()
def sequence_divergences(
    runtime: Runtime, parent: Runtime | None, adapter: str | None, sequences: Sequence[Rendered]
) -> list[float]:
    """Mean KL(candidate || parent) per learned token of each sequence."""
    means: dict[int, float] = {}
    for pack in (packed.to(runtime.policy.device) for packed in fill_packs(sequences, 1024)):
        runtime.policy.use(adapter)
        hidden = runtime.policy.hidden(pack)[pack.rows]
        if parent is None:
            with runtime.policy.only_base():
                other = runtime.policy.hidden(pack)[pack.rows]
        else:
            other = parent.policy.hidden(pack)[pack.rows]
        head, parent_head = runtime.policy.head, (parent or runtime).policy.head
        values = pack.pad(head.tokenwise(reverse_kl_tokens, hidden, [(parent_head, other)]))
        counts = pack.mask().sum(1)
        for place, member in enumerate(pack.members):
            means[member] = float(values[place].sum() / counts[place])
    return [means[index] for index in sorted(means)]


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` items at even distances (all of them when there are fewer)."""
    if count >= len(items):
        return list(items)
    return [items[int(index)] for index in np.linspace(0, len(items) - 1, count)] if count else []


def _seconds_of_tokens(stream: Stream[SampleRequest, Sample], request: SampleRequest) -> Generator[float]:
    """How long each token of one answer took, without those that the prompt's own step gave. Closed, it leaves the stream."""
    (ticket,) = stream.admit([request])
    try:
        found = stream.step()
        while ticket not in found:
            start = time.perf_counter()
            found = stream.step()
            yield time.perf_counter() - start
        if isinstance(error := found[ticket], Exception):
            raise error
    finally:
        stream.cancel(ticket)


def _mean(values: Sequence[float], unit: str) -> Metric:
    low, high = mean_interval(values)
    return Metric(float(np.mean(values)), low, high, len(values), unit)
