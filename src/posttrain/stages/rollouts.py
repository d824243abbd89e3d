"""Rollouts for a policy gradient: groups of judged completions of each task, drawn again where they teach nothing, and their update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from posttrain.data.records import Task
from posttrain.stages.bench import Work, Workbench, batches, derive, leash, train
from posttrain.stages.policy_gradient import GrpoOptions, Played, StepSize, advantages_of, old_logprobs, rewards_of, work_of
from posttrain.training import Learner
from posttrain.verifying.judgement import Judgement

# (tasks, copies, seed, adapter) -> copies episodes of each task, in order
Play = Callable[[Sequence[Task], int, int, str | None], list[Played]]
Show = Callable[[Sequence[Task]], list[Played]]  # each task's demonstration, played


@dataclass(frozen=True, slots=True)
class Group:
    """A task's completions; the last `external` of them are traces that the policy did not sample."""

    played: Sequence[Played]
    external: int = 0

    @property
    def own(self) -> Sequence[Played]:
        return self.played[: len(self.played) - self.external]

    @property
    def varied(self) -> bool:
        """Whether its scores differ: where they do not, they prefer no completion to another."""
        return len({judgement.score for _, judgement in self.played if judgement is not None}) > 1


def improve(
    options: GrpoOptions, tasks: Sequence[Task], play: Play, bench: Workbench, name: str, show: Show | None = None
) -> str | None:
    """On-policy, one update per rollout. `show` is needed for the loss `luffy`."""
    learner = Learner.for_adapter(bench.policy, name, options.optimiser, options.steps)
    plan = batches(len(tasks), options.tasks, options.needed / len(tasks), derive(bench.seed, "grpo"))

    def draw(step: int, again: int) -> list[Group]:
        chosen = [tasks[i] for i in plan[step * (1 + options.refills) + again]]
        with bench.clock("sample"), bench.policy.gathered():
            played = play(chosen, options.group, derive(bench.seed, "rollout", step, *([again] if again else [])), name)
        return _groups(options, chosen, played, show)

    def work(step: int) -> Work:
        drawn, groups = _drawn(options, lambda again: draw(step, again))
        own = [played for group in drawn for played in group.own]
        judged = [judgement.score for _, judgement in own if judgement is not None]
        metrics = {
            **({"reward": sum(judged) / len(judged)} if judged else {}),
            "judged_share": len(judged) / len(own),
            "pass_share": pass_share(own),
            "groups_with_signal": sum(group.varied for group in drawn) / len(drawn),
            **({"external": float(sum(group.external for group in drawn))} if options.loss_name == "luffy" else {}),
            **({"groups_kept": float(len(groups))} if options.drops else {}),
        }
        return replace(_update(options, groups, learner, bench), metrics=metrics)

    watch = leash(
        bench.watch, lambda m: m.get("kl_sum", 0.0) / max(1.0, m.get("tokens", 1.0)), options.max_kl, "KL to the parent"
    )
    stopped = train(replace(bench, watch=watch), learner, work, "grpo")
    learner.freeze()
    return stopped


def _groups(options: GrpoOptions, tasks: Sequence[Task], played: Sequence[Played], show: Show | None) -> list[Group]:
    """Each task's group; for LUFFY with its demonstration, whose reward is the verifier's like any other's."""
    groups = [list(played[start : start + options.group]) for start in range(0, len(played), options.group)]
    if options.loss_name != "luffy":
        return [Group(group) for group in groups]
    assert show is not None, "the loss luffy needs what plays demonstrations"
    shown = [index for index, task in enumerate(tasks) if task.demonstration]
    traces = dict(zip(shown, show([tasks[index] for index in shown]), strict=True))
    return [Group([*group, traces[i]], 1) if i in traces else Group(group) for i, group in enumerate(groups)]


def _drawn(options: GrpoOptions, draw: Callable[[int], list[Group]]) -> tuple[list[Group], list[Group]]:
    """All groups that were drawn for a step, and those that it learns from."""
    drawn: list[Group] = []
    kept: list[Group] = []
    for again in range(1 + options.refills):
        groups = draw(again)
        drawn += groups
        kept += [group for group in groups if group.varied] if options.drops else groups
        if len(kept) >= options.tasks:
            break
    return drawn, kept[: options.tasks]


def _update(options: GrpoOptions, groups: Sequence[Group], learner: Learner, bench: Workbench) -> Work:
    """One update by the completions of the groups that have a term of the loss."""
    union = [played for group in groups for played in group.played]
    whose = torch.tensor([index for index, group in enumerate(groups) for _ in group.played])
    external = torch.tensor([float(i >= len(group.own)) for group in groups for i in range(len(group.played))])
    old = [old_logprobs(episode) for episode, _ in union]
    rewards = rewards_of(options, union, external)
    advantages = advantages_of(options, rewards, whose)
    # without an advantage a completion has the KL term only
    teaches = ~rewards.isnan() if options.beta != 0 else advantages != 0
    live = [i for i in range(len(union)) if teaches[i] and union[i][0].turns]
    if not live:
        return Work([], lambda scored: (scored.hidden.sum() * 0, {}))
    sequences = [bench.contract.render_episode(union[i][0]) for i in live]
    size = StepSize(len(union), float(sum(map(len, old))))
    return work_of(options, sequences, [old[i] for i in live], advantages[live], external[live], learner, bench.pack_tokens, size)


def passes(judgement: Judgement | None) -> bool:
    return judgement is not None and judgement.passed


def pass_share(played: Sequence[Played]) -> float:
    return sum(passes(judgement) for _, judgement in played) / max(1, len(played))
