"""Policy-gradient updates by judged completions: GRPO and, by name, its relatives (objectives.md 5.4 to 5.8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.contract import Sequence as Rendered
from posttrain.data.records import Episode
from posttrain.objectives.advantages import centred_advantages, overlong_penalty, standardised_advantages
from posttrain.objectives.kl import k3
from posttrain.objectives.policy_loss import PolicyTerms, dapo, dr_grpo, grpo
from posttrain.objectives.reductions import const
from posttrain.objectives.sequence_policy import Luffy, gspo, luffy_tokens
from posttrain.objectives.tensors import Metrics, Objective, masked
from posttrain.policy.pack import fill_packs
from posttrain.ranges import Count, NonNegative, Positive, Share, Whole
from posttrain.stages.bench import Work
from posttrain.training import Learner, OptimiserOptions, Scored
from posttrain.verifying.judgement import Judgement

Played = tuple[Episode, Judgement | None]  # None: nobody could judge it

Loss = Literal["grpo", "dr_grpo", "dapo", "gspo", "luffy"]
Advantage = Literal["grpo", "centred"]
# (eps_low, eps_high)
_CLIP: dict[Loss, tuple[float, float]] = {"dapo": (0.2, 0.28)}
_CENTRED: tuple[Loss, ...] = ("dr_grpo", "luffy")
_WITHOUT_KL: tuple[Loss, ...] = ("gspo", "luffy")


@dataclass(frozen=True, slots=True)
class GrpoOptions:
    """advantage: 'grpo' (r - mean) / (std + eps), as the paper; 'centred' r - mean, the chapter's form. loss, by name:

    - grpo: mean over completions of the mean over their tokens (Shao 2024);
    - dr_grpo: sum over tokens by the constant `max_len`, the advantage centred (Liu 2025);
    - dapo: mean over all tokens of the groups whose scores differ, clip-higher (Yu 2025); the rest of its recipe are `refills` and
      `overlong`;
    - gspo: one ratio a completion (Zheng 2025), to the policy's own log-probabilities before the update, as the sampler's differ by
      rounding alone by more than its clip range, which with one update per rollout never acts;
    - luffy: a task's demonstration joins its group as an external trace whose tokens count by f(p) = p / (p + gamma), the advantage
      centred over the union, by the constant `max_len`, as the released run (Yan 2025).

    None: either follows from the other (`centred` is dr_grpo's), both None is GRPO's. eps_low, eps_high: the clip range, None: the
    loss's own (0.2 and 0.2, dapo 0.2 and 0.28; luffy clips nothing while both are None). gamma: luffy's. beta weighs the k3 penalty to
    the parent, of every judged completion of the groups in the update, which gspo and luffy have not; max_kl stops the stage when the
    mean k3 estimate to the parent, nats per token of the policy's own completions in the update, exceeds it (None: never). One update
    per rollout; without beta it leaves out completions whose advantage is 0, as they would not move anything.

    refills: dynamic sampling (Yu 2025). Groups in which all score alike are dropped, which for scores of 0 and 1 is the paper's rule,
    and up to so many further draws of `tasks` tasks fill their places (0: dapo drops, the others keep them). overlong: tokens before
    `max_len` from which a sampled completion's reward falls, to -1 beyond `max_len` (soft overlong punishment, Yu 2025 eq. 13; 0: none)."""

    steps: Whole = 6
    tasks: Count = 8
    group: Annotated[int, Field(ge=2)] = 8  # an advantage is against the other answers to the same prompt
    advantage: Advantage | None = None
    loss: Loss | None = None
    beta: NonNegative = 0.0
    eps_low: Share | None = None
    eps_high: Positive | None = None
    gamma: Positive = 0.1
    max_len: Count = 128
    max_kl: Positive | None = None
    refills: Whole = 0
    overlong: Whole = 0
    optimiser: OptimiserOptions = field(default_factory=lambda: OptimiserOptions(lr=2e-4, warmup=0.1))

    def __post_init__(self) -> None:
        if self.beta != 0 and self.loss in _WITHOUT_KL:
            raise ValueError(f"the loss {self.loss} has no KL term: set beta to 0, or bound the drift by max_kl")
        if self.loss == "gspo" and (self.eps_low is not None or self.eps_high is not None):
            raise ValueError("with one update per rollout gspo clips nothing: leave eps_low and eps_high out")
        if self.overlong > self.max_len:
            raise ValueError(f"overlong {self.overlong} is more than max_len {self.max_len}: every completion would be too long")

    @property
    def loss_name(self) -> Loss:
        return self.loss or ("dr_grpo" if self.advantage == "centred" else "grpo")

    @property
    def advantage_name(self) -> Advantage:
        return self.advantage or ("centred" if self.loss_name in _CENTRED else "grpo")

    @property
    def clip(self) -> tuple[float, float]:
        low, high = _CLIP.get(self.loss_name, (0.2, 0.2))
        return low if self.eps_low is None else self.eps_low, high if self.eps_high is None else self.eps_high

    @property
    def drops(self) -> bool:
        """Whether groups in which all score alike have no part in an update, not even in what it divides by."""
        return self.loss_name == "dapo" or self.refills > 0

    @property
    def needed(self) -> int:
        """Tasks that the steps may ask for; none is played twice."""
        return self.steps * (1 + self.refills) * self.tasks


def rewards_of(options: GrpoOptions, played: Sequence[Played], external: Tensor | None = None) -> Tensor:
    """[n] the verifier's scores, less what `overlong` takes of those that are not external (1 in external [n]), nan where nobody could
    judge."""
    scores = torch.tensor([float("nan") if judgement is None else judgement.score for _, judgement in played])
    if not options.overlong:
        return scores
    lengths = torch.tensor([float(sum(len(turn.ids) for turn in episode.turns)) for episode, _ in played])
    penalty = overlong_penalty(lengths, options.max_len, options.overlong)
    return scores + (penalty if external is None else penalty * (1 - external))


def advantages_of(options: GrpoOptions, rewards: Tensor, groups: Tensor | None = None) -> Tensor:
    """[n] rewards, nan where nobody could judge -> advantages within each group, 0 there: what nobody could judge is left out of its
    group's statistics. groups [n]: whose each one is (None: `options.group` of each, in turn)."""
    if groups is None:
        groups = torch.arange(len(rewards)) // options.group
    form = standardised_advantages if options.advantage_name == "grpo" else centred_advantages
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
        # the sampler computed these with other matrix shapes: the difference is logged, and token ratios correct for it
        gap = ((logp.detach() - old_bt) * mask * (1 - external)[:, None]).abs().sum()
        reference_bt = None if reference is None else scored.pack.pad(reference)
        loss, metrics = self._loss(logp, old_bt, mask, gains, external, reference_bt)
        return loss, {**metrics, "sampler_gap_sum": gap}

    def _loss(
        self, logp: Tensor, old: Tensor, mask: Tensor, gains: Tensor, external: Tensor, reference: Tensor | None
    ) -> Objective:
        options, rows, tokens = self.options, float(self.size.completions), self.size.tokens
        low, high = options.clip
        if options.loss_name == "gspo":
            loss, metrics = gspo(logp, logp.detach(), mask, gains, normaliser=rows)
            return loss, {**metrics, **_drift(logp, mask, reference)}
        if options.loss_name == "luffy":
            unclipped = options.eps_low is None and options.eps_high is None
            shaping = Luffy(options.gamma, None if unclipped else options.clip)
            terms_bt = luffy_tokens(logp, old, mask, gains, external, shaping)
            own = mask * (1 - external)[:, None]  # k3 is of own samples
            return const(terms_bt, mask, options.max_len, normaliser=rows), _drift(logp, own, reference)
        terms: PolicyTerms = {"ref_logp_bt": reference, "beta": options.beta, "eps_low": low, "eps_high": high}
        if options.loss_name == "dr_grpo":
            return dr_grpo(logp, old, mask, gains, options.max_len, normaliser=rows, **terms)
        if options.loss_name == "dapo":
            return dapo(logp, old, mask, gains, normaliser=tokens, **terms)
        return grpo(logp, old, mask, gains, normaliser=rows, **terms)


def _drift(logp: Tensor, mask: Tensor, reference: Tensor | None) -> Metrics:
    """k3 to the reference and the tokens it is a sum over, for losses that do not measure it."""
    tokens = (mask > 0).sum()
    if reference is None:
        return {"tokens": tokens}
    return {"tokens": tokens, "kl_sum": k3(masked(logp.detach(), mask), masked(reference, mask)).sum()}


def old_logprobs(episode: Episode) -> Tensor:
    """The sampler's log-probabilities of the learned tokens, in order (forced ones are not learned)."""
    return torch.tensor(
        [lp for turn in episode.turns for lp, forced in zip(turn.logprobs, turn.forced, strict=True) if not forced]
    )
