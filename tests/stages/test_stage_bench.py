"""The loop all stages share: its data order, its early stops, its checkpoints, and steps that hold nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from workshop import FAST, LORA, Shop

from posttrain.errors import CheckpointError
from posttrain.objectives.supervised import sft_ce
from posttrain.policy import Pack
from posttrain.stages import Work, Workbench, train
from posttrain.stages.bench import batches, derive, learned_weight, leash
from posttrain.training import Learner, Scored
from tiny_models import sequence

PACK = Pack.of([sequence([*range(10, 30), 5, 6])])


def objective(scored: Scored) -> tuple[torch.Tensor, Mapping[str, Any]]:
    return sft_ce(scored.padded_logprobs(), scored.pack.padded_weights())


def learner(bench: Workbench, steps: int = 5) -> Learner:
    bench.policy.add_adapter("main", LORA, bench.seed)
    return Learner.for_adapter(bench.policy, "main", FAST, steps)


@given(st.integers(1, 50), st.integers(1, 12), st.floats(0.05, 4.0), st.integers(0, 2**40))
def test_batches_pass_over_all_data_as_often_as_asked(count: int, size: int, epochs: float, seed: int) -> None:
    plan = batches(count, size, epochs, seed)
    flat = [index for batch in plan for index in batch]
    assert len(flat) == max(1, round(count * epochs))
    assert all(len(batch) == size for batch in plan[:-1]) and 1 <= len(plan[-1]) <= size
    for start in range(0, len(flat), count):
        whole = flat[start : start + count]
        assert len(set(whole)) == len(whole)  # nothing twice within a pass
        assert set(whole) == set(range(count)) or len(whole) < count
    assert batches(count, size, epochs, seed) == plan


def test_each_pass_is_shuffled_anew_and_by_the_seed() -> None:
    first, second = (batches(30, 30, 2.0, seed=1)[i] for i in (0, 1))
    assert first != second != sorted(second) and sorted(first) == sorted(second)
    assert batches(30, 30, 1.0, seed=2)[0] != first


def test_the_global_weight_is_the_sum_over_all_sequences() -> None:
    assert learned_weight([sequence([1, 2, 3], [1, 2], 0.5), sequence([1, 2], [1])]) == 2.0
    assert learned_weight([]) == 0.0


def test_derived_seeds_depend_on_every_part_and_fit_in_62_bits() -> None:
    seeds = [derive(1), derive(2), derive(1, "a"), derive(1, "b"), derive(1, "a", 0), derive(1, "a0")]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**62 for seed in seeds)
    assert derive(1, "rollout", 3) == derive(1, "rollout", 3)
    np.random.default_rng(derive(9, "x"))  # what it is for


def test_every_step_is_logged_once_with_loss_rate_and_size(shop: Shop) -> None:
    bench = shop.bench()
    assert train(bench, learner(bench), lambda step: Work([PACK], objective, {"extra": float(step)})) is None
    assert [(phase, step) for phase, step, _ in shop.notes.lines] == [("train", step) for step in range(5)]
    assert all({"loss", "lr", "grad_norm", "pack_tokens"} <= metrics.keys() for _, _, metrics in shop.notes.lines)
    assert shop.notes.of("extra") == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert shop.notes.of("pack_tokens") == [22.0] * 5


def test_a_step_without_packs_moves_nothing_but_counts(shop: Shop) -> None:
    bench = shop.bench()
    it = learner(bench)
    seen: list[torch.Tensor] = []

    def work(step: int) -> Work:
        seen.append(torch.cat([p.detach().flatten() for p in it.parameters.values()]))
        return Work([] if step in (2, 3) else [PACK], objective, {"reward": 0.0})

    train(bench, it, work)
    assert it.steps_done == 5
    assert torch.equal(seen[2], seen[3]) and torch.equal(seen[3], seen[4])
    assert not torch.equal(seen[1], seen[2])
    assert [len(m) for _, _, m in shop.notes.lines][2] == 3  # its own metric, the rate and a zero norm


def test_the_watch_stops_a_stage_and_the_reason_survives_a_restart(shop: Shop) -> None:
    calls: list[int] = []

    def watch(step: int, metrics: Mapping[str, float]) -> str | None:
        calls.append(step)
        return f"guardrail fell at step {step}" if step == 2 else None

    bench = shop.bench(watch=watch)
    it = learner(bench)
    assert train(bench, it, lambda step: Work([PACK], objective)) == "guardrail fell at step 2"
    assert calls == [0, 1, 2] and it.steps_done == 3
    again = shop.bench(watch=watch)
    assert train(again, learner(again), lambda step: pytest.fail("trained on")) == "guardrail fell at step 2"


def test_a_leash_stops_at_its_limit_and_otherwise_asks_the_watch() -> None:
    inner = lambda step, metrics: "inner" if step == 9 else None  # noqa: E731
    bound = leash(inner, lambda metrics: metrics["drift"], 0.5, "drift")
    assert bound(0, {"drift": 0.5}) is None
    assert bound(1, {"drift": 0.51}) == "drift 0.510 exceeds 0.5 at step 1"
    assert bound(2, {"drift": float("nan")}) == "drift nan exceeds 0.5 at step 2"
    assert bound(9, {"drift": 0.1}) == "inner"
    assert leash(inner, lambda metrics: metrics["drift"], None, "drift")(1, {"drift": 99.0}) is None


def test_phases_of_one_stage_keep_their_checkpoints_apart(shop: Shop) -> None:
    bench = shop.bench()
    it = learner(bench, 2)
    train(bench, it, lambda step: Work([PACK], objective), "collect")
    second = Learner.for_adapter(bench.policy, "main", FAST, 3)
    train(bench, second, lambda step: Work([PACK], objective), "grpo")
    assert it.steps_done == 2 and second.steps_done == 3
    assert sorted(p.name for p in (bench.folder / "checkpoints").iterdir()) == ["collect", "grpo"]


def test_a_changed_number_of_steps_is_another_run(shop: Shop) -> None:
    bench = shop.bench()
    train(bench, learner(bench, 3), lambda step: Work([PACK], objective))
    again = shop.bench()
    with pytest.raises(CheckpointError, match="other options"):
        train(again, learner(again, 4), lambda step: Work([PACK], objective))


def test_an_error_in_a_step_keeps_the_steps_before_it(shop: Shop) -> None:
    def work(step: int) -> Work:
        if step == 3:
            raise RuntimeError("the machine went away")
        return Work([PACK], objective)

    bench = shop.bench()
    with pytest.raises(RuntimeError, match="went away"):
        train(bench, learner(bench), work)
    again = shop.bench()
    done: list[int] = []

    def rest(step: int) -> Work:
        done.append(step)
        return Work([PACK], objective)

    train(again, learner(again), rest)
    assert done == [3, 4]


def test_memory_is_given_back_when_it_has_grown(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    sizes = iter(
        gib << 30 for gib in (4, 3, 4, 5, 9, 9)
    )  # what a step leaves; the second is the least, the fourth is over it by two
    monkeypatch.setattr("posttrain.stages.bench._GAPS", 1 << 30)
    monkeypatch.setattr("posttrain.policy.heap.resident", lambda: next(sizes))
    monkeypatch.setattr("posttrain.policy.heap.trim_heap", lambda: given.append(len(shop.notes.lines)))
    bench = shop.bench()
    train(bench, learner(bench, 6), lambda step: Work([PACK], objective))
    assert given == [3]
