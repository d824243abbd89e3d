"""What a GPU would refuse, found without one: training, sampling and measuring on a stand-in device give a CPU's numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import killable
import pytest
import torch

import standin
from posttrain.contract import Contract
from posttrain.errors import RecipeError
from posttrain.grammar import GrammarEngine, json_grammar
from posttrain.pipeline.measure import sequence_divergences
from posttrain.pipeline.runtime import Runtime
from posttrain.policy import LoraOptions, Policy
from posttrain.policy.device import find_device
from posttrain.policy.pack import Pack
from posttrain.sampling import LocalSampler, SampleOptions, SampleRequest
from posttrain.stages import Workbench, distill
from posttrain.training import Checkpointer, Learner, OptimiserOptions
from tiny_models import FAMILIES, random_ids, sequence, tiny_model, train_tokenizer


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with standin.device():
        yield


def pair(family: str = "llama", **sizes: int) -> tuple[Policy, Policy]:
    """The same policy on both sides, each with an adapter that does something."""
    policies = Policy(tiny_model(family, **sizes)), Policy(standin.moved(tiny_model(family, **sizes)))
    for policy in policies:
        for name in ("one", "two"):
            policy.add_adapter(name, LoraOptions(rank=4, alpha=8), seed=len(name))
            if policy.device == standin.DEVICE:
                standin.moved(policy.model)  # PEFT moves a second adapter to any device but `meta`
            for parameter in policy.adapter_parameters(name).values():
                parameter.data.add_(0.03 if name == "one" else -0.02)
    return policies


def sequences(count: int = 4) -> list[Any]:
    rng = random.Random(1)
    trunk = random_ids(20, rng)
    return [sequence([*trunk, *random_ids(6 + i, rng)], slice(18, None)) for i in range(count)]


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    there = torch.ones(3).to(standin.DEVICE)
    with pytest.raises(RuntimeError, match="tensors on"):
        _ = there + torch.ones(3)
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        there.numpy()
    assert float((there * 2)[1]) == 2.0 and torch.equal((there + 1).cpu(), torch.full((3,), 2.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_has_a_cpus_log_probabilities_and_gradients(family: str) -> None:
    pack = Pack.of(sequences())
    here, there = pair(family)
    for policy in (here, there):
        for parameter in policy.adapter_parameters("two").values():
            parameter.requires_grad_(True)
        policy.logprobs(pack).sum().backward()
    torch.testing.assert_close(there.logprobs(pack).detach().cpu(), here.logprobs(pack).detach(), atol=1e-4, rtol=1e-4)
    want = here.adapter_parameters("two")
    for name, parameter in there.adapter_parameters("two").items():
        assert parameter.grad is not None and parameter.grad.device == standin.DEVICE
        torch.testing.assert_close(parameter.grad.cpu(), want[name].grad, atol=2e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "kind", [pytest.param("sft", marks=pytest.mark.slow), pytest.param("dpo", marks=pytest.mark.slow), "grpo"]
)
def test_a_stage_trains_as_on_a_cpu_and_its_checkpoint_goes_both_ways(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(killable, "STEPS", 4)  # a stand-in's operations are slow
    here = killable.run(kind, tmp_path / "here")
    there = killable.run(kind, tmp_path / "there", place=standin.moved)
    for name, weight in there.items():
        torch.testing.assert_close(weight.cpu(), here[name], atol=5e-4, rtol=0, msg=name)
    again = killable.run(kind, tmp_path / "there")  # the last checkpoint, read on a CPU: nothing is left to do
    for name, weight in again.items():
        assert torch.equal(weight, there[name].cpu()), name


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_sampler_draws_a_cpus_tokens(family: str) -> None:
    contract = Contract(train_tokenizer())
    here, there = pair(family, vocabulary=contract.vocabulary_size)
    engine = GrammarEngine(contract.tokenizer, contract.vocabulary_size, contract.end_of_turn)
    grammar = json_grammar({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    rng, how = random.Random(2), SampleOptions(max_tokens=12, temperature=0.8, top_p=0.9)
    trunk = tuple(random_ids(24, rng))
    requests = [
        SampleRequest((*trunk, *random_ids(3 + i % 3, rng)), i, how, grammar if i % 2 else None, ("one", "two", None)[i % 3])
        for i in range(7)
    ]
    drawn = [LocalSampler(policy, contract.end_of_turn, engine).sample(requests) for policy in (here, there)]
    assert [sample.ids for sample in drawn[0]] == [sample.ids for sample in drawn[1]]


def test_drift_and_a_student_are_a_cpus(tmp_path: Path) -> None:
    contract = Contract(train_tokenizer())
    taught = sequences(6)
    found = []
    for policy in pair(vocabulary=contract.vocabulary_size):
        runtime = Runtime.of(policy, contract)
        drift = sequence_divergences(runtime, None, "one", taught)
        policy.remove_adapters()
        bench = Workbench(policy, contract, tmp_path / str(policy.device), identity="x", seed=1, pack_tokens=80)
        options = distill.DistillOptions(layers=2, batch=3, epochs=2, optimiser=OptimiserOptions(lr=1e-3))
        student = distill.run(options, taught, bench)
        assert student.device == policy.device
        found.append((drift, student.logprobs(Pack.of(taught)).cpu()))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-4)
    torch.testing.assert_close(found[1][1], found[0][1], atol=5e-2, rtol=1e-2)


@pytest.mark.parametrize("named", ["cuda", "cuda:3", "tpu", "cpu:1", "cuda:x"])
def test_a_device_that_is_not_there_is_refused_by_name(named: str) -> None:
    if named == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RecipeError, match="no such"):
        find_device(named)


def test_the_environment_names_a_device_where_no_recipe_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_DEVICE", "cpu")
    assert find_device() == find_device("auto") == torch.device("cpu")
    monkeypatch.setenv("POSTTRAIN_DEVICE", "cuda:77")
    with pytest.raises(RecipeError, match="no such GPU"):
        find_device()


def test_processes_that_would_share_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 1)
    assert find_device("cuda:0") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="share one GPU"):
        find_device("cuda:0")


def test_a_gpus_random_state_is_in_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner.for_adapter(pair()[0], "one", OptimiserOptions(), 2)
    state, restored = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(Policy, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: restored.append((value, device)))
    writer = Checkpointer(tmp_path, "x")
    learner.save(writer, {"step": 0})
    writer.close()
    learner.resume(tmp_path, "x")
    ((value, device),) = restored
    assert torch.equal(value, state) and device == torch.device("cuda", 0)
    monkeypatch.undo()
    learner.resume(tmp_path, "x")  # on a CPU: nothing to restore there
