"""Demonstrations played like any episode: their calls run in the task's world, behind the guard, and the task's verifier judges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from posttrain.agents.guard import Guard
from posttrain.agents.rollout import RolloutOptions, Turns, run_judged
from posttrain.agents.world import World
from posttrain.data.records import Episode, Message, StopReason, Task
from posttrain.sampling.protocol import Sample, SampleRequest, Then
from posttrain.verifying import Judgement


class WritesTurns(Turns, Protocol):
    """What playing a demonstration needs of a contract."""

    def turn_ids(self, message: Message) -> tuple[int, ...]: ...


def play_demonstration(task: Task, *, contract: WritesTurns, world: World, guard: Guard) -> tuple[Episode, Judgement | None]:
    """The episode of `task.demonstration` and its judgement (None: the log says why there is none). Results of tools are those that the
    world gives, whatever the demonstration shows; log-probabilities are 0, as nobody sampled it, and a turn that is not to be learned
    counts as forced. An episode that ends before the last turn lacks the rest of them. Raises what `run_judged` raises."""
    shown = assistant_turns(task)
    turns = [_Turn(contract.turn_ids(message), message.learn) for message in shown]
    options = RolloutOptions(max_tokens_per_turn=max((len(turn.ids) for turn in turns), default=1), constrained=False)
    ((episode, judgement),) = run_judged(
        [task], sampler=_Reader(turns), contract=contract, world=world, guard=guard, options=options
    )
    return episode, judgement


def assistant_turns(task: Task) -> list[Message]:
    """The turns of the demonstration that a model would have written."""
    return [message for message in task.demonstration if message.role == "assistant"]


@dataclass(frozen=True, slots=True)
class _Turn:
    ids: tuple[int, ...]
    learn: bool

    def read(self) -> Sample:
        zeros = (0.0,) * len(self.ids)
        stop = StopReason.END_OF_TURN if self.ids else StopReason.CANCELLED
        return Sample(self.ids, zeros, zeros, (not self.learn,) * len(self.ids), stop)


_NONE = _Turn((), learn=False)


@dataclass(frozen=True, slots=True)
class _Reader:
    """One conversation whose turns are read off; a turn that is not there is an empty one."""

    turns: Sequence[_Turn]

    def converse(self, requests: Sequence[SampleRequest], then: Then) -> None:
        asked = requests[0] if requests else None
        for turn in (*self.turns, _NONE):
            if asked is None:
                return
            asked = then(0, turn.read())
