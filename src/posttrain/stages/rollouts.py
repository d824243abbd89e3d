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
Show = Callable[[Sequence[Task]], list[Played]]  # each task's demonstration, played

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
    - dapo: mean over all tokens, clip-higher (Yu 2025); groups without signal are not drawn again and stay in the divisor;
    - gspo: one ratio a completion (Zheng 2025);
    - luffy: a task's demonstration joins its group as an external trace whose tokens count by f(p) = p / (p + gamma) (Yan 2025).

    None: `grpo` for the paper's advantage, `dr_grpo` for the centred one, which dr_grpo's paper and luffy's released run take, too.
    eps_low, eps_high: the clip range, None: the loss's own (0.2 and 0.2; dapo 0.2 and 0.28; gspo 3e-4 and 4e-4; luffy clips nothing
    while both are None). gamma: luffy's. beta weighs the k3 penalty to the parent, of every judged completion, which gspo and luffy
    have not; max_kl stops the stage when the mean k3 estimate to the parent, nats per token of the policy's own completions in the
    update, exceeds it (None: never). One update per rollout; without beta it leaves out completions whose advantage is 0, as they
    would not move anything."""

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
        traces, their_groups = _external(options, chosen, show)
        union, groups = [*played, *traces], torch.tensor([i // options.group for i in range(len(played))] + their_groups)
        rewards, external = rewards_of(union), torch.tensor([0.0] * len(played) + [1.0] * len(traces))
        advantages = advantages_of(options, rewards, groups)
        # without an advantage a completion has the KL term only
        teaches = ~rewards.isnan() if options.beta != 0 else advantages != 0
        live = [i for i in range(len(rewards)) if teaches[i] and union[i][0].turns]
        judged = rewards[~rewards.isnan() & (external == 0)]
        metrics = {
            **({"reward": float(judged.mean())} if len(judged) else {}),
            "judged_share": len(judged) / len(played),
            "pass_share": pass_share(played),
            "groups_with_signal": _with_signal(advantages, groups),
            **({"external": float(len(traces))} if options.named == "luffy" else {}),
        }
        if not live:
            return Work([], lambda scored: (scored.hidden.sum() * 0, {}), metrics)
        old = [_old_logprobs(episode) for episode, _ in union]
        sequences = [bench.contract.render_episode(union[i][0]) for i in live]
        size = StepSize(len(union), float(sum(map(len, old))))
        todo = work_of(
            options, sequences, [old[i] for i in live], advantages[live], external[live], learner, bench.pack_tokens, size
        )
        return replace(todo, metrics=metrics)

    watch = leash(
        bench.watch, lambda m: m.get("kl_sum", 0.0) / max(1.0, m.get("tokens", 1.0)), options.max_kl, "KL to the parent"
    )
    stopped = train(replace(bench, watch=watch), learner, work, "grpo")
    learner.freeze()
    return stopped


def _external(options: GrpoOptions, tasks: Sequence[Task], show: Show | None) -> tuple[list[Played], list[int]]:
    """For LUFFY the tasks' demonstrations, whose rewards are the verifier's like any other's, and each one's group."""
    if options.named != "luffy" or show is None:
        return [], []
    groups = [index for index, task in enumerate(tasks) if task.demonstration]
    return show([tasks[index] for index in groups]), groups


def rewards_of(played: Sequence[Played]) -> Tensor:
    """[n] the verifier's scores, nan where nobody could judge."""
    return torch.tensor([float("nan") if judgement is None else judgement.score for _, judgement in played])


def advantages_of(options: GrpoOptions, rewards: Tensor, groups: Tensor | None = None) -> Tensor:
    """[n] rewards, nan where nobody could judge -> advantages within each group, 0 there: what nobody could judge is left out of its
    group's statistics. groups [n]: whose each one is (None: `options.group` of each, in turn)."""
    if groups is None:
        groups = torch.arange(len(rewards)) // options.group
    form = standardised_advantages if options.advantage == "grpo" else centred_advantages
    return form(rewards, groups, scored_b=(~rewards.isnan()).float())


@dataclass(frozen=True, slots=True)
class StepSize:
    """Of the whole step, completions without a term of the loss included: what its reductions divide by."""

    completions: int
    tokens: float


def work_of(
    options: GrpoOptions,
    sequences: Sequence[Rendered],
    old: Sequence[Tensor],
    advantages: Tensor,
    external: Tensor,
    learner: Learner,
    pack_tokens: int,
    size: StepSize,
) -> Work:
    """One update by the completions with a term of the loss: old[i] are the sampler's log-probabilities of sequence i's learned tokens,
    external[i] is 1 for a trace that the policy did not sample. The reference is computed only where a KL term or a limit asks for it."""
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
    size: StepSize

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
