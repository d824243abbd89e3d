"""Stage 6: the student comes nearer to its teacher, and the teacher does not move."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from workshop import Shop

from posttrain.contract import Sequence
from posttrain.data.records import Conversation, Message
from posttrain.errors import BaseModelError, IntegrityError, RecipeError
from posttrain.policy import LoraOptions, Pack, Policy, cut_layers
from posttrain.policy.importance import layer_importance, most_important
from posttrain.stages import Workbench, distill
from posttrain.stages.bench import batches
from posttrain.stages.distill import DistillOptions
from posttrain.training import Learner, OptimiserOptions
from tiny_models import stored, tiny_model

OPTIONS = DistillOptions(layers=2, refit=0.0, batch=4, epochs=8.0, answers=0.125, optimiser=OptimiserOptions(lr=3e-3))

SOFT = replace(OPTIONS, answers=0.0, alpha=1.0)


def taught(shop: Shop) -> list[Sequence]:
    talks = [
        Conversation(
            str(i), (Message("user", f"What is due on account {i}?"), Message("assistant", f"{i}2.50 is due, see JV-{i}"))
        )
        for i in range(8)
    ]
    return [shop.contract.render(talk) for talk in talks]


@torch.no_grad()
def kl(teacher: Policy, student: Policy, sequences: list[Sequence]) -> float:
    """Mean KL(p_T || p_S) per supervised token, over plain full logits."""
    pack = Pack.of(sequences)
    logs = [p.head.logits(p.hidden(pack)[pack.rows]).log_softmax(-1) for p in (teacher, student)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def cut(bench: Workbench, sequences: list[Sequence]) -> Policy:
    importance = layer_importance(bench.policy, Pack.of(sequences))
    return Policy(cut_layers(bench.policy.base, most_important(importance, OPTIONS.layers)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DistillOptions(layers=4), "cannot keep that many layers"),
        (DistillOptions(layers=2, width=49), "cannot keep that many neurons"),
        (DistillOptions(layers=2, width=24, refit=0.0), "chosen by the fit"),
    ],
)
def test_a_student_that_the_teacher_cannot_give_is_a_recipe_error(options: DistillOptions, message: str) -> None:
    config = tiny_model("llama").config
    assert (config.num_hidden_layers, config.intermediate_size) == (3, 48)
    with pytest.raises(RecipeError, match=message):
        distill.check(options, config)


def test_the_student_comes_nearer_to_its_teacher_who_does_not_move(shop: Shop) -> None:
    bench = shop.bench()
    sequences = taught(shop)
    before, locked = kl(bench.policy, cut(bench, sequences), sequences), bench.policy.fingerprint
    student = distill.run(SOFT, sequences, bench)
    bench.policy._fingerprint = None
    assert bench.policy.fingerprint == locked
    assert student.config.num_hidden_layers == 2
    assert kl(bench.policy, student, sequences) < before * 0.7


def test_answers_come_first_and_then_distributions(shop: Shop) -> None:
    distill.run(replace(OPTIONS, answers=0.5), taught(shop), shop.bench())
    kinds = ["kl_sum" in metrics for phase, _, metrics in shop.notes.lines if phase == "train"]
    assert kinds == [False] * 8 + [True] * 8


def test_without_an_answers_phase_every_step_learns_distributions(shop: Shop) -> None:
    distill.run(replace(OPTIONS, answers=0.0, epochs=1.0), taught(shop), shop.bench())
    assert all("kl_sum" in metrics for phase, _, metrics in shop.notes.lines if phase == "train")


def test_the_first_losses_are_the_cut_students_own(shop: Shop) -> None:
    bench = shop.bench()
    sequences = taught(shop)
    student = cut(bench, sequences)
    whole = replace(OPTIONS, batch=8, epochs=1.0)
    with torch.no_grad():
        nll = float(-student.logprobs(Pack.of(sequences)).mean())
    distill.run(replace(whole, answers=1.0), sequences, bench)
    assert shop.notes.of("loss") == pytest.approx([nll], abs=1e-3)
    shop.notes.lines.clear()
    distill.run(replace(whole, answers=0.0, alpha=0.75), sequences, shop.bench("soft"))
    want = 0.75 * kl(bench.policy, student, sequences) + 0.25 * nll
    assert shop.notes.of("loss") == pytest.approx([want], abs=1e-3)


def test_the_loss_does_not_depend_on_how_a_step_is_packed(shop: Shop) -> None:
    losses = {}
    for size in (40, 5000):
        shop.notes.lines.clear()
        distill.run(replace(OPTIONS, epochs=2.0), taught(shop), shop.bench(f"size{size}", pack_tokens=size))
        losses[size] = shop.notes.of("loss")
    assert losses[40] == pytest.approx(losses[5000], abs=3e-3)


def test_a_student_that_learns_states_comes_nearer_to_them(shop: Shop) -> None:
    """Than one that learns distributions only; and in one pack or several, of which each counts what its records share once."""
    hinted, plain = replace(SOFT, states=3.0), replace(SOFT, states=1e-9)
    last = {}
    for name, options in (("hinted", hinted), ("plain", plain)):
        shop.notes.lines.clear()
        distill.run(options, taught(shop), shop.bench(name))
        distances = shop.notes.of("state_distance")
        assert distances[0] == pytest.approx(first_distance(shop), rel=1e-3)
        last[name] = distances[-1]
    assert last["hinted"] < 0.7 * last["plain"]
    shop.notes.lines.clear()
    distill.run(hinted, taught(shop), shop.bench("split", pack_tokens=40))
    assert shop.notes.of("state_distance")[-1] == pytest.approx(last["hinted"], rel=2e-2)


@torch.no_grad()
def first_distance(shop: Shop) -> float:
    """Of the cut student, before it learned: its layers against the teacher's, sequence by sequence; the last one's is the last."""
    bench, sequences = shop.bench("first"), taught(shop)
    kept = most_important(layer_importance(bench.policy, Pack.of(sequences)), OPTIONS.layers)
    student = Policy(cut_layers(bench.policy.base, kept))
    plan = [sequences[i] for i in batches(len(sequences), OPTIONS.batch, OPTIONS.epochs, bench.seed)[0]]
    pack = Pack.of(plan)
    (_, own), (_, theirs) = student.states(pack, [0, 1]), bench.policy.states(pack, [kept[0], 2])
    return float(sum(((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in zip(own, theirs, strict=True)) / 2)


def test_states_of_a_teacher_that_runs_row_by_row_are_refused(shop: Shop) -> None:
    bench = shop.bench()
    bench.policy.packs = False
    with pytest.raises(BaseModelError, match=r"distill\.states.*set states to 0"):
        distill.run(replace(SOFT, states=1.0), taught(shop), bench)


def test_answers_alone_may_come_with_states(shop: Shop) -> None:
    distill.run(replace(OPTIONS, answers=1.0, epochs=1.0, states=1.0), taught(shop), shop.bench())
    assert len(shop.notes.of("state_distance")) == 2 and shop.notes.of("kl_sum") == []


def test_a_refitted_student_starts_nearer_to_its_teacher(shop: Shop) -> None:
    bench, sequences = shop.bench(), taught(shop)
    once = replace(OPTIONS, refit=0.01, batch=8, epochs=1.0, answers=0.0, alpha=1.0, optimiser=OptimiserOptions(lr=1e-9))
    before = kl(bench.policy, cut(bench, sequences), sequences)
    assert kl(bench.policy, distill.run(once, sequences, bench), sequences) < 0.5 * before
    assert [phase for phase, _, _ in shop.notes.lines] == ["layers", "layers", "refit", "train"]


def test_the_log_says_what_each_layer_is_worth_and_which_stay(shop: Shop) -> None:
    bench, sequences = shop.bench(), taught(shop)
    importance = layer_importance(bench.policy, Pack.of(sequences))
    student = distill.run(replace(OPTIONS, epochs=1.0, optimiser=OptimiserOptions(lr=1e-9)), sequences, bench)
    assert [shop.notes.of(f"nats_{layer}", "layers") for layer in range(3)] == [
        [pytest.approx(nats, rel=1e-4)] for nats in importance
    ]
    kept = [layer for layer in range(3) if shop.notes.of(f"kept_{layer}", "layers") == [1.0]]
    assert tuple(kept) == most_important(importance, OPTIONS.layers)
    for own, old in zip(student.base.base_model.layers, kept, strict=True):
        weight = bench.policy.base.base_model.layers[old].self_attn.q_proj.weight
        assert torch.allclose(own.self_attn.q_proj.weight, weight, rtol=5e-3)  # stored in bfloat16


@pytest.mark.parametrize("ridge", [0.0, 0.02])
def test_the_layers_are_judged_on_records_from_all_of_them_after_the_fit_that_the_student_gets(
    ridge: float, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = taught(shop)
    asked: list[tuple[list[int], float]] = []
    judge = distill.layer_importance

    def noted(teacher: Policy, pack: Pack, ridge: float) -> list[float]:
        asked.append((sorted(pack.lengths), ridge))
        return judge(teacher, pack, ridge)

    monkeypatch.setattr(distill, "layer_importance", noted)
    distill.run(replace(OPTIONS, judged=4, refit=ridge, epochs=0.5), sequences, shop.bench())
    assert asked == [(sorted(len(sequence) for sequence in sequences[::2]), ridge)]


def test_the_fit_reads_as_many_records_as_it_is_told_evenly_spread(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = taught(shop)
    read: list[tuple[int, ...]] = []
    fit = distill.refit
    monkeypatch.setattr(distill, "refit", lambda student, teacher, kept, pack, *rest: read.append(pack.lengths) or fit(
        student, teacher, kept, pack, *rest
    ))  # fmt: skip
    for fitted in (None, 4, 99):
        distill.run(replace(OPTIONS, refit=0.01, fitted=fitted, epochs=0.5), sequences, shop.bench(f"fit{fitted}"))
    lengths = [len(sequence) for sequence in sequences]
    assert [sorted(own) for own in read] == [sorted(lengths), sorted(lengths[::2]), sorted(lengths)]


def test_a_narrow_student_starts_near_its_teacher_and_learns(shop: Shop) -> None:
    bench, sequences = shop.bench(), taught(shop)
    width = bench.policy.config.intermediate_size // 4
    options = replace(OPTIONS, layers=3, width=width, refit=0.01, answers=0.0, alpha=1.0, optimiser=OptimiserOptions(lr=1e-3))
    student = distill.run(options, sequences, bench)
    losses = shop.notes.of("kl_sum")
    assert student.config.intermediate_size == width and student.config.num_hidden_layers == 3
    assert sum(losses[-4:]) < sum(losses[:4])


def test_a_student_that_keeps_every_layer_starts_with_nothing_to_learn_from_its_teacher(shop: Shop) -> None:
    options = replace(OPTIONS, layers=3, answers=0.0, alpha=1.0, epochs=0.5)
    distill.run(options, taught(shop), shop.bench())
    assert shop.notes.of("loss")[0] == pytest.approx(0.0, abs=1e-5)


def test_the_embedding_is_kept_as_the_teachers_and_the_student_ends_as_it_is_stored(shop: Shop) -> None:
    bench = shop.bench()
    student = distill.run(replace(OPTIONS, epochs=1.0), taught(shop), bench)
    assert torch.equal(student.base.get_input_embeddings().weight, bench.policy.base.get_input_embeddings().weight)
    trained = [p for n, p in student.base.named_parameters() if "layers" in n]
    assert all(torch.equal(p, p.bfloat16().float()) and not p.requires_grad for p in trained)


def test_a_teacher_whose_head_is_tied_to_its_embedding_makes_a_student_with_a_frozen_tied_head(shop: Shop) -> None:
    bench = shop.bench()
    teacher = Policy(tiny_model(vocabulary=shop.contract.vocabulary_size, tie_word_embeddings=True))
    student = distill.run(replace(OPTIONS, epochs=1.0), taught(shop), replace(bench, policy=teacher))
    assert student.head.weight is student.base.get_input_embeddings().weight
    assert torch.equal(student.head.weight, teacher.head.weight)


def test_a_bfloat16_student_learns_too(shop: Shop) -> None:
    bench = shop.bench()
    teacher = Policy(stored(tiny_model(vocabulary=shop.contract.vocabulary_size), torch.bfloat16))
    bench, sequences = replace(bench, policy=teacher), taught(shop)
    before = kl(teacher, cut(bench, sequences), sequences)
    student = distill.run(SOFT, sequences, bench)
    assert student.dtype == torch.bfloat16 and kl(teacher, student, sequences) < before * 0.7


def stop_in_the_middle(shop: Shop, sequences: list[Sequence]) -> None:
    """A run in the workbench "stopped" that fails in its sixth step."""

    class Crash(Exception): ...

    def crash(phase: str, step: int, total: int, metrics: object) -> None:
        if step == 5:
            raise Crash

    with pytest.raises(Crash):
        distill.run(OPTIONS, sequences, shop.bench("stopped", log=crash))


def test_a_run_that_is_started_again_ends_with_the_same_student(shop: Shop) -> None:
    sequences = taught(shop)
    stop_in_the_middle(shop, sequences)
    resumed = distill.run(OPTIONS, sequences, shop.bench("stopped"))
    repeated = [step for phase, step, _ in shop.notes.lines if phase == "train"]
    assert repeated[0] <= 5 and repeated == list(range(repeated[0], 16))
    assert resumed.fingerprint == distill.run(OPTIONS, sequences, shop.bench("whole")).fingerprint


def test_a_run_that_is_started_again_keeps_the_layers_that_it_chose(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = taught(shop)
    stop_in_the_middle(shop, sequences)
    monkeypatch.delattr(distill, "layer_importance")  # it might judge otherwise on another machine
    resumed = distill.run(OPTIONS, sequences, shop.bench("stopped"))
    monkeypatch.undo()
    assert resumed.fingerprint == distill.run(OPTIONS, sequences, shop.bench("whole")).fingerprint


def test_a_student_of_all_layers_needs_no_judgement(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(distill, "layer_importance")
    student = distill.run(replace(OPTIONS, layers=3, epochs=0.5), taught(shop), shop.bench())
    assert student.config.num_hidden_layers == 3


def test_a_teacher_that_changes_while_it_teaches_is_an_error(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = shop.bench()
    inner = Learner.step

    def meddle(self: Learner) -> dict[str, float]:
        with torch.no_grad():
            bench.policy.head.weight[3] += 0.5
        return inner(self)

    monkeypatch.setattr(Learner, "step", meddle)
    with pytest.raises(IntegrityError, match="the teacher changed while it taught"):
        distill.run(replace(OPTIONS, epochs=0.5), taught(shop), bench)


def test_the_teachers_adapters_are_left_out_of_the_students_weights_and_teach_if_they_are_on(shop: Shop) -> None:
    bench = shop.bench()
    bench.policy.add_adapter("main", LoraOptions(rank=4), 1)
    for parameter in bench.policy.adapter_parameters("main").values():
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    sequences = taught(shop)
    start = kl(bench.policy, cut(bench, sequences), sequences)
    student = distill.run(OPTIONS, sequences, bench)
    assert not any("lora" in name for name, _ in student.base.named_parameters())
    assert kl(bench.policy, student, sequences) < start * 0.7


def test_the_loss_and_its_parts_are_finite(shop: Shop) -> None:
    distill.run(OPTIONS, taught(shop), shop.bench())
    values: list[float | Tensor] = [value for _, _, metrics in shop.notes.lines for value in metrics.values()]
    assert all(math.isfinite(value) for value in values)
