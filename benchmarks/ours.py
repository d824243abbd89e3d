"""posttrain's side of every work: its own policy, learner and sampler, as its stages use them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.prompts import prompts_of
from benchmarks.side import Step, Turns
from posttrain.contract import Contract
from posttrain.contract import Sequence as Rendered
from posttrain.data.records import StopReason
from posttrain.grammar import GrammarEngine, json_grammar
from posttrain.pipeline.runtime import parse_dtype, prepare_process
from posttrain.policy import LoraOptions, Policy, fill_packs
from posttrain.policy.device import find_device
from posttrain.sampling import LocalSampler, Sample, SampleOptions, SampleRequest
from posttrain.stages import policy_gradient, preference
from posttrain.stages.bench import learned_weight
from posttrain.stages.sft import token_cross_entropy
from posttrain.training import Learner, OptimiserOptions

Material = dict[str, Any]
Options = dict[str, Any]


def sft(material: Material, turns: Turns, options: Options) -> None:
    """Masked cross-entropy on LoRA, one update a turn."""
    learner = _learner(material, options)
    records = [_rendered(**record) for record in material[options["records"]]]

    def steps() -> Iterator[Step]:
        for chosen in _batches(records, options["batch"]):
            packs = fill_packs(chosen, options["pack_tokens"])
            metrics = learner.forward_backward(packs, token_cross_entropy(learned_weight(chosen)))
            learner.step()
            yield {"loss": metrics["loss"], "tokens": float(sum(len(s) for s in chosen))}

    turns.serve(steps())


def dpo(material: Material, turns: Turns, options: Options) -> None:
    """DPO with the reference computed in the step, one update a turn."""
    learner, contract = _learner(material, options), Contract.load(Path(material["base"]))
    pairs = [_pair(contract, **pair) for pair in material["pairs"]]
    settings = preference.PreferenceOptions(batch=options["batch"], beta=options["beta"])

    def steps() -> Iterator[Step]:
        for chosen in _batches(pairs, options["batch"]):
            sides = [side for pair in chosen for side in pair]
            work = preference.work_of(settings, sides, learner, options["pack_tokens"])
            metrics = learner.forward_backward(work.packs, work.objective)
            learner.step()
            yield {"loss": metrics["loss"], "tokens": float(sum(len(s) for s in sides))}

    turns.serve(steps())


def grpo(material: Material, turns: Turns, options: Options) -> None:
    """Sample a group of answers a prompt, reward them, update once: one step a turn."""
    learner = _learner(material, options)
    sampler = LocalSampler(learner.policy, end_of_turn=-1)  # no token ends an answer: all have the full length
    tokenizer = Contract.load(Path(material["base"])).tokenizer
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in material["prompts"]]
    how = SampleOptions(max_tokens=options["max_tokens"], temperature=1.0)
    settings = policy_gradient.GrpoOptions(group=options["group"])

    def steps() -> Iterator[Step]:
        for step, chosen in enumerate(_batches(prompts, options["prompts"])):
            requests = [
                SampleRequest(prompt, seed=1000 * step + i, options=how, adapter="main")
                for i, prompt in enumerate(p for p in chosen for _ in range(options["group"]))
            ]
            samples = sampler.sample(requests)
            rewards = torch.tensor([len(set(sample.ids)) / len(sample.ids) for sample in samples])
            advantages = policy_gradient.advantages_of(settings, rewards)
            sequences = [_answered(r.prompt, s) for r, s in zip(requests, samples, strict=True)]
            old = [torch.tensor(s.logprobs) for s in samples]
            own, size = torch.zeros(len(samples)), policy_gradient.StepSize(len(samples), float(sum(map(len, old))))
            work = policy_gradient.work_of(settings, sequences, old, advantages, own, learner, options["pack_tokens"], size)
            metrics = learner.forward_backward(work.packs, work.objective)
            learner.step()
            yield {"loss": metrics["loss"], "tokens": float(sum(len(s.ids) for s in samples))}

    turns.serve(steps())


def generate(material: Material, turns: Turns, options: Options) -> None:
    """`batch` prompts of `prompt` tokens each (one prompt for all with `shared`), `new` tokens after each, temperature 1."""
    prepare_process(None)
    policy = Policy.load(Path(material["base"]), parse_dtype(material["dtype"]), find_device())
    contract = Contract.load(Path(material["base"]))
    engine = GrammarEngine(contract.tokenizer, policy.head.vocabulary, contract.end_of_turn)
    sampler = LocalSampler(policy, -1 if not options.get("grammar") else contract.end_of_turn, engine)
    grammar = json_grammar(_LONG) if options.get("grammar") else None
    how = SampleOptions(max_tokens=options["new"], temperature=1.0)

    def steps() -> Iterator[Step]:
        for turn in range(1_000_000):
            requests = [
                SampleRequest(tuple(prompt), seed=turn * 1000 + i, options=how, grammar=grammar)
                for i, prompt in enumerate(prompts_of(material, options, turn))
            ]
            samples = sampler.sample(requests)
            assert all(s.stop is StopReason.LENGTH for s in samples)
            yield {"tokens": float(sum(len(s.ids) for s in samples))}

    turns.serve(steps())


# an answer that cannot end within the tokens of a turn, and in which little is forced
_LONG = {"type": "object", "properties": {"answer": {"type": "string", "minLength": 4000}}, "required": ["answer"]}


def _learner(material: Material, options: Options) -> Learner:
    prepare_process(None)
    policy = Policy.load(Path(material["base"]), parse_dtype(material["dtype"]), find_device())
    policy.add_adapter(
        "main", LoraOptions(rank=options["rank"], alpha=2.0 * options["rank"], base=options.get("base", "dense")), seed=0
    )
    return Learner.for_adapter(policy, "main", OptimiserOptions(lr=options["lr"], warmup=0.0), 1000)


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items) - size + 1, size):
        yield items[start : start + size]


def _rendered(ids: list[int], learned: list[int]) -> Rendered:
    return Rendered(np.array(ids, np.int32), np.array(learned, np.float32), np.zeros(len(ids), np.int16))


def _pair(contract: Contract, prompt: str, chosen: str, rejected: str) -> tuple[Rendered, Rendered]:
    start = contract.tokenizer(prompt)["input_ids"]
    sides = []
    for text in (chosen, rejected):
        ids = [*contract.tokenizer(prompt + text)["input_ids"], contract.end_of_turn]
        sides.append(_rendered(ids, [0] * len(start) + [1] * (len(ids) - len(start))))
    return sides[0], sides[1]


def _answered(prompt: tuple[int, ...], sample: Sample) -> Rendered:
    return _rendered([*prompt, *sample.ids], [0] * len(prompt) + [1] * len(sample.ids))
