"""Policy-gradient steps on groups of judged episodes: GRPO and, by name, its relatives (objectives.md 5.4 to 5.8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.contract import Sequence as Rendered
from posttrain.data.records import Episode, Task
from posttrain.objectives.advantages import centred_advantages, standardised_advantages
from posttrain.objectives.kl import k3
from posttrain.objectives.policy_loss import PolicyTerms, dapo, dr_grpo, grpo
from posttrain.objectives.sequence_policy import Luffy, gspo, luffy
from posttrain.objectives.tensors import Metrics, Objective, masked
from posttrain.policy.pack import fill_packs
from posttrain.ranges import Count, NonNegative, Positive, Share, Whole
from posttrain.stages.bench import Work, Workbench, batches, derive, leash, train
from posttrain.training import Learner, OptimiserOptions, Scored
from posttrain.verifying.judgement import Judgement

Played = tuple[Episode, Judgement | None]  # None: nobody could judge it
# (tasks, copies, seed, adapter) -> copies episodes of each task, in order
Play = Callable[[Sequence[Task], int, int, str | None], list[Played]]
Show = Callable[[Task], Played]  # the task's demonstration, played

Loss = Literal["grpo", "dr_grpo", "dapo", "gspo", "luffy"]
# (eps_low, eps_high); GSPO's ratio is a geometric mean
_CLIP: dict[Loss, tuple[float, float]] = {
    "grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "luffy": (0.2, 0.2),
}  # fmt: skip
_WITHOUT_KL: tuple[Loss, ...] = ("gspo", "luffy")


@dataclass(frozen=True, slots=True)
class GrpoOptions:
    """advantage: 'grpo' (r - mean) / (std + eps), as the paper; 'centred' r - mean, the chapter's form. loss, by name:

    - grpo: mean over completions of the mean over their tokens (Shao 2024);
    - dr_grpo: sum over tokens by the constant `max_len` (Liu 2025);
    - dapo: mean over all tokens, clip-higher; groups without signal are left out, not drawn again (Yu 2025);
    - gspo: one ratio a completion (Zheng 2025);
    - luffy: a task's demonstration joins its group as an external trace whose tokens count by f(p) = p / (p + gamma) (Yan 2025).

    None: `grpo` for the paper's advantage, `dr_grpo` for the centred one. eps_low, eps_high: the clip range, None: the loss's own (0.2
    and 0.2; dapo 0.2 and 0.28; gspo 3e-4 and 4e-4; luffy clips nothing while both are None). gamma: luffy's. beta weighs the k3
    penalty to the parent, of every judged completion, which gspo and luffy have not; max_kl stops the stage when the mean k3 estimate
    to the parent, nats per token of the completions in the update, exceeds it (None: never). One update per rollout; without beta it
    leaves out completions whose advantage is 0, as they would not move anything."""

    steps: Whole = 6
    tasks: Count = 8
    group: Annotated[int, Field(ge=2)] = 8  # an advantage is against the other answers to the same prompt
    advantage: Literal["grpo", "centred"] = "grpo"
    loss: Loss | None = None
    beta: NonNegative = 0.0
    eps_low: Share | None = None
    eps_high: Positive | None = None
    gamma: Positive = 0.1
    max_len: Count = 128
    max_kl: Positive | None = None
    optimiser: OptimiserOptions = field(default_factory=lambda: OptimiserOptions(lr=2e-4, warmup=0.1))

    def __post_init__(self) -> None:
        if self.beta != 0 and self.loss in _WITHOUT_KL:
            raise ValueError(f"the loss {self.loss} has no KL term: set beta to 0, or bound the drift by max_kl")

    @property
    def named(self) -> Loss:
        return self.loss or ("grpo" if self.advantage == "grpo" else "dr_grpo")

    @property
    def clip(self) -> tuple[float, float]:
        low, high = _CLIP[self.named]
        return low if self.eps_low is None else self.eps_low, high if self.eps_high is None else self.eps_high


@dataclass(frozen=True, slots=True)
class _Rollout:
    """The completions of one step, group after group: own samples, and external traces behind them. rewards [n], nan where nobody could
    judge."""

    played: Sequence[Played]
    groups: Tensor
    external: Tensor

    @property
    def rewards(self) -> Tensor:
        return torch.tensor([float("nan") if judgement is None else judgement.score for _, judgement in self.played])


def improve(
    options: GrpoOptions, tasks: Sequence[Task], play: Play, bench: Workbench, name: str, show: Show | None = None
) -> str | None:
    """On-policy, one update per rollout. `show` is needed for the loss `luffy`."""
    learner = Learner.for_adapter(bench.policy, name, options.optimiser, options.steps)
    plan = batches(len(tasks), options.tasks, options.steps * options.tasks / len(tasks), derive(bench.seed, "grpo"))

    def work(step: int) -> Work:
        chosen = [tasks[i] for i in plan[step]]
        with bench.clock("sample"), bench.policy.gathered():
            played = play(chosen, options.group, derive(bench.seed, "rollout", step), name)
        rollout = _rolled_out(options, chosen, played, show)
        rewards, own = rollout.rewards, rollout.external == 0
        advantages = _advantages(options, rewards, rollout.groups)
        # without an advantage a completion has the KL term only
        teaches = ~rewards.isnan() if options.beta != 0 else advantages != 0
        live = [i for i in range(len(rewards)) if teaches[i] and rollout.played[i][0].turns]
        judged = rewards[~rewards.isnan() & own]
        metrics = {
            **({"reward": float(judged.mean())} if len(judged) else {}),
            "judged_share": len(judged) / len(played),
            "pass_share": pass_share(played),
            "groups_with_signal": _with_signal(advantages, rollout.groups),
            **({"external": float((~own).sum())} if options.named == "luffy" else {}),
        }
        if not live:
            return Work([], lambda scored: (scored.hidden.sum() * 0, {}), metrics)
        old = [_old_logprobs(episode) for episode, _ in rollout.played]
        sequences = [bench.contract.render_episode(rollout.played[i][0]) for i in live]
        size = _Size(len(rewards), float(sum(map(len, old))))
        todo = _work(
            options, sequences, [old[i] for i in live], advantages[live], rollout.external[live], learner, bench.pack_tokens, size
        )
        return replace(todo, metrics=metrics)

    watch = leash(
        bench.watch, lambda m: m.get("kl_sum", 0.0) / max(1.0, m.get("tokens", 1.0)), options.max_kl, "KL to the parent"
    )
    stopped = train(replace(bench, watch=watch), learner, work, "grpo")
    learner.freeze()
    return stopped


def _rolled_out(options: GrpoOptions, tasks: Sequence[Task], played: Sequence[Played], show: Show | None) -> _Rollout:
    """What was played, and for LUFFY each task's demonstration: its reward is the verifier's like any other's."""
    found, groups = list(played), [index // options.group for index in range(len(played))]
    if options.named == "luffy" and show is not None:
        for index, task in enumerate(tasks):
            if task.demonstration:
                found.append(show(task))
                groups.append(index)
    external = torch.tensor([float(index >= len(played)) for index in range(len(found))])
    return _Rollout(found, torch.tensor(groups), external)


def group_advantages(options: GrpoOptions, judgements: Sequence[Judgement | None]) -> tuple[Tensor, Tensor]:
    """Advantages and rewards [groups * G]. An episode nobody could judge is left out of its group's statistics and gets 0."""
    rewards = torch.tensor([float("nan") if j is None else j.score for j in judgements])
    return advantages_of(options, rewards), rewards


def advantages_of(options: GrpoOptions, rewards: Tensor) -> Tensor:
    """[groups * G] rewards, nan where nobody could judge -> advantages, 0 there."""
    return _advantages(options, rewards, torch.arange(len(rewards)) // options.group)


def _advantages(options: GrpoOptions, rewards: Tensor, groups: Tensor) -> Tensor:
    form = standardised_advantages if options.advantage == "grpo" else centred_advantages
    return form(rewards, groups, scored_b=(~rewards.isnan()).float())


@dataclass(frozen=True, slots=True)
class _Size:
    """Of the whole step, completions without a term of the loss included: what its reductions divide by."""

    completions: int
    tokens: float


def work_of(
    options: GrpoOptions,
    sequences: Sequence[Rendered],
    old: Sequence[Tensor],
    advantages: Tensor,
    learner: Learner,
    pack_tokens: int,
    rows: int,
) -> Work:
    """One update over `rows` completions of the policy's own, of which `sequences` are those with a term of the loss, and all its
    tokens; old[i] are the sampler's log-probabilities of sequence i's learned tokens."""
    size = _Size(rows, float(sum(map(len, old))))
    return _work(options, sequences, old, advantages, torch.zeros(len(sequences)), learner, pack_tokens, size)


def _work(
    options: GrpoOptions,
    sequences: Sequence[Rendered],
    old: Sequence[Tensor],
    advantages: Tensor,
    external: Tensor,
    learner: Learner,
    pack_tokens: int,
    size: _Size,
) -> Work:
    """The reference is computed only where a KL term or a limit asks for it."""
    packs = fill_packs(sequences, pack_tokens)
    wanted = options.beta != 0 or options.max_kl is not None
    references = {pack.members: values for pack, values in learner.reference_logprobs(packs)} if wanted else {}
    update = _Update(options, old, advantages, external, size)
    return Work(packs, lambda scored: update(scored, references.get(scored.pack.members)))


@dataclass(frozen=True, slots=True)
class _Update:
    """One pack's share of a step's loss. old[i], advantages[i], external[i]: of the i-th sequence of the step."""

    options: GrpoOptions
    old: Sequence[Tensor]
    advantages: Tensor
    external: Tensor
    size: _Size

    def __call__(self, scored: Scored, reference: Tensor | None) -> Objective:
        members = list(scored.pack.members)
        logp, mask = scored.padded_logprobs(), scored.pack.mask()
        old_bt = torch.zeros_like(logp)
        for row, member in enumerate(members):
            old_bt[row, : len(self.old[member])] = self.old[member]
        gains, external = (values[members].to(logp.device) for values in (self.advantages, self.external))
        # the sampler computed these with other matrix shapes: the difference is logged, and the ratio corrects for it
        gap = ((logp.detach() - old_bt) * mask * (1 - external)[:, None]).abs().sum()
        reference_bt = None if reference is None else scored.pack.pad(reference)
        loss, metrics = self._loss(logp, old_bt, mask, gains, external, reference_bt)
        return loss, {**metrics, "sampler_gap_sum": gap}

    def _loss(
        self, logp: Tensor, old: Tensor, mask: Tensor, gains: Tensor, external: Tensor, reference: Tensor | None
    ) -> Objective:
        options, rows, tokens = self.options, float(self.size.completions), self.size.tokens
        low, high = options.clip
        if options.named == "gspo":
            loss, metrics = gspo(logp, old, mask, gains, eps_low=low, eps_high=high, normaliser=rows)
            return loss, {**metrics, **_drift(logp, mask, reference)}
        if options.named == "luffy":
            unclipped = options.eps_low is None and options.eps_high is None
            shaping = Luffy(options.gamma, None if unclipped else options.clip)
            loss, metrics = luffy(logp, old, mask, gains, external, shaping, normaliser=tokens)
            return loss, {**metrics, **_drift(logp, mask * (1 - external)[:, None], reference)}  # k3 is of own samples
        terms: PolicyTerms = {"ref_logp_bt": reference, "beta": options.beta, "eps_low": low, "eps_high": high}
        if options.named == "dr_grpo":
            return dr_grpo(logp, old, mask, gains, options.max_len, normaliser=rows, **terms)
        if options.named == "dapo":
            return dapo(logp, old, mask, gains, normaliser=tokens, **terms)
        return grpo(logp, old, mask, gains, normaliser=rows, **terms)


def _drift(logp: Tensor, mask: Tensor, reference: Tensor | None) -> Metrics:
    """k3 to the reference and the tokens it is a sum over, for losses that do not measure it."""
    tokens = (mask > 0).sum()
    if reference is None:
        return {"tokens": tokens}
    return {"tokens": tokens, "kl_sum": k3(masked(logp.detach(), mask), masked(reference, mask)).sum()}


def _old_logprobs(episode: Episode) -> Tensor:
    """The sampler's log-probabilities of the learned tokens, in order (forced ones are not learned)."""
    return torch.tensor(
        [lp for turn in episode.turns for lp, forced in zip(turn.logprobs, turn.forced, strict=True) if not forced]
    )


def passes(judgement: Judgement | None) -> bool:
    return judgement is not None and judgement.passed


def pass_share(played: Sequence[Played]) -> float:
    return sum(passes(judgement) for _, judgement in played) / max(1, len(played))


def _with_signal(advantages: Tensor, groups: Tensor) -> float:
    """Share of the groups in which an advantage is not 0."""
    alive = torch.unique(groups[advantages != 0])
    return len(alive) / max(1, len(torch.unique(groups)))
