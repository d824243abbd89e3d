"""A tiny training run that another process may kill: `python killable.py KIND FOLDER` says each step it finished.

KIND: sft, dpo, or a loss of `GrpoOptions`. The tests import `run` as well, to finish the killed run and to make the uninterrupted one it
is compared with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from posttrain.contract import Contract
from posttrain.data.records import Conversation, Episode, Message, Preference, StopReason, Task, Turn
from posttrain.policy import LoraOptions, Policy
from posttrain.sampling import LocalSampler, SampleOptions, SampleRequest
from posttrain.stages import Workbench, preference, reason, rollouts, sft
from posttrain.stages.bench import derive
from posttrain.stages.policy_gradient import GrpoOptions, Loss, Played
from posttrain.training import OptimiserOptions, team
from posttrain.verifying.judgement import Judgement
from tiny_models import tiny_model, train_tokenizer

STEPS = 12
IDENTITY = "killable"
OPTIMISER = OptimiserOptions(lr=5e-3)
LORA = LoraOptions(rank=4, alpha=8)


def say(phase: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
    print(f"step {step}", flush=True)
    sys.stdin.readline()  # whoever kills this process says when it may go on


def quiet(phase: str, step: int, total: int, metrics: Mapping[str, float]) -> None: ...


def run(
    kind: str,
    folder: Path,
    *,
    log: object = quiet,
    dtype: torch.dtype = torch.float32,
    place: Callable[[Any], Any] = lambda model: model,
) -> dict[str, torch.Tensor]:
    """Train and return the adapter's final weights. `place` moves the model where it is to compute."""
    torch.manual_seed(0)
    contract = Contract(train_tokenizer())
    policy = Policy(place(tiny_model(vocabulary=contract.vocabulary_size).to(dtype)))
    if (sharding := team().sharding) is not None:
        policy.shard(sharding.reshard)
    bench = Workbench(policy, contract, folder, identity=IDENTITY, seed=3, pack_tokens=120, log=log)  # type: ignore[arg-type]
    asked = [Message("user", f"What is due on account {i}?") for i in range(8)]
    if kind == "sft":
        records = [Conversation(str(i), (m, Message("assistant", f"{i}2.50 is due"))) for i, m in enumerate(asked)]
        sft.run(sft.SftOptions(batch=4, epochs=STEPS / 2, adapter=LORA, optimiser=OPTIMISER), records, bench)
    elif kind != "dpo":
        tasks = [Task(str(i), (m,), demonstration=(Message("assistant", f"{i}2.50"),)) for i, m in enumerate(asked)]
        again, loss = 2 if kind == "dapo" else 0, cast(Loss, kind)
        grpo = GrpoOptions(steps=STEPS, tasks=2, group=4, max_len=6, loss=loss, refills=again, optimiser=OPTIMISER)
        options = reason.ReasonOptions(LORA, reason.CollectOptions(tasks=0), grpo)
        reason.run(options, tasks * (grpo.needed // 8), played_on(bench, rough=kind == "dapo"), bench, show=shown_on(bench))
    else:
        pairs = [
            Preference(str(i), (m,), (Message("assistant", f"{i}2.50"),), (Message("assistant", "a lot"),))
            for i, m in enumerate(asked)
        ]
        leash = preference.PreferenceOptions(batch=4, epochs=STEPS / 2, adapter=LORA, optimiser=OPTIMISER)
        preference.run(leash, pairs, bench)
    return {name: p.detach().clone() for name, p in policy.adapter_parameters("main").items()}


def played_on(bench: Workbench, *, rough: bool = False) -> rollouts.Play:
    """Six sampled tokens a task and copy; the score is the share of tokens with an even number, `rough`: whether most are, so that some
    groups score alike."""
    sampler = LocalSampler(bench.policy, bench.contract.end_of_turn)

    def play(tasks: Sequence[Task], copies: int, seed: int, adapter: str | None) -> list[tuple[Episode, Judgement | None]]:
        asked = [
            SampleRequest(
                tuple(bench.contract.prompt_ids(t.messages)), derive(seed, t.id, c), SampleOptions(6, 1.0), adapter=adapter
            )
            for t in tasks
            for c in range(copies)
        ]
        played: list[tuple[Episode, Judgement | None]] = []
        for request, got in zip(asked, sampler.sample(asked), strict=True):
            turn = Turn(
                len(request.prompt), got.ids, got.logprobs, got.sampled_logprobs, got.forced, Message("assistant"), got.stop
            )
            episode = Episode("x", None, "task", (), (turn,), (), got.stop, (*request.prompt, *got.ids))
            score = sum(token % 2 == 0 for token in got.ids) / len(got.ids)
            score = float(score > 0.6) if rough else score
            played.append((episode, Judgement(score == 1.0, score)))
        return played

    return play


def shown_on(bench: Workbench) -> rollouts.Show:
    """Each task's demonstration as an episode that passed."""

    def show(tasks: Sequence[Task]) -> list[Played]:
        played: list[Played] = []
        for task in tasks:
            prompt = tuple(bench.contract.prompt_ids(task.messages))
            ids = bench.contract.turn_ids(task.demonstration[0])
            zeros, stop = (0.0,) * len(ids), StopReason.END_OF_TURN
            turn = Turn(len(prompt), ids, zeros, zeros, (False,) * len(ids), task.demonstration[0], stop)
            played.append((Episode(task.id, None, "task", (), (turn,), (), stop, (*prompt, *ids)), Judgement(True, 1.0)))
        return played

    return show


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), log=say)
    print("finished", flush=True)
