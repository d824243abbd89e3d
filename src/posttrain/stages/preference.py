"""Stage 3, preference alignment by DPO: better to use, on a leash. The reference is the parent: the same weights, adapter off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from posttrain.contract import Sequence as Rendered
from posttrain.contract.preflight import preflight
from posttrain.data.records import Preference
from posttrain.errors import PreflightError
from posttrain.objectives.preference import dpo, sft_term
from posttrain.objectives.tensors import Metrics
from posttrain.policy.pack import Pack, fill_packs
from posttrain.policy.policy import LoraOptions
from posttrain.ranges import Count, NonNegative, Positive
from posttrain.stages.bench import Work, Workbench, batches, learned_weight, leash, train
from posttrain.training import Learner, OptimiserOptions, Scored, team


@dataclass(frozen=True, slots=True)
class PreferenceOptions:
    """beta: strength of the leash (Rafailov 2023); sft: weight of an NLL term on the chosen answer, which counters the fall of its
    likelihood; max_drift: stop when the mean per-token shift from the reference exceeds this many nats (None: never)."""

    batch: Count = 8
    epochs: Positive = 1.0
    beta: Positive = 0.1
    sft: NonNegative = 0.0
    max_tokens: Count = 1024
    max_drift: Positive | None = None
    adapter: LoraOptions = field(default_factory=LoraOptions)
    optimiser: OptimiserOptions = field(default_factory=lambda: OptimiserOptions(lr=2e-4))


@dataclass(frozen=True, slots=True)
class StepSize:
    """The global counts of one step, known before its first pack."""

    pairs: int
    chosen_tokens: float


def run(options: PreferenceOptions, pairs: Sequence[Preference], bench: Workbench, name: str = "main") -> str | None:
    """Train adapter `name` on the pairs; returns why it stopped early, if it did."""
    sequences = check(options, pairs, bench)
    plan = batches(len(pairs), options.batch, options.epochs, bench.seed)
    bench.policy.add_adapter(name, options.adapter, bench.seed)
    learner = Learner.for_adapter(bench.policy, name, options.optimiser, len(plan))

    references = References(sequences, plan, learner, bench.pack_tokens)

    def work(step: int) -> Work:
        return work_of(options, _both(sequences, plan[step]), learner, bench.pack_tokens, references.of(plan[step]))

    watch = leash(bench.watch, lambda metrics: metrics.get("drift", 0.0), options.max_drift, "drift from the reference")
    stopped = train(replace(bench, watch=watch), learner, work)
    learner.freeze()
    return stopped


def work_of(
    options: PreferenceOptions,
    sides: Sequence[Rendered],
    learner: Learner,
    pack_tokens: int,
    references: Sequence[Tensor] | None = None,
) -> Work:
    """One step over the pairs whose chosen and rejected sequences are `sides`, in turn. references[i]: the reference's
    log-probabilities of the learned tokens of sides[i]; None: computed here."""
    packs = _packs(sides, pack_tokens)
    known = _reference(packs, learner) if references is None else dict(enumerate(references))
    size = StepSize(len(sides) // 2, learned_weight(sides[::2]))
    return Work(packs, lambda scored: _objective(scored, known, options, size))


class References:
    """The reference's log-probabilities of pairs, computed once per pair and run: in the packs of the step that has the pair first,
    also when a resumed run meets it later, so that they have the same bits."""

    def __init__(self, sequences: Sequence[Rendered], plan: Sequence[Sequence[int]], learner: Learner, pack_tokens: int) -> None:
        self._sequences, self._plan, self._learner, self._pack_tokens = sequences, plan, learner, pack_tokens
        self._first: dict[int, int] = {}
        for step, pairs in enumerate(plan):
            for pair in pairs:
                self._first.setdefault(pair, step)
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, pairs: Sequence[int]) -> list[Tensor]:
        """Chosen and rejected of each pair, in turn."""
        for pair in pairs:
            if pair not in self._known:
                self._compute(self._plan[self._first[pair]])
        return [side for pair in pairs for side in self._known[pair]]

    def _compute(self, pairs: Sequence[int]) -> None:
        found = _reference(_packs(_both(self._sequences, pairs), self._pack_tokens), self._learner)
        for place, pair in enumerate(pairs):
            self._known.setdefault(pair, (found[2 * place], found[2 * place + 1]))


def _both(sequences: Sequence[Rendered], pairs: Sequence[int]) -> list[Rendered]:
    return [sequences[2 * pair + side] for pair in pairs for side in (0, 1)]


def _packs(sides: Sequence[Rendered], pack_tokens: int) -> list[Pack]:
    """A pair's prompt once, and pairs stay pairs."""
    return fill_packs(sides, pack_tokens, [(i, i + 1) for i in range(0, len(sides), 2)])


def _reference(packs: Sequence[Pack], learner: Learner) -> dict[int, Tensor]:
    """The reference's log-probabilities by member, of its learned tokens in order."""
    found = {}
    for pack, values in learner.reference_logprobs(packs):
        for place, member in enumerate(pack.members):
            found[member] = values[(pack.sequence == place).to(values.device)].cpu()  # where other processes can read it
    return {member: values for share in team().gather(found) for member, values in share.items()}


def check(options: PreferenceOptions, pairs: Sequence[Preference], bench: Workbench) -> Sequence[Rendered]:
    """Rendered sequences, chosen and rejected in turn. Refuses what cannot teach: over-long, mute or equal sides."""
    sequences = bench.renderer.preferences(pairs)
    names = [f"{pair.id} ({side})" for pair in pairs for side in ("chosen", "rejected")]
    preflight(zip(names, sequences, strict=True), max_tokens=options.max_tokens, end_of_turn=bench.contract.end_of_turn)
    same = [pair.id for i, pair in enumerate(pairs) if sequences[2 * i].ids.tolist() == sequences[2 * i + 1].ids.tolist()]
    if same:
        raise PreflightError(
            f"{len(same)} pair(s) with equal sides: {', '.join(same[:5])}",
            where="preference",
            remedy="remove them: their gradient is zero",
        )
    return sequences


def _objective(scored: Scored, known: Mapping[int, Tensor], options: PreferenceOptions, size: StepSize) -> tuple[Tensor, Metrics]:
    logp = scored.padded_logprobs()
    mask = scored.pack.mask()
    reference = torch.zeros_like(mask, device=logp.device)
    for place, member in enumerate(scored.pack.members):
        reference[place, : len(known[member])] = known[member]
    chosen, rejected = _sides(scored.pack)
    sums, reference_sums = logp.sum(1), reference.sum(1)
    loss, metrics = dpo(
        sums[chosen], sums[rejected], reference_sums[chosen], reference_sums[rejected], options.beta, normaliser=size.pairs
    )
    if options.sft > 0:
        loss = loss + sft_term(sums[chosen], mask.sum(1)[chosen], options.sft, normaliser=size.chosen_tokens)
    # drift seen on the data, not on samples: mean |log pi - log ref| per token of the chosen answers
    drift = (logp - reference).detach()[chosen].abs().sum() / size.chosen_tokens
    return loss, {**metrics, "drift": drift}


def _sides(pack: Pack) -> tuple[Tensor, Tensor]:
    """Places of the chosen and of the rejected sequences: members 2i and 2i+1 of the step's list, which the pack kept together."""
    place = {member: index for index, member in enumerate(pack.members)}
    firsts = [member for member in pack.members if member % 2 == 0]
    return torch.tensor([place[m] for m in firsts]), torch.tensor([place[m + 1] for m in firsts])
