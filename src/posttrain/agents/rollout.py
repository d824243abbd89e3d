"""Episodes: many tasks at once, each at its own turn and in a private copy of the world.

Tokens are the truth: an episode's context is the prompt's ids, then the sampled ids of each turn as they are, then the ids of what
was put after it. Nothing that was sampled is ever tokenised again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol, TypeVar

from posttrain.agents.budget import Budget, Spent
from posttrain.agents.guard import Guard
from posttrain.agents.tools import Toolbox, validator_of
from posttrain.agents.world import Environment, World
from posttrain.contract import MalformedCall
from posttrain.data.records import Episode, Message, StopReason, Task, ToolOutcome, ToolSpec, Turn
from posttrain.errors import DataError, VerifierError
from posttrain.grammar import Grammar, shown, turn_grammar
from posttrain.sampling.protocol import Converses, Sample, SampleOptions, SampleRequest
from posttrain.verifying import Judgement, Verifier, expected

_log = logging.getLogger(__name__)
T = TypeVar("T")
Finish = Callable[[Task, Episode, Environment | None], T]


class Turns(Protocol):
    """What a rollout needs of a contract."""

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]: ...

    def continuation_ids(self, messages: Sequence[Message]) -> list[int]: ...

    def parse(self, ids: Sequence[int]) -> Message: ...


class OnDenial(StrEnum):
    """What happens when a call is denied."""

    TELL = "tell"  # the model reads the refusal as the call's result and may go on: to explain, or to take the compliant way
    STOP = "stop"  # the episode ends as DENIED


@dataclass(frozen=True, slots=True)
class RolloutOptions:
    """How to play. copies: episodes of each task (best-of-K, GRPO groups). constrained: turns follow the grammar of the task's tools
    and response schema. max_calls, max_tokens, max_seconds: the budget of one episode; max_context: ids the model can read."""

    max_tokens_per_turn: int = 192
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    constrained: bool = True
    copies: int = 1
    calls_per_turn: int = 2
    max_calls: int | None = 8
    max_tokens: int | None = None
    max_seconds: float | None = None
    max_context: int | None = None
    on_denial: OnDenial = OnDenial.TELL

    @property
    def budget(self) -> Budget:
        return Budget(self.max_calls, self.max_tokens, self.max_seconds)


def run_episodes(
    tasks: Sequence[Task],
    *,
    sampler: Converses,
    contract: Turns,
    world: World,
    guard: Guard,
    options: RolloutOptions,
    adapter_for: Callable[[Task], str | None] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Episode]:
    """`options.copies` episodes of each task, in the tasks' order. `progress` is told how many episodes ended since its last call.

    The same seed gives the same episodes whatever else is in the batch. Environments are closed on every way out.
    Raises DataError for a task without messages or with malformed tools, GrammarError for a schema that cannot be enforced.
    """
    table = _Table(sampler, contract, world, guard, options, adapter_for, seed)
    return table.play(tasks, lambda _, episode, __: episode, progress)


def run_judged(
    tasks: Sequence[Task],
    *,
    sampler: Converses,
    contract: Turns,
    world: World,
    guard: Guard,
    options: RolloutOptions,
    adapter_for: Callable[[Task], str | None] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[Episode, Judgement | None]]:
    """`run_episodes`, each episode judged by its task's verifier in the world as it left it; what the budget cut has not passed. None: it
    could not be judged, the log says why.

    Verifiers are the world's, and `expected`. Raises VerifierError for a task that names another, before anything is sampled.
    """
    verifiers: Mapping[str, Verifier] = {"expected": expected, **world.verifiers()}
    for task in tasks:
        if task.verifier not in verifiers:
            known = ", ".join(sorted(verifiers))
            raise VerifierError("unknown verifier", where=f"task {task.id}", value=task.verifier, remedy=f"known: {known}")

    def judge(task: Task, episode: Episode, environment: Environment | None) -> tuple[Episode, Judgement | None]:
        try:
            found = verifiers[task.verifier](task, episode, environment)
            # half a sentence is no answer, though its grammar made JSON of it
            return episode, replace(found, passed=False) if episode.stop.cut else found
        except VerifierError as error:
            _log.warning("could not be judged: %s", error)
        except Exception:  # what a model says is any text: a verifier that chokes on it must not end the other episodes
            _log.exception("task %s could not be judged: %s failed", task.id, task.verifier)
        return episode, None

    table = _Table(sampler, contract, world, guard, options, adapter_for, seed)
    return table.play(tasks, judge, progress, needs_world=True)


def turn_seed(seed: int, task: str, turn: int, copy: int) -> int:
    """The seed of one sampled turn, in [0, 2^63): depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}\0{task}\0{turn}\0{copy}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class _Table:
    """What all episodes of one call share."""

    sampler: Converses
    contract: Turns
    world: World
    guard: Guard
    options: RolloutOptions
    adapter_for: Callable[[Task], str | None] | None
    seed: int

    def play(
        self, tasks: Sequence[Task], finish: Finish[T], progress: Callable[[int], None] | None, *, needs_world: bool = False
    ) -> list[T]:
        plays = [play for task in tasks for play in self._open(task)]
        results: dict[int, T] = {}
        with ExitStack() as closing:  # an environment that fails to close must not keep the others open
            for play in plays:
                closing.callback(play.close)

            def go_on(index: int) -> SampleRequest | None:
                """What the episode asks next; None when it is over, and then judged."""
                play = plays[index]
                if play.stop is None:
                    return play.request()
                environment = play.environment() if needs_world and play.task.environment else play.opened
                results[index] = finish(play.task, play.episode(), environment)
                play.close()
                if progress is not None:
                    progress(1)
                return None

            def then(conversation: int, sample: Sample) -> SampleRequest | None:
                index = playing[conversation]
                plays[index].take(sample)
                return go_on(index)

            first = {index: request for index in range(len(plays)) if (request := go_on(index)) is not None}
            playing = list(first)
            self.sampler.converse(list(first.values()), then)
        return [results[index] for index in range(len(plays))]

    def _open(self, task: Task) -> list[_Play]:
        """The copies of one task. What could be wrong with a task is found here, before anything is sampled."""
        if not task.messages:
            raise DataError("a task without messages", where=f"task {task.id}", remedy="give it a request")
        for tool in task.tools:
            validator_of(tool)
        grammar = self.grammar(task, task.messages)
        prompt = self.contract.prompt_ids(task.messages, task.tools)
        return [_Play(self, task, copy, list(prompt), grammar) for copy in range(self.options.copies)]

    def grammar(self, task: Task, messages: Sequence[Message]) -> Grammar | None:
        """What the next turn may say after these messages."""
        if not self.options.constrained:
            return None
        calls = self.options.calls_per_turn
        return turn_grammar(task.tools, task.response_schema, max_calls=calls, evidence=shown(messages))


class _Play:
    """One episode being played."""

    def __init__(self, table: _Table, task: Task, copy: int, ids: list[int], grammar: Grammar | None) -> None:
        self.table, self.task, self.copy, self.ids, self.grammar = table, task, copy, ids, grammar
        self.messages: list[Message] = list(task.messages)
        self.turns: list[Turn] = []
        self.outcomes: list[ToolOutcome] = []
        self.spent = Spent(table.options.budget)
        self.seconds = 0.0
        self.opened: Environment | None = None
        self.toolbox = Toolbox(task.tools, task.tenant, table.world, table.guard, self.environment)
        self.stop: StopReason | None = None
        self._check_budget()

    def environment(self) -> Environment:
        """This episode's own copy of the world, opened when first needed."""
        if self.opened is None:
            self.opened = self.table.world.environment(self.task.environment, tenant=self.task.tenant)
        return self.opened

    def request(self) -> SampleRequest:
        options, adapter_for = self.table.options, self.table.adapter_for
        return SampleRequest(
            prompt=tuple(self.ids),
            seed=turn_seed(self.table.seed, self.task.id, len(self.turns), self.copy),
            options=SampleOptions(self._room(), options.temperature, options.top_p, options.top_k),
            grammar=self.grammar,
            adapter=None if adapter_for is None else adapter_for(self.task),
        )

    def take(self, sample: Sample) -> None:
        """Add one sampled turn, act on it, and say in `stop` whether the episode is over."""
        message, malformed = self._read(sample)
        forced = tuple(sample.forced)
        turn = Turn(
            len(self.ids), tuple(sample.ids), tuple(sample.logprobs), tuple(sample.sampled_logprobs), forced, message, sample.stop
        )
        self.turns.append(turn)
        self.messages.append(message)
        self.ids += sample.ids
        self.spent.tokens += len(sample.ids)
        if sample.stop is not StopReason.END_OF_TURN:
            self.stop = sample.stop  # a prefix: whatever call it holds is never executed
        elif malformed:
            self.stop = StopReason.MALFORMED_CALL
        elif not message.tool_calls:
            self.stop = StopReason.END_OF_TURN
        else:
            self._act(message)
        self.seconds = self.spent.seconds

    def _read(self, sample: Sample) -> tuple[Message, bool]:
        """The turn as a message, with call ids that are unique in the episode; and whether it holds a broken call."""
        try:
            message = self.table.contract.parse(sample.ids)
        except MalformedCall as error:
            return Message("assistant", error.value if isinstance(error.value, str) else ""), True
        first = sum(len(turn.message.tool_calls) for turn in self.turns)
        calls = tuple(replace(call, id=f"call_{first + offset}") for offset, call in enumerate(message.tool_calls))
        return replace(message, tool_calls=calls), False

    def _act(self, message: Message) -> None:
        results = []
        for call in message.tool_calls:
            if not self.spent.take_call():
                self.stop = StopReason.MAX_TURNS
                break
            outcome = self.toolbox.run(call, self.messages)
            self.outcomes.append(outcome)
            results.append(Message("tool", outcome.content, (), call.id))
            if outcome.denied is not None and self.table.options.on_denial is OnDenial.STOP:
                self.stop = StopReason.DENIED
                break
        self.messages += results
        if self.stop is None and len(self.turns) >= self.task.max_turns:
            self.stop = StopReason.MAX_TURNS
        if self.stop is None:
            self.ids += self.table.contract.continuation_ids(results)
            self.grammar = self.table.grammar(self.task, self.messages)  # the results are new evidence
            self._check_budget()

    def _check_budget(self) -> None:
        self.stop = self.spent.exhausted() or (StopReason.LENGTH if self._room() < 1 else None)

    def _room(self) -> int:
        """Tokens that the next turn may have."""
        options = self.table.options
        room = self.spent.tokens_left(options.max_tokens_per_turn)
        return room if options.max_context is None else min(room, options.max_context - len(self.ids))

    def episode(self) -> Episode:
        assert self.stop is not None
        return Episode(
            task_id=self.task.id,
            tenant=self.task.tenant,
            kind=self.task.kind,
            messages=tuple(self.messages),
            turns=tuple(self.turns),
            outcomes=tuple(self.outcomes),
            stop=self.stop,
            ids=tuple(self.ids),
            seconds=self.seconds,
        )

    def close(self) -> None:
        if self.opened is not None:
            opened, self.opened = self.opened, None
            opened.close()
