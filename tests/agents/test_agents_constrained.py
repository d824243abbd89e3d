"""Contract, grammar and rollout together: whatever a constrained model says is a valid call or a valid answer."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from agents_fakes import ADD, PAY, FakeWorld, ask, in_rounds

from posttrain.agents import Guard, RolloutOptions, run_episodes
from posttrain.contract import Contract
from posttrain.data import Episode, StopReason
from posttrain.grammar import GrammarEngine, forced_rows
from posttrain.sampling.protocol import Sample, SampleRequest, Then

SCHEMA = {
    "type": "object",
    "properties": {"decision": {"enum": ["answer", "refuse"]}, "summary": {"type": "string", "maxLength": 12}},
    "required": ["decision", "summary"],
    "additionalProperties": False,
}


class RandomSampler:
    """A model without sense: draws any token the mask allows, and closes texts and numbers often enough to end."""

    def __init__(self, contract: Contract) -> None:
        size = contract.vocabulary_size + 7
        self.engine = GrammarEngine(contract.tokenizer, size, contract.end_of_turn)
        self.weights = np.ones(size)
        for token in range(contract.vocabulary_size):
            text = contract.decode([token])
            self.weights[token] = 40.0 if '"' in text or text in ("}", "}}", "<") else 1.0
        self.weights[contract.end_of_turn] = 400.0

    def converse(self, requests: Sequence[SampleRequest], then: Then) -> None:
        in_rounds(self.sample, requests, then)

    def sample(self, requests: Sequence[SampleRequest], progress: Any = None) -> list[Sample]:
        return [self._one(request) for request in requests]

    def _one(self, request: SampleRequest) -> Sample:
        assert request.grammar is not None
        rng, matcher = random.Random(request.seed), self.engine.matcher(request.grammar)
        ids: list[int] = []
        forced: list[bool] = []
        while len(ids) < request.options.max_tokens and (not ids or ids[-1] != self.engine.eos_id):
            mask = self.engine.fill([matcher])
            allowed = np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little"))
            ids.append(rng.choices(allowed.tolist(), self.weights[allowed].tolist())[0])
            forced.append(bool(forced_rows(mask)[0]))
            matcher.consume(ids[-1])
        stop = StopReason.END_OF_TURN if ids[-1] == self.engine.eos_id else StopReason.LENGTH
        logs = tuple(0.0 for _ in ids)
        return Sample(tuple(ids), logs, logs, tuple(forced), stop)


@pytest.fixture
def episodes(contract: Contract) -> list[Episode]:
    world = FakeWorld()
    tasks = [ask(f"t{n}", tools=(ADD, PAY), response_schema=SCHEMA, max_turns=6) for n in range(12)]
    options = RolloutOptions(max_tokens_per_turn=400, temperature=1.0, copies=2, max_calls=None)
    parts: dict[str, Any] = {"sampler": RandomSampler(contract), "contract": contract, "world": world, "guard": Guard.of(world)}
    return run_episodes(tasks, **parts, options=options)


def test_every_turn_parses_and_every_call_is_valid_or_denied(episodes: list[Episode]) -> None:
    assert {episode.stop for episode in episodes} <= {StopReason.END_OF_TURN, StopReason.MAX_TURNS}
    assert sum(len(episode.outcomes) for episode in episodes) > 10
    for outcome in (outcome for episode in episodes for outcome in episode.outcomes):
        assert outcome.ok or outcome.denied is not None, outcome


def test_every_answer_fits_the_schema(episodes: list[Episode]) -> None:
    answers = [json.loads(episode.answer) for episode in episodes if episode.stop is StopReason.END_OF_TURN]
    assert answers
    assert all(list(answer) == ["decision", "summary"] for answer in answers)


def test_turns_lie_in_the_context_where_they_say_and_training_learns_just_their_free_tokens(
    episodes: list[Episode], contract: Contract
) -> None:
    for episode in episodes:
        sequence = contract.render_episode(episode)
        learned = np.zeros(len(episode.ids), bool)
        for turn in episode.turns:
            here = slice(turn.prompt_length, turn.prompt_length + len(turn.ids))
            assert episode.ids[here] == turn.ids
            learned[here] = ~np.array(turn.forced)
        assert sequence.ids.tolist() == list(episode.ids)
        assert (sequence.weights > 0).tolist() == learned.tolist()
        assert any(any(turn.forced) for turn in episode.turns)


def test_the_context_before_the_last_turn_reads_as_the_contract_renders_those_messages(
    episodes: list[Episode], contract: Contract
) -> None:
    assert max(len(episode.turns) for episode in episodes) > 1
    for episode in episodes:
        last = max(index for index, message in enumerate(episode.messages) if message.role == "assistant")
        rendered = contract.prompt_ids(episode.messages[:last], (ADD, PAY))
        assert contract.decode(episode.ids[: episode.turns[-1].prompt_length]) == contract.decode(rendered)
