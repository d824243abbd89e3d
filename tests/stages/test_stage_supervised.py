"""Stages 1, 2 and 4: the supervised ones. They learn, in a fixed order, and refuse data that would teach the wrong thing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from workshop import FAST, LORA, Shop

from posttrain.contract import Preflight
from posttrain.data.records import Conversation, Message, ToolCall, ToolSpec
from posttrain.errors import DataError, PreflightError
from posttrain.policy import Pack
from posttrain.stages import Workbench, adapters, sft, tools

OPTIONS = sft.SftOptions(batch=4, epochs=5.0, adapter=LORA, optimiser=FAST)
LOOKUP = ToolSpec("lookup", "Reads.", {"type": "object", "properties": {"account": {"type": "string"}}, "required": ["account"]})


def talk(index: int, answer: str = "12.50 is due", tenant: str | None = None) -> Conversation:
    asked = Message("user", f"What is due on account {index}?")
    return Conversation(f"r{index}", (asked, Message("assistant", answer)), tenant=tenant)


RECORDS = [talk(i, f"{i}2.50 is due") for i in range(8)]


def nll(bench: Workbench, records: list[Conversation]) -> float:
    with torch.no_grad():
        return float(-bench.policy.logprobs(Pack.of([bench.contract.render(r) for r in records])).mean())


def test_the_loss_starts_at_the_base_models_and_falls(shop: Shop) -> None:
    bench = shop.bench()
    before = nll(bench, RECORDS)
    assert sft.run(OPTIONS, RECORDS, bench) is None
    losses = shop.notes.of("loss")
    assert len(losses) == 10  # 8 records x 5 epochs / 4
    assert losses[0] == pytest.approx(before, abs=1.0) and losses[-1] < losses[0] * 0.6
    assert nll(bench, RECORDS) < before - 2
    assert all(math.isfinite(value) for _, _, metrics in shop.notes.lines for value in metrics.values())


def test_a_steps_loss_is_the_mean_over_its_supervised_tokens_whatever_the_pack_size(shop: Shop) -> None:
    losses = {}
    for size in (40, 200, 5000):
        bench = shop.bench(f"size{size}", pack_tokens=size)
        shop.notes.lines.clear()
        sft.run(OPTIONS, RECORDS, bench)
        losses[size] = shop.notes.of("loss")
    assert losses[40] == pytest.approx(losses[5000], abs=1e-3)
    assert losses[200] == pytest.approx(losses[5000], abs=1e-3)


def test_only_the_assistants_tokens_are_learned(shop: Shop) -> None:
    bench = shop.bench()
    prompt = bench.contract.prompt_ids(RECORDS[0].messages[:1])
    sequence = bench.contract.render(RECORDS[0])
    sft.run(replace(OPTIONS, epochs=1.0), [RECORDS[0]], bench)
    assert shop.notes.of("tokens") == [float(len(sequence) - len(prompt) - 1)]  # all after the prompt but the last separator


def test_the_same_seed_trains_to_the_same_bits_and_another_does_not(shop: Shop) -> None:
    weights = []
    for run, seed in (("a", 5), ("b", 5), ("c", 6)):
        bench = shop.bench(run, seed=seed)
        sft.run(OPTIONS, RECORDS, bench)
        weights.append(torch.cat([p.flatten() for p in bench.policy.adapter_parameters("main").values()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_what_a_stage_leaves_is_what_a_release_stores(shop: Shop) -> None:
    bench = shop.bench()
    sft.run(OPTIONS, RECORDS, bench)
    for parameter in bench.policy.adapter_parameters("main").values():
        assert torch.equal(parameter, parameter.bfloat16().float()) and not parameter.requires_grad


def test_checking_says_what_will_be_trained_on(shop: Shop) -> None:
    rendered, passed = sft.check(OPTIONS, RECORDS, shop.bench())
    assert passed == Preflight(
        records=8,
        tokens=sum(map(len, rendered)),
        learned=sum(s.learned for s in rendered),
        longest=max(map(len, rendered)),
    )


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (Conversation("mute", (Message("user", "?"), Message("assistant", "!", learn=False))), "zero tokens: mute"),
        (talk(0, "very " * 500), "longer than max_tokens=1024: r0"),
    ],
)
def test_a_record_that_would_train_wrongly_is_refused_before_any_step(shop: Shop, bad: Conversation, says: str) -> None:
    bench = shop.bench()
    with pytest.raises(PreflightError, match=says):
        sft.run(OPTIONS, [*RECORDS, bad], bench)
    assert not shop.notes.lines and bench.policy.adapters == () and not bench.folder.exists()


# -- adapters --------------------------------------------------------------------------------------------------------------

BY_TENANT = {
    "bank_a": [talk(i, "no", "bank_a") for i in range(4)],
    "retail_b": [talk(i, "yes, at once", "retail_b") for i in range(4)],
}


def test_each_tenant_gets_an_adapter_that_says_what_its_own_records_say(shop: Shop) -> None:
    bench = shop.bench()
    assert adapters.run(replace(OPTIONS, epochs=12.0), BY_TENANT, bench) == {"bank_a": None, "retail_b": None}
    assert set(bench.policy.adapters) == {"bank_a", "retail_b"}
    for own, other in (("bank_a", "retail_b"), ("retail_b", "bank_a")):
        bench.policy.use(own)
        assert nll(bench, BY_TENANT[own]) < nll(bench, BY_TENANT[other]) - 1


def test_a_tenants_adapter_does_not_depend_on_who_else_is_trained(shop: Shop) -> None:
    weights = []
    for run, tenants in (("both", ["bank_a", "retail_b"]), ("turned", ["retail_b", "bank_a"]), ("alone", ["retail_b"])):
        bench = shop.bench(run)
        adapters.run(OPTIONS, {tenant: BY_TENANT[tenant] for tenant in tenants}, bench)
        weights.append(torch.cat([p.flatten() for p in bench.policy.adapter_parameters("retail_b").values()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("stranger", [talk(9, "no", "saas_c"), talk(9, "no", None)])
def test_a_strangers_record_in_a_tenants_data_is_refused_before_anyones_training(shop: Shop, stranger: Conversation) -> None:
    bench = shop.bench()
    mixed = {**BY_TENANT, "retail_b": [*BY_TENANT["retail_b"], stranger]}
    with pytest.raises(DataError, match=r"1 record\(s\) of other tenants in the data of retail_b: r9"):
        adapters.run(OPTIONS, mixed, bench)
    assert bench.policy.adapters == () and not shop.notes.lines


def test_one_tenants_unusable_record_stops_the_stage_before_anyones_training(shop: Shop) -> None:
    bench = shop.bench()
    mute = Conversation("mute", (Message("user", "?"), Message("assistant", "!", learn=False)), tenant="retail_b")
    with pytest.raises(PreflightError, match="zero tokens: mute"):
        adapters.run(OPTIONS, {**BY_TENANT, "retail_b": [mute]}, bench)
    assert bench.policy.adapters == () and not shop.notes.lines


# -- tools -----------------------------------------------------------------------------------------------------------------


def trajectory(index: int) -> Conversation:
    call = ToolCall("call_0", "lookup", f'{{"account":"{index}"}}')
    messages = (
        Message("user", f"What is due on {index}?"),
        Message("assistant", "", (call,)),
        Message("tool", f'{{"due":"{index}.00"}}', tool_call_id="call_0"),
        Message("assistant", f"{index}.00"),
    )
    return Conversation(f"t{index}", messages, (LOOKUP,))


def test_calls_and_answers_are_learned_from_trajectories(shop: Shop) -> None:
    bench = shop.bench()
    records = [trajectory(i) for i in range(6)]
    before = nll(bench, records)
    assert tools.run(replace(OPTIONS, epochs=8.0), records, bench) is None
    assert nll(bench, records) < before - 2.5


def test_data_without_a_single_call_is_refused(shop: Shop) -> None:
    with pytest.raises(DataError, match="no record holds a tool call"):
        tools.run(OPTIONS, RECORDS, shop.bench())


def test_one_trajectory_among_plain_records_is_enough(shop: Shop) -> None:
    assert tools.run(replace(OPTIONS, epochs=0.5), [*RECORDS, trajectory(1)], shop.bench()) is None
