"""Playing tasks: a runtime's sampler, the world's tools and guard, and its verifiers, as one call that gives judged episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain.agents import Guard, RolloutOptions, World, run_judged
from posttrain.agents.demonstration import play_demonstration
from posttrain.data.records import Episode, Task
from posttrain.pipeline.console import Console
from posttrain.pipeline.runtime import Runtime
from posttrain.training import team
from posttrain.verifying.judgement import Judgement

PlayedTask = tuple[Task, Episode, Judgement | None]


@dataclass(frozen=True, slots=True)
class Player:
    """Plays tasks with one runtime in one world."""

    runtime: Runtime
    world: World
    console: Console
    max_tokens: int = 160

    def play(
        self, tasks: Sequence[Task], options: RolloutOptions, adapter_for: Callable[[Task], str | None], seed: int
    ) -> list[PlayedTask]:
        """`options.copies` judged episodes of each task, in order; the judgement is None where the verifier could not judge."""
        with self.console.progress("episodes", len(tasks) * options.copies) as advance:
            judged = run_judged(
                tasks, sampler=self.runtime.sampler, contract=self.runtime.contract, world=self.world, guard=Guard.of(self.world),
                options=options, adapter_for=adapter_for, seed=seed, progress=advance,
            )  # fmt: skip
        owners = [task for task in tasks for _ in range(options.copies)]
        return [(task, episode, judgement) for task, (episode, judgement) in zip(owners, judged, strict=True)]

    def show(self, tasks: Sequence[Task]) -> list[tuple[Episode, Judgement | None]]:
        """Each task's demonstration, played and judged; of several processes each plays a share and all get every episode."""
        guard, contract = Guard.of(self.world), self.runtime.contract
        return team().joined(
            [play_demonstration(task, contract=contract, world=self.world, guard=guard) for task in team().split(tasks)]
        )

    def draw(
        self, tasks: Sequence[Task], copies: int, seed: int, adapter: str | None, temperature: float
    ) -> list[tuple[Episode, Judgement | None]]:
        """Unconstrained samples for training: what is learned must be the model's own choice, not the grammar's. Of several processes
        each plays a share of the tasks; all get every episode."""
        options = RolloutOptions(max_tokens_per_turn=self.max_tokens, temperature=temperature, constrained=False, copies=copies)
        played = self.play(team().split(tasks), options, lambda task: adapter, seed)
        by_task = [played[start : start + copies] for start in range(0, len(played), copies)]
        return [(episode, judgement) for group in team().joined(by_task) for _, episode, judgement in group]
