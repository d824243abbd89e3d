"""Stage 5, verifiable reasoning: collect best-of-K that the verifier passes, learn from them, then GRPO on the verifier's score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.contract import Sequence as Rendered
from posttrain.data.records import Episode, Task
from posttrain.errors import DataError
from posttrain.objectives.advantages import centred_advantages, standardised_advantages
from posttrain.objectives.policy_loss import PolicyTerms, dr_grpo, grpo
from posttrain.objectives.tensors import Metrics
from posttrain.policy.pack import fill_packs
from posttrain.policy.policy import LoraOptions
from posttrain.ranges import Count, NonNegative, Positive, Share, Whole
from posttrain.stages import sft
from posttrain.stages.bench import Work, Workbench, batches, derive, leash, train
from posttrain.training import Learner, OptimiserOptions, Scored
from posttrain.verifying.judgement import Judgement

# (tasks, copies, seed, adapter) -> copies episodes of each task in order, each with its judgement (None: could not be judged)
Played = tuple[Episode, Judgement | None]
Play = Callable[[Sequence[Task], int, int, str | None], list[Played]]
Show = Callable[[Task], Played]  # the task's demonstration, played


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """Rejection sampling (ReST-EM's E-step): K samples a task, the passed ones kept, at most `cap` distinct ones a task, and
    `easy_cap` where every sample passed: there the policy learns nothing new, but it keeps what it can. demonstrate: a task that no
    sample passed is learned from its demonstration, where it has one and the verifier passes it (in place of STaR's rationalisation,
    objectives.md 5.3): what is never right by chance cannot be collected."""

    tasks: Whole = 48
    samples: Count = 4
    cap: Count = 2
    easy_cap: Whole = 2
    demonstrate: bool = False
    epochs: Positive = 2.0
    batch: Count = 16
    optimiser: OptimiserOptions = field(default_factory=lambda: OptimiserOptions(lr=8e-4))


@dataclass(frozen=True, slots=True)
class GrpoOptions:
    """advantage: 'grpo' (r - mean) / (std + eps) with the seq-mean-token-mean loss, as the paper; 'centred' r - mean with the constant
    length divisor (Dr.GRPO), the chapter's form. beta weighs the k3 penalty to the parent, of every judged completion; max_kl stops the
    stage when the mean k3 estimate to the parent, nats per token of the completions in the update, exceeds it (None: never). One
    update per rollout; without beta it leaves out completions whose advantage is 0, as they would not move anything."""

    steps: Whole = 6
    tasks: Count = 8
    group: Annotated[int, Field(ge=2)] = 8  # an advantage is against the other answers to the same prompt
    advantage: Literal["grpo", "centred"] = "grpo"
    beta: NonNegative = 0.0
    eps_low: Share = 0.2
    eps_high: Positive = 0.2
    max_len: Count = 128
    max_kl: Positive | None = None
    optimiser: OptimiserOptions = field(default_factory=lambda: OptimiserOptions(lr=2e-4, warmup=0.1))


@dataclass(frozen=True, slots=True)
class ReasonOptions:
    """Either half may be switched off, by `collect.tasks: 0` or `grpo.steps: 0`. temperature is the samples'; the loss is on the
    untempered distribution, so with another value than 1 the first update is slightly off-policy and the ratio corrects for it."""

    adapter: LoraOptions = field(default_factory=LoraOptions)
    collect: CollectOptions = field(default_factory=CollectOptions)
    grpo: GrpoOptions = field(default_factory=GrpoOptions)
    max_tokens: Count = 1024
    temperature: Positive = 1.0


def check_tasks(options: ReasonOptions, tasks: Sequence[Task], where: str = "reason.data") -> None:
    """Raise DataError when the options need more tasks than there are: no task is played twice."""
    needed = options.collect.tasks + options.grpo.steps * options.grpo.tasks
    if len(tasks) < needed:
        raise DataError("too few tasks for the options", where=where, value=len(tasks), remedy=f"give at least {needed}")


def run(
    options: ReasonOptions, tasks: Sequence[Task], play: Play, bench: Workbench, name: str = "main", *, show: Show | None = None
) -> str | None:
    """Train adapter `name` on tasks with a verifier; returns why it stopped early, if it did. `show` is needed for
    `collect.demonstrate` only."""
    check_tasks(options, tasks)
    bench.policy.add_adapter(name, options.adapter, bench.seed)
    rest = list(tasks)
    if options.collect.tasks:
        kept = collect(options.collect, rest[: options.collect.tasks], play, bench, show)
        rest = rest[options.collect.tasks :]
        if kept:
            fit = sft.SftOptions(
                options.collect.batch,
                options.collect.epochs,
                options.max_tokens,
                options.adapter,
                options.collect.optimiser,
            )
            sft.fit(fit, kept, bench, name, phase="collect")
    return improve(options.grpo, rest, play, bench, name) if options.grpo.steps else None


def collect(
    options: CollectOptions, tasks: Sequence[Task], play: Play, bench: Workbench, show: Show | None = None
) -> list[Rendered]:
    """Sequences of the episodes the verifier passed, capped and deduplicated per task. Sampled from the parent (adapter still zero)."""
    with bench.clock("sample"), bench.policy.gathered():
        played = play(tasks, options.samples, derive(bench.seed, "collect"), None)
    kept: list[Episode] = []
    solved = demonstrated = 0
    for index, task in enumerate(tasks):
        chosen = _chosen(options, played[index * options.samples : (index + 1) * options.samples])
        solved += bool(chosen)
        if options.demonstrate and show is not None and task.demonstration and not chosen:
            episode, judgement = show(task)
            chosen = [episode] if _passes(judgement) else []
            demonstrated += bool(chosen)
        kept += chosen
    bench.log(
        "collect",
        -1,
        1,
        {
            "collect_pass_share": _pass_share(played),
            "collect_solved_share": solved / max(1, len(tasks)),
            "collect_demonstrated": float(demonstrated),
            "collect_kept": float(len(kept)),
        },
    )
    return [sequence for sequence in map(bench.contract.render_episode, kept) if sequence.learned]


def _chosen(options: CollectOptions, group: Sequence[Played]) -> list[Episode]:
    """Of one task's samples the distinct ones that passed, as many as the options take."""
    passes = [episode for episode, judgement in group if _passes(judgement)]
    distinct: dict[tuple[int, ...], Episode] = {}
    for episode in passes:
        distinct.setdefault(episode.ids, episode)
    most = options.easy_cap if len(passes) == len(group) else options.cap
    return list(distinct.values())[:most]


def _passes(judgement: Judgement | None) -> bool:
    return judgement is not None and judgement.passed


def improve(options: GrpoOptions, tasks: Sequence[Task], play: Play, bench: Workbench, name: str) -> str | None:
    """GRPO (Shao 2024, objectives.md 5.4; Dr.GRPO 5.5): on-policy, one update per rollout."""
    learner = Learner.for_adapter(bench.policy, name, options.optimiser, options.steps)
    plan = batches(len(tasks), options.tasks, options.steps * options.tasks / len(tasks), derive(bench.seed, "grpo"))

    def work(step: int) -> Work:
        chosen = [tasks[i] for i in plan[step]]
        with bench.clock("sample"), bench.policy.gathered():
            played = play(chosen, options.group, derive(bench.seed, "rollout", step), name)
        advantages, rewards = group_advantages(options, [judgement for _, judgement in played])
        # without an advantage a completion has the KL term only
        teaches = ~rewards.isnan() if options.beta != 0 else advantages != 0
        live = [i for i in range(len(played)) if teaches[i] and played[i][0].turns]
        judged = rewards[~rewards.isnan()]
        metrics = {
            **({"reward": float(judged.mean())} if len(judged) else {}),
            "judged_share": len(judged) / len(rewards),
            "pass_share": _pass_share(played),
            "groups_with_signal": _with_signal(advantages, options.group),
        }
        if not live:
            return Work([], lambda scored: (scored.hidden.sum() * 0, {}), metrics)
        sequences = [bench.contract.render_episode(played[i][0]) for i in live]
        old = [_old_logprobs(played[i][0]) for i in live]
        todo = work_of(options, sequences, old, advantages[live], learner, bench.pack_tokens, len(played))
        return replace(todo, metrics=metrics)

    watch = leash(
        bench.watch, lambda m: m.get("kl_sum", 0.0) / max(1.0, m.get("tokens", 1.0)), options.max_kl, "KL to the parent"
    )
    stopped = train(replace(bench, watch=watch), learner, work, "grpo")
    learner.freeze()
    return stopped


def work_of(
    options: GrpoOptions,
    sequences: Sequence[Rendered],
    old: Sequence[Tensor],
    advantages: Tensor,
    learner: Learner,
    pack_tokens: int,
    rows: int,
) -> Work:
    """One update over `rows` completions, of which `sequences` are those with a term of the loss; old[i] are the sampler's
    log-probabilities of sequence i's learned tokens. The reference is computed only where a KL term or a limit asks for it."""
    packs = fill_packs(sequences, pack_tokens)
    wanted = options.beta != 0 or options.max_kl is not None
    references = {pack.members: values for pack, values in learner.reference_logprobs(packs)} if wanted else {}
    return Work(packs, lambda scored: _objective(scored, options, old, advantages, references.get(scored.pack.members), rows))


def group_advantages(options: GrpoOptions, judgements: Sequence[Judgement | None]) -> tuple[Tensor, Tensor]:
    """Advantages and rewards [groups * G]. An episode nobody could judge is left out of its group's statistics and gets 0."""
    rewards = torch.tensor([float("nan") if j is None else j.score for j in judgements])
    return advantages_of(options, rewards), rewards


def advantages_of(options: GrpoOptions, rewards: Tensor) -> Tensor:
    """[groups * G] rewards, nan where nobody could judge -> advantages, 0 there."""
    groups = torch.arange(len(rewards)) // options.group
    form = standardised_advantages if options.advantage == "grpo" else centred_advantages
    return form(rewards, groups, scored_b=(~rewards.isnan()).float())


def _objective(
    scored: Scored, options: GrpoOptions, old: Sequence[Tensor], advantages: Tensor, reference: Tensor | None, rows: int
) -> tuple[Tensor, Metrics]:
    """One pack's share of the loss over `rows` completions. old[i], advantages[i]: of the i-th sequence of the step."""
    members = list(scored.pack.members)
    logp, mask = scored.padded_logprobs(), scored.pack.mask()
    old_bt = torch.zeros_like(logp)
    for row, member in enumerate(members):
        old_bt[row, : len(old[member])] = old[member]
    # the sampler computed these with other matrix shapes: the difference is logged, and the ratio corrects for it
    gains = advantages[members].to(logp.device)
    gap = ((logp.detach() - old_bt) * mask).abs().sum()
    terms: PolicyTerms = {
        "ref_logp_bt": None if reference is None else scored.pack.pad(reference),
        "beta": options.beta,
        "eps_low": options.eps_low,
        "eps_high": options.eps_high,
    }
    if options.advantage == "grpo":
        loss, metrics = grpo(logp, old_bt, mask, gains, normaliser=float(rows), **terms)
    else:
        loss, metrics = dr_grpo(logp, old_bt, mask, gains, options.max_len, normaliser=float(rows), **terms)
    return loss, {**metrics, "sampler_gap_sum": gap}


def _old_logprobs(episode: Episode) -> Tensor:
    """The sampler's log-probabilities of the learned tokens, in order (forced ones are not learned)."""
    return torch.tensor(
        [lp for turn in episode.turns for lp, forced in zip(turn.logprobs, turn.forced, strict=True) if not forced]
    )


def _pass_share(played: Sequence[Played]) -> float:
    return sum(_passes(judgement) for _, judgement in played) / max(1, len(played))


def _with_signal(advantages: Tensor, group: int) -> float:
    return float((advantages.view(-1, group) != 0).any(1).float().mean())
