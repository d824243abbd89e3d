"""The whole road with a real, tiny, untrained model: contract, grammar, sampler, adapters. Noise in, valid JSON out."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import openai
import pytest
import torch
from release_making import Made
from serving_house import House, running
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.contract import Contract
from posttrain.grammar import GrammarEngine
from posttrain.policy import LoraOptions, Policy
from posttrain.releases import Parent, Release
from posttrain.sampling import LocalSampler
from posttrain.serving import ContractEngine, Router
from posttrain.serving.keys import AccessFile

SCHEMA = {
    "type": "object",
    "properties": {"decision": {"enum": ["answer", "refuse"]}, "ok": {"type": "boolean"}},
    "required": ["decision", "ok"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "cash",
        "parameters": {
            "type": "object",
            "properties": {"year": {"enum": [2025, 2026]}},
            "required": ["year"],
            "additionalProperties": False,
        },
    },
}


def tiny_contract() -> Contract:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["system user assistant tool decision answer"], trainer)
    return Contract(PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>"))


class TinyModel:
    """ServingModel over a real policy: one adapter per release, with different weights each."""

    def __init__(self, policy: Policy, contract: Contract) -> None:
        self.policy, self.weights, self.contract = policy, policy.fingerprint, contract.lock().fingerprint

    def adapter_for(self, release_id: str) -> str | None:
        name = release_id.replace("-", "_")
        if name not in self.policy.adapters:
            self.policy.add_adapter(name, LoraOptions(rank=2), seed=len(self.policy.adapters))
            with torch.no_grad():
                for parameter in self.policy.adapter_parameters(name).values():
                    parameter.normal_(generator=torch.Generator().manual_seed(int(name[2:], 16) % 2**31))
        return name


def tiny_policy() -> Policy:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=1024,
    )  # fmt: skip
    return Policy(LlamaForCausalLM(config))


def test_a_release_of_a_real_adapter_loads_with_peft_and_with_its_own_contract(tmp_path: Path) -> None:
    policy, contract, folder = tiny_policy(), tiny_contract(), tmp_path / "stage"
    model = TinyModel(policy, contract)
    name = model.adapter_for("r-00000001")
    policy.save_adapter(str(name), folder, "tiny")
    contract.save(folder)
    parts = Made(tmp_path / "w", parent=Parent(policy.fingerprint)).parts()
    release = Release.build(tmp_path / "releases", replace(parts, weights=folder))
    assert release.contract == Contract.load(release.folder).lock()
    again = tiny_policy()
    again.load_adapter("again", release.folder, expected_parent=release.runs_on)
    loaded, saved = again.adapter_parameters("again"), policy.adapter_parameters(str(name))
    assert len(loaded) == len(saved) > 0
    for key, value in saved.items():
        torch.testing.assert_close(loaded[key.replace(str(name), "again")], value.to(torch.bfloat16).to(value.dtype))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    policy, contract = tiny_policy(), tiny_contract()
    house = House(tmp_path_factory.mktemp("real"), base=policy.fingerprint, lock=contract.lock())
    sampler = LocalSampler(policy, contract.end_of_turn, GrammarEngine(contract.tokenizer, 288, contract.end_of_turn))
    house.router = Router(house.channels, AccessFile(house.access), TinyModel(policy, contract))
    house.engine = ContractEngine(contract, sampler, context=1024)  # type: ignore[assignment]
    with running(house):
        yield house


def test_an_untrained_model_still_answers_in_valid_json(real: House) -> None:
    for seed in range(3):
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
        choice = real.say("Cash?", response_format=form, seed=seed, temperature=1.0, max_tokens=200).choices[0]
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content or "")
        assert set(value) == {"decision", "ok"}


def test_plain_text_holds_no_special_token_however_hot_it_is_drawn(real: House) -> None:
    for seed in range(12):
        choice = real.say("Cash?", seed=seed, temperature=2.0, max_tokens=40).choices[0]
        assert choice.message.content and "<|" not in choice.message.content


def test_an_untrained_model_calls_tools_by_their_schema_or_answers(real: House) -> None:
    finishes = set()
    for seed in range(12):
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
        choice = real.say("Cash?", tools=[TOOL], response_format=form, seed=seed, temperature=1.5, max_tokens=300).choices[0]
        finishes.add(choice.finish_reason)
        for call in choice.message.tool_calls or []:
            assert call.function.name == "cash"
            assert json.loads(call.function.arguments)["year"] in (2025, 2026)
    assert finishes == {"stop", "tool_calls"}


def test_each_tenants_adapter_says_its_own_thing_also_when_they_share_a_batch(real: House) -> None:
    alone = {tenant: real.say("Hello", tenant, max_tokens=24).choices[0].message.content for tenant in real.keys}
    assert alone["bank_A"] != alone["retail_B"]
    together: dict[str, str | None] = {}

    def say(tenant: str) -> None:
        together[tenant] = real.say("Hello", tenant, max_tokens=24).choices[0].message.content

    threads = [threading.Thread(target=say, args=(tenant,)) for tenant in real.keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_clients_that_come_and_go_get_what_they_get_alone(real: House) -> None:
    """Staggered requests of two tenants, of different lengths, with and without a schema, some of which hang up."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    asked: list[tuple[str, dict[str, object]]] = [
        (
            tenant,
            {"max_tokens": 8 * (n % 5 + 1), "temperature": 1.0, "seed": n, **({"response_format": form} if n % 3 == 0 else {})},
        )
        for n, tenant in enumerate(["bank_A", "retail_B"] * 5)
    ]

    def say(n: int) -> str | None:
        tenant, how = asked[n]
        return real.say(f"Question {n % 3}: what is due?", tenant, **how).choices[0].message.content

    alone = [say(n) for n in range(len(asked))]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            futures = []
            for n in range(len(asked)):
                futures.append(pool.submit(say, n))
                time.sleep(0.01)
                if n % 3 == 0:
                    with real.client() as client, pytest.raises(openai.APITimeoutError):
                        client.with_options(timeout=0.005, max_retries=0).chat.completions.create(
                            model="bank_A", messages=[{"role": "user", "content": "gone"}], max_tokens=900
                        )
            assert [future.result() for future in futures] == alone


def test_a_budget_that_cuts_json_is_a_length_stop(real: House) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    choice = real.say("Cash?", response_format=form, max_tokens=5).choices[0]
    assert choice.finish_reason == "length"
    assert (choice.message.content or "").startswith("{")


def test_json_that_a_budget_would_cut_is_closed_and_still_a_length_stop(real: House) -> None:
    schema = {
        "type": "object",
        "properties": {"note": {"type": "string", "minLength": 1}, "tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["note", "tags"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    found = [real.say(f"Cash {n}?", response_format=form, max_tokens=40, temperature=1.0, seed=n).choices[0] for n in range(6)]
    cut = [choice for choice in found if choice.finish_reason == "length"]
    assert cut
    for choice in cut:
        assert set(json.loads(choice.message.content or "")) == {"note", "tags"}


def test_a_schema_that_cannot_be_enforced_reaches_the_client_with_its_keyword(real: House, tmp_path: Path) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        real.say(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})
