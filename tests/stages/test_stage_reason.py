"""Stage 5: what the verifier passed is learned, what it scores above its group becomes likelier, and the unscored teach nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from workshop import LORA, Shop

from posttrain.contract import Contract
from posttrain.data.records import Episode, Message, StopReason, Task, Turn
from posttrain.errors import DataError, RecipeError
from posttrain.policy import Pack
from posttrain.recipe import build
from posttrain.sampling import LocalSampler, SampleOptions, SampleRequest
from posttrain.stages import Workbench, reason
from posttrain.stages.bench import batches, derive
from posttrain.stages.policy_gradient import GrpoOptions, advantages_of, rewards_of
from posttrain.stages.reason import CollectOptions, ReasonOptions
from posttrain.training import OptimiserOptions
from posttrain.verifying.judgement import Judgement

GRPO = GrpoOptions(steps=6, tasks=2, group=8, max_len=3, optimiser=OptimiserOptions(lr=3e-2, warmup=0.0, floor=1.0))
OPTIONS = ReasonOptions(adapter=LORA, collect=CollectOptions(tasks=0), grpo=GRPO)
Judge = Callable[[Episode], Judgement | None]
Played = list[tuple[Episode, Judgement | None]]


def tasks(count: int) -> list[Task]:
    return [Task(f"t{i}", (Message("user", f"Reconcile account {i}."),)) for i in range(count)]


def likes_digits(contract: Contract) -> Judge:
    """Score: the share of sampled tokens whose text begins with a digit."""

    def judge(episode: Episode) -> Judgement:
        ids = episode.turns[0].ids
        score = sum(contract.decode([token])[:1].isdigit() for token in ids) / len(ids)
        return Judgement(score == 1.0, score)

    return judge


class Toy:
    """Plays one short turn per copy with the real sampler, on the policy as it stands, and keeps what it was asked."""

    def __init__(self, bench: Workbench, judge: Judge, tokens: int = 3, forced: bool = False, gap: float = 0.0) -> None:
        self.bench, self.judge, self.tokens, self.forced, self.gap = bench, judge, tokens, forced, gap
        self.sampler = LocalSampler(bench.policy, bench.contract.end_of_turn)
        self.calls: list[tuple[list[str], int, int, str | None]] = []
        self.played: list[Played] = []

    def __call__(self, asked: Sequence[Task], copies: int, seed: int, adapter: str | None) -> Played:
        self.calls.append(([task.id for task in asked], copies, seed, adapter))
        jobs = [(task, copy) for task in asked for copy in range(copies)]
        requests = [
            SampleRequest(
                tuple(self.bench.contract.prompt_ids(task.messages)),
                derive(seed, task.id, copy),
                SampleOptions(self.tokens, 1.0),
                adapter=adapter,
            )
            for task, copy in jobs
        ]
        episodes = []
        for (task, _), request, got in zip(jobs, requests, self.sampler.sample(requests), strict=True):
            forced = (self.forced, *got.forced[1:])
            logprobs = tuple(value - self.gap for value in got.logprobs)
            turn = Turn(len(request.prompt), got.ids, logprobs, got.sampled_logprobs, forced, Message("assistant"), got.stop)
            ids = (*request.prompt, *got.ids)
            episodes.append(Episode(task.id, None, "task", task.messages, (turn,), (), got.stop, ids))
        self.played.append([(episode, self.judge(episode)) for episode in episodes])
        return self.played[-1]


@torch.no_grad()
def digit_probability(bench: Workbench, asked: Sequence[Task]) -> float:
    """Probability that the first token of an answer begins with a digit, over the full softmax."""
    found = []
    digits = [t for t in range(bench.contract.vocabulary_size) if bench.contract.decode([t])[:1].isdigit()]
    for task in asked:
        prompt = bench.contract.prompt_ids(task.messages)
        pack = Pack.of([bench.contract.render_episode(empty_episode(prompt))])
        found.append(float(bench.policy.head.logits(bench.policy.hidden(pack)[-1:]).softmax(-1)[0, digits].sum()))
    return sum(found) / len(found)


def empty_episode(prompt: list[int]) -> Episode:
    turn = Turn(len(prompt), (), (), (), (), Message("assistant"), StopReason.LENGTH)
    return Episode("x", None, "task", (), (turn,), (), StopReason.LENGTH, tuple(prompt))


# -- GRPO ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", ["grpo", "centred"])
def test_what_the_verifier_rewards_becomes_likelier(shop: Shop, advantage: str) -> None:
    bench = shop.bench()
    asked = tasks(24)
    toy = Toy(bench, likes_digits(bench.contract))
    before = digit_probability(bench, asked)
    options = replace(OPTIONS, grpo=replace(GRPO, advantage=advantage, steps=24, tasks=1, group=32))
    assert reason.run(options, asked, toy, bench) is None
    bench.policy.use("main")
    assert digit_probability(bench, asked) > before + 0.25
    rewards = shop.notes.of("reward", "grpo")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2


def test_each_step_plays_its_own_tasks_with_the_adapter_as_it_stands(shop: Shop) -> None:
    bench = shop.bench()
    toy = Toy(bench, likes_digits(bench.contract))
    reason.run(OPTIONS, tasks(12), toy, bench)
    assert len(toy.calls) == 6
    assert {(copies, adapter) for _, copies, _, adapter in toy.calls} == {(8, "main")}
    assert len({seed for _, _, seed, _ in toy.calls}) == 6
    assert sorted(name for names, *_ in toy.calls for name in names) == sorted(task.id for task in tasks(12))


def test_the_samplers_log_probabilities_are_the_learners_so_the_first_ratio_is_one(shop: Shop) -> None:
    bench = shop.bench()
    reason.run(OPTIONS, tasks(12), Toy(bench, likes_digits(bench.contract)), bench)
    tokens, gaps = shop.notes.of("tokens", "grpo"), shop.notes.of("sampler_gap_sum", "grpo")
    assert all(gap / count < 1e-4 for gap, count in zip(gaps, tokens, strict=True))
    assert all(count == 0 for count in shop.notes.of("clipped_tokens", "grpo"))


def test_a_step_does_not_depend_on_how_it_is_packed(shop: Shop) -> None:
    lines = {}
    for size in (30, 5000):
        shop.notes.lines.clear()
        bench = shop.bench(f"size{size}", pack_tokens=size)
        reason.run(
            replace(OPTIONS, grpo=replace(GRPO, steps=1, beta=0.1)), tasks(2), Toy(bench, likes_digits(bench.contract)), bench
        )
        lines[size] = dict(shop.notes.lines[0][2])
    assert lines[30].pop("pack_tokens") > lines[5000].pop("pack_tokens")
    assert lines[30] == pytest.approx(lines[5000], abs=1e-3)


def test_groups_in_which_all_score_alike_teach_nothing_and_cost_no_pass(shop: Shop) -> None:
    bench = shop.bench()
    reason.run(OPTIONS, tasks(12), Toy(bench, lambda episode: Judgement(True, 0.7)), bench)
    for _, _, metrics in shop.notes.lines:
        assert metrics["groups_with_signal"] == 0.0 and metrics["reward"] == pytest.approx(0.7)
        assert metrics["grad_norm"] == 0.0 and "pack_tokens" not in metrics
    assert all(not p.any() for n, p in bench.policy.adapter_parameters("main").items() if "lora_B" in n)


def test_a_penalty_to_the_parent_holds_where_all_of_a_group_score_alike(shop: Shop) -> None:
    """objectives.md 5.4: k3 is of all completions of the group, whatever their advantage."""
    bench = shop.bench()
    digits, seen = likes_digits(bench.contract), []

    def judge(episode: Episode) -> Judgement | None:
        seen.append(episode)
        if len(seen) <= 2 * 16:  # two steps move the policy, after which every answer is as good
            return digits(episode)
        return None if len(seen) % 16 == 0 else Judgement(True, 0.7)

    toy = Toy(bench, judge)
    reason.run(replace(OPTIONS, grpo=replace(GRPO, steps=3, beta=0.5)), tasks(6), toy, bench)
    last = shop.notes.lines[-1][2]
    assert last["groups_with_signal"] == 0.0 and last["grad_norm"] > 0
    judged = [e for e, j in toy.played[-1] if j is not None]
    assert len(judged) == 15 and last["tokens"] == sum(len(e.turns[0].ids) for e in judged)
    assert last["loss"] == pytest.approx(0.5 * last["kl_sum"] / (3 * 16), rel=1e-4)  # three tokens each, over all completions


def test_episodes_nobody_could_judge_are_left_out_of_their_group_and_of_the_update(shop: Shop) -> None:
    bench = shop.bench()
    digits = likes_digits(bench.contract)
    seen: list[Episode] = []

    def judge(episode: Episode) -> Judgement | None:
        seen.append(episode)
        return None if len(seen) % 2 else digits(episode)

    toy = Toy(bench, judge)
    reason.run(replace(OPTIONS, grpo=replace(GRPO, steps=1)), tasks(2), toy, bench)
    scored = [j.score for _, j in toy.played[0] if j is not None]
    metrics = shop.notes.lines[0][2]
    assert len(scored) == 8 and metrics["reward"] == pytest.approx(sum(scored) / 8)
    assert metrics["tokens"] <= sum(len(e.turns[0].ids) for e, j in toy.played[0] if j is not None)


def test_a_step_in_which_nothing_could_be_judged_is_skipped_with_metrics_that_json_can_hold(shop: Shop) -> None:
    bench = shop.bench()
    assert reason.run(OPTIONS, tasks(12), Toy(bench, lambda episode: None), bench) is None
    for _, _, metrics in shop.notes.lines:
        assert all(math.isfinite(value) for value in metrics.values())
        json.dumps(metrics, allow_nan=False)
    assert not any(p.any() for n, p in bench.policy.adapter_parameters("main").items() if "lora_B" in n)


def test_tokens_the_grammar_forced_are_not_part_of_the_update(shop: Shop) -> None:
    counts = {}
    for forced in (False, True):
        shop.notes.lines.clear()
        bench = shop.bench(f"forced{forced}")
        options = replace(OPTIONS, grpo=replace(GRPO, steps=1))
        toy = Toy(bench, likes_digits(bench.contract), forced=forced)
        reason.run(options, tasks(2), toy, bench)
        live = shop.notes.lines[0][2]["tokens"]
        advantages = advantages_of(GRPO, rewards_of(GRPO, toy.played[0]))
        kept = [e for (e, _), a in zip(toy.played[0], advantages.tolist(), strict=True) if a != 0]
        assert live == sum(len(e.turns[0].ids) - forced for e in kept)
        counts[forced] = live
    assert counts[True] < counts[False]


def test_kl_beyond_its_limit_stops_the_stage(shop: Shop) -> None:
    bench = shop.bench()
    options = replace(OPTIONS, grpo=replace(GRPO, max_kl=0.01))
    stopped = reason.run(options, tasks(12), Toy(bench, likes_digits(bench.contract)), bench)
    assert stopped is not None and stopped.startswith("KL to the parent")
    assert 1 < len(shop.notes.lines) < 6


def test_too_few_tasks_are_refused_before_anything_is_played(shop: Shop) -> None:
    bench = shop.bench()
    toy = Toy(bench, likes_digits(bench.contract))
    with pytest.raises(DataError, match="give at least 12"):
        reason.run(OPTIONS, tasks(11), toy, bench)
    assert toy.calls == [] and bench.policy.adapters == ()


def test_a_grpo_run_that_is_started_again_ends_with_the_same_weights(shop: Shop) -> None:
    class Crash(Exception): ...

    def crash(phase: str, step: int, total: int, metrics: object) -> None:
        if (phase, step) == ("grpo", 3):
            raise Crash

    options = replace(OPTIONS, collect=CollectOptions(tasks=2, samples=4, epochs=1.0, batch=2))

    def play_with(bench: Workbench) -> Toy:
        return Toy(bench, lambda episode: Judgement(sum(episode.ids) % 2 == 0, sum(episode.ids) % 7 / 7))

    stopped = shop.bench("stopped", log=crash)
    with pytest.raises(Crash):
        reason.run(options, tasks(14), play_with(stopped), stopped)
    resumed, whole = shop.bench("stopped"), shop.bench("whole")
    reason.run(options, tasks(14), play_with(resumed), resumed)
    repeated = [step for phase, step, _ in shop.notes.lines if phase == "grpo"]
    assert repeated[0] <= 3 and repeated == list(range(repeated[0], 6))
    reason.run(options, tasks(14), play_with(whole), whole)
    want = whole.policy.adapter_parameters("main")
    for name, parameter in resumed.policy.adapter_parameters("main").items():
        assert torch.equal(parameter, want[name]), name


# -- advantages ------------------------------------------------------------------------------------------------------------


def scores(*values: float | None) -> list[Judgement | None]:
    return [None if value is None else Judgement(value == 1, value) for value in values]


def group_advantages(options: GrpoOptions, judgements: list[Judgement | None]) -> tuple[torch.Tensor, torch.Tensor]:
    episode = Episode("t", None, "task", (), (), (), StopReason.END_OF_TURN, ())
    rewards = rewards_of(options, [(episode, judgement) for judgement in judgements])
    return advantages_of(options, rewards), rewards


def test_advantages_are_taken_within_each_group() -> None:
    options = replace(GRPO, group=2, advantage="centred")
    advantages, rewards = group_advantages(options, scores(1.0, 0.0, 0.25, 0.75))
    assert advantages.tolist() == [0.5, -0.5, -0.25, 0.25]
    assert rewards.tolist() == [1.0, 0.0, 0.25, 0.75]


def test_the_papers_form_divides_by_the_groups_deviation() -> None:
    advantages, _ = group_advantages(replace(GRPO, group=2), scores(1.0, 0.0, 0.25, 0.75))
    root = 0.5**0.5
    assert advantages.tolist() == pytest.approx([root, -root, -root, root], abs=1e-3)


@pytest.mark.parametrize("form", ["grpo", "centred"])
def test_an_unscored_episode_gets_exactly_zero_and_moves_nobody_elses_mean(form: str) -> None:
    options = replace(GRPO, group=4, advantage=form)
    with_gap, rewards = group_advantages(options, scores(1.0, None, 0.0, 0.5))
    without, _ = group_advantages(replace(options, group=3), scores(1.0, 0.0, 0.5))
    assert with_gap[1] == 0.0 and bool(rewards[1].isnan())
    assert with_gap[[0, 2, 3]].tolist() == pytest.approx(without.tolist(), abs=1e-6)


def test_a_group_of_which_one_was_scored_teaches_nothing() -> None:
    advantages, _ = group_advantages(replace(GRPO, group=3), scores(None, 1.0, None, None, None, None))
    assert advantages.tolist() == [0.0] * 6


def test_a_task_that_every_sample_solved_is_solved_though_none_of_them_is_kept(shop: Shop) -> None:
    bench = shop.bench()
    asked = [replace(task, demonstration=(Message("assistant", "gold"),)) for task in tasks(1)]
    play = Script(bench.contract, [[("right", True), ("right", True)]])
    options = CollectOptions(tasks=1, samples=2, easy_cap=0, demonstrate=True)
    assert reason.collect(options, asked, play, bench, lambda shown: [play.play(task, "gold", True) for task in shown]) == []
    metrics = shop.notes.lines[-1][2]
    assert (metrics["collect_solved_share"], metrics["collect_demonstrated"]) == (1.0, 0.0)


# -- losses by name ----------------------------------------------------------------------------------------------------------

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "luffy")


def shown_digits(bench: Workbench) -> Callable[[Sequence[Task]], Played]:
    play = Script(bench.contract, [])
    return lambda shown: [play.play(task, "12.50", True) for task in shown]


def demonstrated(count: int) -> list[Task]:
    return [replace(task, demonstration=(Message("assistant", "12.50"),)) for task in tasks(count)]


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_makes_likelier_what_its_advantage_asks_for(loss: str, shop: Shop) -> None:
    bench = shop.bench()
    asked = tasks(12)  # without traces: what luffy does with its own samples alone
    before = digit_probability(bench, asked)
    options = replace(OPTIONS, grpo=replace(GRPO, loss=loss, max_kl=50.0))
    reason.run(options, asked, Toy(bench, likes_digits(bench.contract)), bench, show=shown_digits(bench))
    assert digit_probability(bench, asked) > 2 * before
    for _, _, metrics in shop.notes.lines:
        assert metrics["kl_sum"] >= 0 and metrics["tokens"] > 0
        assert metrics.get("external") == (0.0 if loss == "luffy" else None)


def test_traces_alone_move_a_policy_whose_own_answers_are_all_wrong(shop: Shop) -> None:
    bench = shop.bench()
    asked = demonstrated(12)
    before = digit_probability(bench, asked)
    options = replace(OPTIONS, grpo=replace(GRPO, loss="luffy"))
    reason.run(options, asked, Toy(bench, lambda episode: Judgement(False, 0.0)), bench, show=shown_digits(bench))
    assert digit_probability(bench, asked) > 1.2 * before  # a random model's tokens are all rare, where traces weigh least


def test_a_demonstration_joins_its_group_as_a_trace_whose_tokens_count_by_their_shaped_probability(shop: Shop) -> None:
    bench = shop.bench()
    asked = demonstrated(2)
    toy = Toy(bench, lambda episode: Judgement(False, 0.0))  # own answers are all wrong
    shown = shown_digits(bench)
    sequences = [bench.contract.render_episode(episode) for episode, _ in shown(asked)]
    with torch.no_grad():
        traces = [bench.policy.logprobs(Pack.of([sequence])) for sequence in sequences]
    options = replace(OPTIONS, grpo=replace(GRPO, steps=1, group=4, loss="luffy", gamma=0.2, max_len=7))
    reason.run(options, asked, toy, bench, show=shown)
    # over the union of four wrong answers and a right one, the trace's advantage is 1 - 1/5 and the others' -1/5, at ratio 1
    own = [len(episode.turns[0].ids) for episode, _ in toy.played[0]]
    probabilities = torch.cat([trace.double().exp() for trace in traces])
    wanted = 0.2 * sum(own) - 0.8 * float((probabilities / (probabilities + 0.2)).sum())
    metrics = shop.notes.lines[-1][2]
    assert metrics["loss"] == pytest.approx(
        wanted / (10 * 7), rel=1e-4
    )  # ten completions by the constant length, as the released run
    assert (metrics["reward"], metrics["pass_share"], metrics["external"]) == (0.0, 0.0, 2.0)


def test_luffy_and_a_collection_that_demonstrates_ask_for_what_plays_demonstrations(shop: Shop) -> None:
    bench = shop.bench()
    toy = Toy(bench, lambda episode: Judgement(False, 0.0))
    for options in (
        replace(OPTIONS, grpo=replace(GRPO, loss="luffy")),
        replace(OPTIONS, collect=CollectOptions(tasks=1, demonstrate=True), grpo=replace(GRPO, steps=0)),
    ):
        with pytest.raises(ValueError, match="needs `show`"):
            reason.run(options, demonstrated(12), toy, bench)
    assert toy.calls == [] and bench.policy.adapters == ()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_loss_depends_on_how_its_step_is_packed(loss: str, shop: Shop) -> None:
    lines = {}
    for size in (30, 5000):
        shop.notes.lines.clear()
        bench = shop.bench(f"size{size}", pack_tokens=size)
        options = replace(OPTIONS, grpo=replace(GRPO, steps=1, loss=loss))
        toy = Toy(bench, likes_digits(bench.contract))
        reason.run(options, demonstrated(2), toy, bench, show=shown_digits(bench))
        lines[size] = dict(shop.notes.lines[0][2])
    assert lines[30].pop("pack_tokens") > lines[5000].pop("pack_tokens")
    assert lines[30] == pytest.approx(lines[5000], abs=1e-3)
    assert lines[30]["grad_norm"] > 0


def test_gspos_ratio_is_to_the_policy_itself_so_that_rounding_clips_no_row(shop: Shop) -> None:
    """Its clip range, 3e-4, is less than what the sampler's and the learner's log-probabilities differ by in bfloat16."""
    bench = shop.bench()
    toy = Toy(bench, likes_digits(bench.contract), gap=0.01)
    reason.run(replace(OPTIONS, grpo=replace(GRPO, steps=1, loss="gspo")), tasks(2), toy, bench)
    metrics = shop.notes.lines[0][2]
    assert metrics["clipped_rows"] == 0 and metrics["grad_norm"] > 0
    assert metrics["sampler_gap_sum"] / metrics["tokens"] == pytest.approx(0.01, rel=0.05)


def varied_by_task(names: Sequence[str]) -> Judge:
    """Scores differ within the groups of these tasks only."""
    return lambda episode: Judgement(False, sum(episode.ids) % 7 / 7 if episode.task_id in names else 0.5)


@pytest.mark.parametrize(("loss", "divides_by"), [("dapo", 1), ("grpo", 2)])
def test_groups_without_signal_have_no_part_in_dapos_mean(loss: str, divides_by: int, shop: Shop) -> None:
    grad = {}
    for count in (1, 2):  # the one varied group alone, and beside one that teaches nothing
        shop.notes.lines.clear()
        bench = shop.bench(f"{loss}{count}")
        options = replace(OPTIONS, grpo=replace(GRPO, steps=1, tasks=count, loss=loss))
        reason.run(options, tasks(count), Toy(bench, varied_by_task(["t0"])), bench)
        grad[count] = shop.notes.lines[0][2]["grad_norm"]
    assert shop.notes.lines[0][2]["groups_with_signal"] == 0.5
    assert shop.notes.lines[0][2].get("groups_kept") == (1.0 if loss == "dapo" else None)
    assert grad[1] / grad[2] == pytest.approx(divides_by, rel=1e-3)


def test_dynamic_sampling_draws_further_tasks_in_place_of_groups_without_signal(shop: Shop) -> None:
    bench = shop.bench()
    asked = tasks(6)
    plan = batches(6, 2, 1.0, derive(bench.seed, "grpo"))
    first, second, third = ([f"t{i}" for i in batch] for batch in plan)
    options = replace(OPTIONS, grpo=replace(GRPO, steps=1, loss="dapo", refills=2))
    toy = Toy(bench, varied_by_task([first[0], *second]))
    reason.run(options, asked, toy, bench)
    assert [names for names, *_ in toy.calls] == [first, second]  # two groups with signal were found: no third draw
    assert len({seed for _, _, seed, _ in toy.calls}) == 2
    metrics = shop.notes.lines[0][2]
    assert (metrics["groups_with_signal"], metrics["groups_kept"]) == (0.75, 2.0)
    toy = Toy(shop.bench("none"), varied_by_task([third[0]]))
    reason.run(options, asked, toy, toy.bench)
    assert len(toy.calls) == 3 and shop.notes.lines[-1][2]["groups_kept"] == 1.0  # the refills are bounded
    with pytest.raises(DataError, match="give at least 6"):
        reason.run(options, tasks(5), toy, shop.bench("few"))


def test_dynamic_sampling_keeps_a_group_that_its_demonstration_alone_makes_teach(shop: Shop) -> None:
    bench = shop.bench()
    toy = Toy(bench, lambda episode: Judgement(False, 0.0))
    options = replace(OPTIONS, grpo=replace(GRPO, steps=1, loss="luffy", refills=1))
    reason.run(options, demonstrated(4), toy, bench, show=shown_digits(bench))
    assert len(toy.calls) == 1 and shop.notes.lines[0][2]["groups_kept"] == 2.0


def test_an_overlong_answer_is_rewarded_less() -> None:
    options = replace(GRPO, max_len=120, overlong=20)
    turns = [
        Turn(0, (1,) * n, (0.0,) * n, (0.0,) * n, (False,) * n, Message("assistant"), StopReason.LENGTH) for n in (100, 110, 121)
    ]
    played: Played = [
        (Episode("t", None, "task", (), (turn,), (), turn.stop, ()), Judgement(True, 1.0) if turn is not turns[0] else None)
        for turn in turns
    ]
    rewards = rewards_of(options, played)
    assert bool(rewards[0].isnan()) and rewards[1:].tolist() == pytest.approx([0.5, 0.0])
    assert rewards_of(replace(options, overlong=0), played)[1:].tolist() == [1.0, 1.0]
    assert rewards_of(options, played, torch.tensor([0.0, 1.0, 0.0]))[1:].tolist() == [1.0, 0.0]  # a trace was not sampled
    with pytest.raises(RecipeError, match="more than max_len"):
        build(ReasonOptions, {"grpo": {"overlong": 200}}, "stages.reason.options")


def test_each_loss_has_a_form_and_a_clip_range_of_its_own_that_may_be_changed() -> None:
    assert GrpoOptions().loss_name == "grpo" and GrpoOptions(advantage="centred").loss_name == "dr_grpo"
    forms = {loss: GrpoOptions(loss=loss).advantage_name for loss in LOSSES}
    assert forms == {"grpo": "grpo", "dr_grpo": "centred", "dapo": "grpo", "gspo": "grpo", "luffy": "centred"}
    assert GrpoOptions(loss="dr_grpo", advantage="grpo").advantage_name == "grpo"
    assert {loss: GrpoOptions(loss=loss).clip for loss in ("grpo", "dapo")} == {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28)}
    assert GrpoOptions(loss="dapo", eps_low=0.1).clip == (0.1, 0.28)


def test_a_clip_range_that_would_never_act_is_refused() -> None:
    with pytest.raises(RecipeError, match="gspo clips nothing"):
        build(ReasonOptions, {"grpo": {"loss": "gspo", "eps_high": 0.01}}, "stages.reason.options")


@pytest.mark.parametrize("loss", ["gspo", "luffy"])
def test_a_penalty_that_a_loss_has_not_is_refused(loss: str) -> None:
    with pytest.raises(RecipeError, match=f"the loss {loss} has no KL term"):
        build(ReasonOptions, {"grpo": {"loss": loss, "beta": 0.1}}, "stages.reason.options")


# -- best of K -------------------------------------------------------------------------------------------------------------


class Script:
    """Plays prepared episodes: per task a list of (text, passed)."""

    def __init__(self, contract: Contract, lines: list[list[tuple[str, bool | None]]]) -> None:
        self.contract, self.lines = contract, lines

    def __call__(self, asked: Sequence[Task], copies: int, seed: int, adapter: str | None) -> Played:
        assert adapter is None and [len(line) for line in self.lines] == [copies] * len(asked)
        return [self.play(task, *entry) for task, line in zip(asked, self.lines, strict=True) for entry in line]

    def play(self, task: Task, text: str, passed: bool | None) -> tuple[Episode, Judgement | None]:
        prompt = tuple(self.contract.prompt_ids(task.messages))
        ids = (*self.contract.encode(text), self.contract.end_of_turn)
        zeros = tuple(0.0 for _ in ids)
        message = Message("assistant", text)
        turn = Turn(len(prompt), ids, zeros, zeros, tuple(False for _ in ids), message, StopReason.END_OF_TURN)
        episode = Episode(task.id, None, "task", task.messages, (turn,), (), StopReason.END_OF_TURN, prompt + ids)
        return episode, None if passed is None else Judgement(passed, float(passed))


def test_only_what_passed_is_kept_capped_and_distinct_per_task(shop: Shop) -> None:
    bench = shop.bench()
    play = Script(
        bench.contract,
        [
            [("a", True), ("a", True), ("b", True), ("c", True)],  # duplicates count once, then the cap of two
            [("wrong", False), ("unscored", None), ("right", True), ("wrong", False)],
            [("no", False)] * 4,
        ],
    )
    kept = reason.collect(CollectOptions(tasks=3, samples=4, cap=2), tasks(3), play, bench)
    texts = [bench.contract.decode(s.ids[s.weights > 0].tolist()) for s in kept]
    assert texts == ["a<|im_end|>", "b<|im_end|>", "right<|im_end|>"]
    ((phase, step, metrics),) = shop.notes.lines
    assert step == -1 and phase == "collect"
    assert metrics["collect_kept"] == 3.0
    assert metrics["collect_pass_share"] == pytest.approx(5 / 12)
    assert metrics["collect_solved_share"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("demonstrate", "learned"), [(False, ["right"]), (True, ["right", "gold 1"])])
def test_what_no_sample_passed_is_learned_from_a_demonstration_that_passes(
    demonstrate: bool, learned: list[str], shop: Shop
) -> None:
    bench = shop.bench()
    shown = [replace(task, demonstration=(Message("assistant", f"gold {i}"),)) for i, task in enumerate(tasks(3))]
    asked = [*shown, *tasks(4)[3:]]  # the last has none to show
    lines: list[list[tuple[str, bool | None]]] = [[("right", True)], [("no", False)], [("no", None)], [("no", False)]]
    play = Script(bench.contract, lines)
    seen: list[str] = []

    def show(shown: Sequence[Task]) -> Played:
        seen.extend(task.id for task in shown)
        return [play.play(task, task.demonstration[0].content, task.id == "t1") for task in shown]

    options = CollectOptions(tasks=4, samples=1, demonstrate=demonstrate)
    kept = reason.collect(options, asked, play, bench, show)
    assert [bench.contract.decode(s.ids[s.weights > 0].tolist()) for s in kept] == [f"{text}<|im_end|>" for text in learned]
    assert seen == (["t1", "t2"] if demonstrate else [])
    metrics = shop.notes.lines[-1][2]
    assert (metrics["collect_demonstrated"], metrics["collect_kept"]) == (len(learned) - 1, len(learned))
    assert metrics["collect_solved_share"] == 0.25


def test_the_stage_learns_what_was_collected(shop: Shop) -> None:
    bench = shop.bench()
    play = Script(bench.contract, [[("12.50", True), ("much", False)] for _ in range(4)])
    options = replace(
        OPTIONS,
        collect=CollectOptions(tasks=4, samples=2, epochs=6.0, batch=4, optimiser=OptimiserOptions(lr=3e-2)),
        grpo=replace(GRPO, steps=0),
    )
    sides = {
        text: [bench.contract.render_episode(play.play(task, text, True)[0]) for task in tasks(4)] for text in ("12.50", "much")
    }

    def nll(text: str) -> float:
        with torch.no_grad():
            return float(-bench.policy.logprobs(Pack.of(sides[text])).mean())

    before = nll("12.50")
    assert reason.run(options, tasks(4), play, bench) is None
    assert nll("12.50") < before - 2 and nll("12.50") < nll("much")
    assert len(shop.notes.of("loss", "collect")) == 6


def test_when_nothing_passed_the_collect_half_trains_nothing_and_the_stage_goes_on(shop: Shop) -> None:
    bench = shop.bench()
    toy = Toy(bench, lambda episode: Judgement(False, len(set(episode.ids)) % 3 / 3))
    options = replace(OPTIONS, collect=CollectOptions(tasks=2, samples=4))
    assert reason.run(options, tasks(14), toy, bench) is None
    assert shop.notes.of("loss", "collect") == []
    assert len([1 for phase, _, _ in shop.notes.lines if phase == "grpo"]) == 6
    assert toy.calls[0][1] == 4 and toy.calls[0][3] is None  # collected from the parent itself
    assert not {name for names, *_ in toy.calls[1:] for name in names} & set(toy.calls[0][0])  # other tasks than it collected on


def test_the_folder_holds_checkpoints_of_both_halves(shop: Shop) -> None:
    bench = shop.bench()
    toy = Toy(bench, lambda episode: Judgement(True, len(set(episode.ids)) % 3 / 3))
    reason.run(replace(OPTIONS, collect=CollectOptions(tasks=2, samples=4)), tasks(14), toy, bench)
    folder: Path = bench.folder / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["collect", "grpo"]
