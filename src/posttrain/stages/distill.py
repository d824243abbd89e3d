"""Stage 6, distillation: the same capability, cheaper. A student cut from the teacher is refitted to its states in closed form, then
learns its answers, then its distributions, and beside both, where asked, its states.

The teacher is locked: its weights' fingerprint and its contract are recorded before and compared after, and it is never trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from posttrain.contract import Sequence as Rendered
from posttrain.errors import BaseModelError, IntegrityError, RecipeError
from posttrain.files import write_json
from posttrain.objectives.distill import hinton_tokens, reduce_tokens, state_distance_tokens
from posttrain.objectives.tensors import Metrics
from posttrain.policy.architecture import blocks_of
from posttrain.policy.importance import check_student, layer_importance, most_important
from posttrain.policy.pack import Pack, fill_packs
from posttrain.policy.policy import Policy
from posttrain.policy.refit import check_refit, reach, refit
from posttrain.policy.weights import base_parameters, cut_layers, fingerprint
from posttrain.ranges import Count, NonNegative, Positive, Share
from posttrain.stages.bench import Work, Workbench, batches, learned_weight, train
from posttrain.stages.sft import SftObjective
from posttrain.training import Learner, OptimiserOptions, Scored, team


@dataclass(frozen=True, slots=True)
class DistillOptions:
    """layers: how many of the teacher's layers the student keeps: those that its answers need most (`policy.importance`), as `judged`
    records, evenly spread, tell (a few do not tell which of the middle ones);
    width: neurons that each layer's MLP keeps (null: all); refit: ridge of the least-squares fit of what is kept to the teacher's states
    (see `policy.refit`; 0: not done, which a width does not allow); fitted: how many records, evenly spread, the fit reads, all at once
    (null: all of them);
    answers: share of the steps that learn the teacher's answers (sequence-level KD, Kim & Rush 2016) before the distributions;
    alpha: weight of the distributions, 1 - alpha of the answers, in the second phase; temperature tau (Hinton 2015);
    states: weight, in all steps, of the distance to the states of the teacher that the fit meets, mean over layers and positions,
    prompts included (hints, Romero 2015; 0: none). A position that records of a pack share counts once, so that a common prompt does not
    drown what differs; smaller packs share less."""

    layers: Annotated[int, Field(ge=2)] = 16
    judged: Count = 20
    width: Annotated[int, Field(ge=1)] | None = None
    refit: NonNegative = 0.1
    fitted: Count | None = None
    batch: Count = 16
    epochs: Positive = 1.0
    answers: Share = 0.3
    alpha: Share = 0.9
    temperature: Positive = 1.0
    states: NonNegative = 0.0
    optimiser: OptimiserOptions = field(default_factory=lambda: OptimiserOptions(lr=5e-4))


def check(options: DistillOptions, config: Any, where: str = "distill") -> None:
    """Refuse a student that the teacher of this configuration cannot give. Raises RecipeError."""
    text = config.get_text_config()
    if options.layers > text.num_hidden_layers:
        raise RecipeError(
            "the student cannot keep that many layers",
            where=f"{where}.layers",
            value=options.layers,
            remedy=f"choose 2 to {text.num_hidden_layers}",
        )
    if options.width is None:
        return
    if options.width > text.intermediate_size:
        raise RecipeError(
            "the student's MLPs cannot keep that many neurons",
            where=f"{where}.width",
            value=options.width,
            remedy=f"choose 1 to {text.intermediate_size}, or null for all",
        )
    if options.refit == 0:
        raise RecipeError(
            "neurons are chosen by the fit, which is not done",
            where=f"{where}.refit",
            value=0,
            remedy="set refit to 0.1, or width to null",
        )


def check_layers(options: DistillOptions, teacher: Policy, where: str = "distill") -> None:
    """Refuse a teacher whose layers cannot be fitted, or whose states cannot be learned. Raises BaseModelError."""
    if options.refit > 0:
        check_refit(teacher, f"{where}.refit")
    if options.states > 0 and not teacher.packs:
        raise BaseModelError(
            "this architecture's states cannot be learned: it runs row by row",
            where=f"{where}.states",
            value=options.states,
            remedy="set states to 0",
        )


def run(options: DistillOptions, taught: Sequence[Rendered], bench: Workbench) -> Policy:
    """Train a student of `bench.policy` (the teacher) on `taught`: the teacher's own outputs as sequences. Returns the student."""
    teacher = bench.policy
    teacher.forget_inference()  # its own answers are drawn; from here it gives distributions
    locked = fingerprint(teacher.base)
    check(options, teacher.config)
    check_layers(options, teacher)
    kept = _kept(options, taught, bench)
    student = Policy(cut_layers(teacher.base, kept))
    check_student(student, teacher, kept)
    student.recompute = teacher.recompute
    if options.refit > 0:
        pack = _one_pack(taught, options.fitted)
        distances = refit(student, teacher, kept, pack, options.refit, options.width)
        bench.log("refit", -1, 1, {"fit_distance": sum(distances) / max(1, len(distances))})
    embedding = student.base.get_input_embeddings().weight
    trained = {name: p for name, p in base_parameters(student.base).items() if p is not embedding}
    plan = batches(len(taught), options.batch, options.epochs, bench.seed)
    met = reach(kept, len(blocks_of(teacher.base))) if options.states > 0 else ()
    learner = Learner(student, trained, options.optimiser, len(plan), blocks=range(len(met)))
    first = round(options.answers * len(plan))

    def work(step: int) -> Work:
        sequences = [taught[i] for i in plan[step]]
        total = learned_weight(sequences)
        packs = fill_packs(sequences, bench.pack_tokens)
        alpha = 0.0 if step < first else options.alpha
        tokens = sum(pack.tokens for pack in packs)
        return Work(packs, _Distil(teacher, total, alpha, options.temperature, met, options.states, tokens))

    train(bench, learner, work)
    learner.freeze()
    if fingerprint(teacher.base) != locked:
        raise IntegrityError(
            "the teacher changed while it taught", where="distill", remedy="this is a defect: report it with the run folder"
        )
    return student


def _kept(options: DistillOptions, taught: Sequence[Rendered], bench: Workbench) -> tuple[int, ...]:
    """The layers that the student keeps. Chosen once: a run that is started again goes on with the student that its checkpoint holds, also
    where another machine's rounding would choose otherwise."""
    count = len(blocks_of(bench.policy.base))
    if options.layers == count:
        return tuple(range(count))
    chosen = bench.folder / "layers.json"
    if chosen.exists() and (before := json.loads(chosen.read_text()))["identity"] == bench.identity:
        return tuple(before["kept"])
    importance = layer_importance(bench.policy, _one_pack(taught, options.judged), options.refit)
    kept = most_important(importance, options.layers, apart=options.refit == 0)
    bench.log("layers", -1, 1, {f"nats_{layer}": nats for layer, nats in enumerate(importance)})
    bench.log("layers", -1, 1, {f"kept_{layer}": float(layer in kept) for layer in range(count)})
    if team().first:
        bench.folder.mkdir(parents=True, exist_ok=True)
        write_json(chosen, {"identity": bench.identity, "kept": kept})
    return kept


def _one_pack(taught: Sequence[Rendered], most: int | None) -> Pack:
    """At most so many of the records, evenly spread, in a pack of any size."""
    count = len(taught) if most is None else min(most, len(taught))
    some = [taught[index * len(taught) // count] for index in range(count)]
    (pack,) = fill_packs(some, sum(len(sequence) for sequence in some))
    return pack


@dataclass(frozen=True, slots=True)
class _Distil:
    """(1 - alpha) CE(teacher's answer) + alpha tau^2 KL(p_T || p_S), each a mean over the step's supervised tokens (objectives.md 6), and
    `states` times the distance of the student's states to the teacher's after its layers `met`, a mean over those and the step's tokens."""

    teacher: Policy
    total: float
    alpha: float
    temperature: float
    met: Sequence[int]
    states: float
    tokens: int

    def __call__(self, scored: Scored) -> tuple[Tensor, Metrics]:
        if self.alpha == 0 and not self.met:
            return SftObjective(self.total)(scored)
        with torch.no_grad():
            hidden, wanted = self.teacher.states(scored.pack, self.met)
        loss, metrics = (
            SftObjective(self.total)(scored) if self.alpha == 0 else self._distributions(scored, hidden[scored.pack.rows])
        )
        if not self.met:
            return loss, metrics
        sums = [state_distance_tokens(*pair).sum() for pair in zip(scored.states, wanted, strict=True)]
        distance = torch.stack(sums).mean() / self.tokens
        return loss + self.states * distance, {**metrics, "state_distance": distance.detach()}

    def _distributions(self, scored: Scored, target: Tensor) -> tuple[Tensor, Metrics]:
        pack = scored.pack

        def tokens(logits: Tensor, teacher_logits: Tensor, answer: Tensor) -> Tensor:
            return hinton_tokens(logits, teacher_logits, answer, self.temperature, self.alpha)

        values = scored.tokenwise(tokens, [(self.teacher.head, target)], [pack.targets])
        return reduce_tokens(values, pack.weights, normaliser=self.total)
