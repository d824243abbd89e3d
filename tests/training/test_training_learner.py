"""The learner: accumulation is one batch, the base never moves, small updates are not lost, and the norm is clipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.contract import Sequence
from posttrain.errors import TrainingError
from posttrain.objectives.supervised import sft_ce
from posttrain.policy import LoraOptions, Pack, Policy, fill_packs
from posttrain.policy.weights import base_parameters
from posttrain.training import Learner, Objective, OptimiserOptions, Scored
from tiny_models import sequence, stored, tiny_model

SEQUENCES = [sequence([*range(10, 24), 30 + i, *range(40, 40 + i)], slice(5, None)) for i in range(1, 7)]
TOTAL = float(sum(s.learned for s in SEQUENCES))
STEADY = OptimiserOptions(lr=1e-2, warmup=0.0, floor=1.0)


def learner(options: OptimiserOptions = STEADY, dtype: torch.dtype = torch.float32, steps: int = 10) -> Learner:
    policy = Policy(stored(tiny_model(), dtype))
    policy.add_adapter("main", LoraOptions(rank=4, alpha=8), seed=1)
    return Learner.for_adapter(policy, "main", options, steps)


def cross_entropy(total: float) -> Objective:
    def objective(scored: Scored) -> tuple[Tensor, Mapping[str, Any]]:
        return sft_ce(scored.padded_logprobs(), scored.pack.padded_weights(), normaliser=total)

    return objective


def loss_of(it: Learner, sequences: list[Sequence]) -> float:
    with torch.no_grad():
        return float(cross_entropy(TOTAL)(it.score(Pack.of(sequences)))[0])


def gradients(it: Learner) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in it.parameters.items() if p.grad is not None}


def state(it: Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in it.parameters.items()}


def test_accumulating_over_packs_equals_one_pack() -> None:
    one, many = learner(), learner()
    packs = fill_packs(SEQUENCES, budget=25)
    assert len(packs) > 2
    whole = one.forward_backward([Pack.of(SEQUENCES)], cross_entropy(TOTAL))
    parts = many.forward_backward(packs, cross_entropy(TOTAL))
    assert parts.keys() == whole.keys()
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert parts["tokens"] == whole["tokens"] == TOTAL
    want = gradients(one)
    for name, got in gradients(many).items():
        torch.testing.assert_close(got, want[name], atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_mean_over_all_supervised_tokens_and_not_a_mean_of_means() -> None:
    it = learner()
    metrics = it.forward_backward([Pack.of([s]) for s in SEQUENCES], cross_entropy(TOTAL))
    rows = torch.cat([it.policy.logprobs(Pack.of([s])) for s in SEQUENCES])
    assert metrics["loss"] == pytest.approx(float(-rows.detach().mean()), abs=1e-5)


def test_metrics_are_summed_over_packs() -> None:
    it = learner()

    def count(scored: Scored) -> tuple[Tensor, Mapping[str, Any]]:
        return scored.hidden.sum() * 0, {"rows": len(scored.hidden), "half": torch.tensor(0.5)}

    metrics = it.forward_backward([Pack.of([s]) for s in SEQUENCES], count)
    assert metrics == {"loss": 0.0, "rows": TOTAL, "half": 3.0}
    assert it.tokens_done == sum(len(s) for s in SEQUENCES)


def test_training_lowers_the_loss_and_leaves_the_base_bit_for_bit_as_it_was() -> None:
    it = learner()
    before = {name: p.detach().clone() for name, p in base_parameters(it.policy.model).items()}
    first = loss_of(it, SEQUENCES)
    for _ in range(10):
        it.forward_backward([Pack.of(SEQUENCES)], cross_entropy(TOTAL))
        it.step()
    assert loss_of(it, SEQUENCES) < first - 0.5
    assert all(torch.equal(p, before[name]) for name, p in base_parameters(it.policy.model).items())
    assert all(p.grad is None for p in base_parameters(it.policy.model).values())
    with it.policy.only_base():
        assert float(-it.policy.logprobs(Pack.of(SEQUENCES)).mean()) == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("name", ["1", "mlp"])
def test_an_adapter_called_like_a_part_of_the_model_does_not_train_the_base(name: str) -> None:
    policy = Policy(tiny_model())
    before = {key: p.detach().clone() for key, p in base_parameters(policy.base).items()}
    policy.add_adapter(name, LoraOptions(rank=2), seed=1)
    it = Learner.for_adapter(policy, name, STEADY, 1)
    it.forward_backward([Pack.of(SEQUENCES)], cross_entropy(TOTAL))
    it.step()
    assert all(torch.equal(p, before[key]) for key, p in base_parameters(policy.model).items())


def test_only_the_named_adapter_trains() -> None:
    policy = Policy(tiny_model())
    policy.add_adapter("other", LoraOptions(rank=2), seed=2)
    policy.add_adapter("main", LoraOptions(rank=2), seed=1)
    other = {name: p.detach().clone() for name, p in policy.adapter_parameters("other").items()}
    it = Learner.for_adapter(policy, "main", STEADY, 5)
    for _ in range(2):
        it.forward_backward([Pack.of(SEQUENCES)], cross_entropy(TOTAL))
        it.step()
    assert all(torch.equal(p, other[name]) for name, p in policy.adapter_parameters("other").items())
    assert all(p.grad is None and not p.requires_grad for p in policy.adapter_parameters("other").values())


def test_gradients_are_cleared_by_a_step() -> None:
    it = learner()
    it.forward_backward([Pack.of(SEQUENCES)], cross_entropy(TOTAL))
    assert any(p.grad is not None for p in it.parameters.values())
    it.step()
    assert all(p.grad is None for p in it.parameters.values())
    before = state(it)
    assert it.step()["grad_norm"] == 0.0
    assert all(torch.equal(p, before[name]) for name, p in it.parameters.items())  # a step on nothing moves nothing


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_gradients_that_are_no_numbers_are_refused_before_they_are_written_into_the_weights(broken: float) -> None:
    it = learner()
    it.forward_backward([Pack.of(SEQUENCES)], cross_entropy(TOTAL))
    it.step()
    before = state(it)
    it.forward_backward([Pack.of(SEQUENCES)], lambda scored: (scored.hidden.sum() * broken, {}))
    with pytest.raises(TrainingError, match=r"step 1: .*lower optimiser\.lr, which is 0\.01"):
        it.step()
    assert all(torch.equal(p, before[name]) for name, p in it.parameters.items()) and it.steps_done == 1
    it.forward_backward([Pack.of(SEQUENCES)], cross_entropy(TOTAL))
    assert it.step()["grad_norm"] > 0  # nothing of it is left


def test_updates_too_small_for_bfloat16_add_up_in_the_masters() -> None:
    it = learner(OptimiserOptions(lr=1e-4, warmup=0.0, floor=1.0), torch.bfloat16, 40)
    name = next(name for name in it.parameters if "lora_A" in name)
    start = it.parameters[name].detach().float().clone()
    for _ in range(40):
        for parameter in it.parameters.values():
            parameter.grad = torch.full_like(parameter, 0.01)
        it.step()
    moved = start - it.parameters[name].detach().float()
    assert it.parameters[name].dtype == torch.bfloat16
    big = start.abs() > 0.1  # there one update of 1e-4 is less than half a unit in the last place and would be lost
    assert bool(big.any()) and float(moved[big].mean()) == pytest.approx(40 * 1e-4, rel=0.1)
    assert float(moved.mean()) == pytest.approx(40 * 1e-4, rel=0.05)  # Adam moves lr a step on a constant gradient


def test_a_bfloat16_parameter_is_its_master_rounded() -> None:
    it = learner(dtype=torch.bfloat16)
    for _ in range(3):
        it.forward_backward([Pack.of(SEQUENCES)], cross_entropy(TOTAL))
        it.step()
    for name, parameter in it.parameters.items():
        master = it._masters[name]
        assert master.dtype == torch.float32 and torch.equal(parameter, master.to(torch.bfloat16))


def test_float32_parameters_are_their_own_masters() -> None:
    it = learner()
    assert all(it._masters[name] is parameter for name, parameter in it.parameters.items())


def test_freezing_rounds_to_the_stored_type_and_ends_training() -> None:
    it = learner()
    it.forward_backward([Pack.of(SEQUENCES)], cross_entropy(TOTAL))
    it.step()
    it.freeze()
    for parameter in it.parameters.values():
        assert not parameter.requires_grad
        assert torch.equal(parameter, parameter.to(torch.bfloat16).to(parameter.dtype))


@pytest.mark.parametrize("clip", [0.01, 1e9])
def test_the_norm_is_reported_as_it_was_and_clipped_to_the_limit(clip: float) -> None:
    it = learner(OptimiserOptions(lr=1e-3, clip=clip))
    it.forward_backward([Pack.of(SEQUENCES)], cross_entropy(TOTAL))
    norm = float(torch.cat([g.flatten() for g in gradients(it).values()]).norm())
    assert norm > 0.02
    seen: list[float] = []
    inner = it._optimiser.step

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(float(torch.cat([m.grad.flatten() for m in it._masters.values() if m.grad is not None]).norm()))
        return inner(*args, **kwargs)

    it._optimiser.step = spy  # type: ignore[method-assign]
    assert it.step()["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert seen[0] == pytest.approx(min(norm, clip), rel=1e-3)


def test_each_step_uses_the_schedules_rate() -> None:
    it = learner(OptimiserOptions(lr=1.0, warmup=0.5, floor=0.0), steps=4)
    assert [it.step()["lr"] for _ in range(4)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert it.steps_done == 4


def test_the_update_is_adamw_with_the_given_constants() -> None:
    options = OptimiserOptions(lr=0.1, warmup=0.0, floor=1.0, clip=1e9, beta1=0.8, beta2=0.9, weight_decay=0.3, eps=1e-6)
    it = learner(options)
    name = next(iter(it.parameters))
    parameter = it.parameters[name]
    w, m, v = parameter.detach().clone(), torch.zeros_like(parameter), torch.zeros_like(parameter)
    for step, value in enumerate((0.5, -0.25, 0.1), start=1):
        gradient = torch.full_like(parameter, value)
        parameter.grad = gradient.clone()
        it.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        w = w * (1 - 0.1 * 0.3) - 0.1 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
        torch.testing.assert_close(parameter.detach(), w, atol=1e-6, rtol=1e-5)


def test_the_reference_is_the_base_whatever_the_adapter_has_become() -> None:
    it = learner()
    pack = Pack.of(SEQUENCES)
    ((_, base),) = it.reference_logprobs([pack])
    for _ in range(3):
        it.forward_backward([pack], cross_entropy(TOTAL))
        it.step()
    ((same, again),) = it.reference_logprobs([pack])
    assert same is pack and torch.equal(again, base) and not again.requires_grad
    assert not torch.equal(it.policy.logprobs(pack).detach(), base)


def test_a_function_of_the_logits_sees_them_at_the_predictions_in_chunks() -> None:
    it = learner()
    scored = it.score(Pack.of(SEQUENCES))
    widths: list[int] = []

    def chosen(logits: Tensor, target: Tensor) -> Tensor:
        widths.append(len(logits))
        return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]

    got = scored.tokenwise(chosen, aligned=[scored.pack.targets])
    torch.testing.assert_close(got, scored.logprobs(), atol=1e-5, rtol=0)
    assert max(widths) <= 16 and sum(widths) == TOTAL
    got.sum().backward()
    first = gradients(it)
    for parameter in it.parameters.values():
        parameter.grad = None
    it.score(scored.pack).logprobs().sum().backward()
    for name, want in gradients(it).items():
        torch.testing.assert_close(first[name], want, atol=1e-3, rtol=1e-3)


def test_base_parameters_can_be_trained_too() -> None:
    policy = Policy(tiny_model())
    frozen = policy.base.get_input_embeddings().weight
    parameters = {name: p for name, p in base_parameters(policy.base).items() if p is not frozen}
    it = Learner(policy, parameters, STEADY, 5)
    before = frozen.detach().clone()
    first = loss_of(it, SEQUENCES)
    for _ in range(3):
        it.forward_backward([Pack.of(SEQUENCES)], cross_entropy(TOTAL))
        it.step()
    assert loss_of(it, SEQUENCES) < first and torch.equal(frozen, before)


def test_a_learner_without_parameters_or_steps_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="nothing to train"):
        Learner(Policy(tiny_model()), {}, STEADY, 5)
    with pytest.raises(AssertionError, match="no steps"):
        learner(steps=0)


def test_lora_plus_moves_b_faster_and_a_as_before() -> None:
    plain, plus = learner(), learner(OptimiserOptions(lr=1e-2, warmup=0.0, floor=1.0, lora_plus=4.0))
    before = state(plain)
    for it in (plain, plus):
        it.forward_backward([Pack.of(SEQUENCES)], cross_entropy(TOTAL))
        assert it.step()["lr"] == 1e-2
    after, faster = state(plain), state(plus)
    for name, start in before.items():
        moved, more = after[name] - start, faster[name] - start
        torch.testing.assert_close(more, moved * (4.0 if "lora_B" in name else 1.0), atol=1e-6, rtol=1e-4)
