"""A pack computes what separate rows compute: log-probabilities and adapter gradients, on five architectures.

The other side of every comparison is a plain transformers forward pass over one row, with transformers' own attention and masks.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from posttrain.contract import Sequence
from posttrain.policy import LoraOptions, Pack, Policy, fill_packs
from posttrain.policy.pack import MIN_SHARED
from tiny_models import FAMILIES, random_ids, sequence, stored, tiny_model

RNG = random.Random(7)
HEAD = random_ids(20, RNG)
LONGER = HEAD + random_ids(12, RNG)
EDGE = random_ids(MIN_SHARED, RNG)


def partly(ids: list[int]) -> Sequence:
    """Learns about half of the tokens, always the last, at uneven weights."""
    rng = random.Random(len(ids))
    made = sequence(ids, [i for i in range(2, len(ids)) if rng.random() < 0.5 or i == len(ids) - 1])
    made.weights[made.weights > 0] = [0.5 + rng.random() for _ in range(made.learned)]
    return made


def fresh(count: int) -> list[int]:
    return random_ids(count, RNG)


CASES: dict[str, list[list[int]]] = {
    "one sequence": [fresh(30)],
    "no shared prefix": [fresh(9), fresh(25), fresh(2)],
    "one shared prefix": [HEAD + fresh(9), HEAD + fresh(3), HEAD + fresh(15)],
    "nested prefixes": [LONGER + fresh(4), HEAD + fresh(9), LONGER + fresh(7), LONGER + fresh(1), fresh(30)],
    "identical sequences": [LONGER, LONGER, HEAD + [5] * 6, LONGER],
    "one a prefix of another": [[*LONGER, 1, 2, 3], HEAD, LONGER, [*LONGER, 1, 2, 3, *fresh(5)]],
    "prefix one short of a node": [[*EDGE[:-1], 5, 6, 7], [*EDGE[:-1], 8, 9, 10]],
    "prefix just a node": [[*EDGE, 5, 6, 7], [*EDGE, 8, 9, 10]],
    "longer than the window": [HEAD * 2 + fresh(9), HEAD * 2 + fresh(30)],
}


def plain_rows(model: Any, sequences: list[Sequence]) -> Tensor:
    """log pi(target) of every learned token, row by row, without any pack."""
    parts = []
    for made in sequences:
        logprobs = model(torch.tensor(made.ids[None].astype("int64"))).logits[0].float().log_softmax(-1)
        learned = torch.from_numpy(made.weights > 0).nonzero()[:, 0]
        parts.append(logprobs[learned - 1, torch.from_numpy(made.ids.astype("int64"))[learned]])
    return torch.cat(parts)


def randomise(parameters: dict[str, torch.nn.Parameter], seed: int = 3) -> None:
    """B starts at zero, and then A gets no gradient: give every adapter matrix values."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(parameters.items()):
        parameter.data.normal_(0.0, 0.1, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_log_probabilities_equal_those_of_separate_rows(family: str) -> None:
    plain, policy = tiny_model(family), Policy(tiny_model(family))
    with torch.no_grad():
        for name, rows in CASES.items():
            sequences = [partly(ids) for ids in rows]
            got, want = policy.logprobs(Pack.of(sequences)), plain_rows(plain, sequences)
            torch.testing.assert_close(got, want, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_adapter_gradients_equal_those_of_separate_rows(family: str) -> None:
    policy = Policy(tiny_model(family))
    policy.add_adapter("main", LoraOptions(rank=4, alpha=8), seed=0)
    parameters = policy.adapter_parameters("main")
    randomise(parameters)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = get_peft_model(tiny_model(family), config, adapter_name="main")
    twins = {name: p for name, p in reference.named_parameters() if "lora_" in name}
    assert twins.keys() == parameters.keys()
    for name, parameter in parameters.items():
        twins[name].data.copy_(parameter.data)
        parameter.requires_grad_(True)
    for name, rows in CASES.items():
        sequences = [partly(ids) for ids in rows]
        pack = Pack.of(sequences)
        (policy.logprobs(pack) * pack.weights).sum().backward()
        (plain_rows(reference, sequences) * pack.weights).sum().backward()
        for key, parameter in parameters.items():
            got, want = parameter.grad, twins[key].grad
            assert got is not None and want is not None
            scale = float(want.abs().max())
            torch.testing.assert_close(
                got, want, atol=2e-4 * scale + 1e-6, rtol=0, msg=lambda text, where=(name, key): f"{where}: {text}"
            )
            parameter.grad = twins[key].grad = None


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_several_packs_compute_what_one_pack_computes(family: str) -> None:
    policy = Policy(tiny_model(family))
    sequences = [partly(ids) for rows in CASES.values() for ids in rows]
    whole = Pack.of(sequences)
    want = whole.pad(policy.logprobs(whole))
    packs = fill_packs(sequences, budget=90)
    assert len(packs) > 3
    for pack in packs:
        got = pack.pad(policy.logprobs(pack))
        for row, member in enumerate(pack.members):
            torch.testing.assert_close(got[row], want[member, : got.shape[1]], atol=2e-5, rtol=0)


def test_the_order_of_sequences_in_a_pack_changes_nothing() -> None:
    policy = Policy(tiny_model())
    sequences = [partly(ids) for ids in CASES["nested prefixes"]]
    forward, backward = Pack.of(sequences), Pack.of(sequences[::-1])
    torch.testing.assert_close(
        forward.pad(policy.logprobs(forward)), backward.pad(policy.logprobs(backward)).flip(0), atol=2e-5, rtol=0
    )


def test_a_sequence_does_not_see_its_neighbours_tokens() -> None:
    policy = Policy(tiny_model())
    one = Pack.of([partly(HEAD + [5] * 9), partly(HEAD + [7] * 9)])
    other = Pack.of([partly(HEAD + [5] * 9), partly(HEAD + [80] * 9)])
    torch.testing.assert_close(one.pad(policy.logprobs(one))[0], other.pad(policy.logprobs(other))[0], atol=0, rtol=0)
    assert not torch.equal(one.pad(policy.logprobs(one))[1], other.pad(policy.logprobs(other))[1])


def test_hidden_states_at_the_ends_are_those_of_each_row_alone() -> None:
    policy = Policy(tiny_model())
    sequences = [partly(ids) for ids in CASES["one a prefix of another"]]
    pack = Pack.of(sequences)
    hidden = policy.hidden(pack)
    for b, made in enumerate(sequences):
        alone = policy.hidden(Pack.of([made]))
        torch.testing.assert_close(hidden[pack.ends[b]], alone[-1], atol=2e-5, rtol=0)
        torch.testing.assert_close(hidden[pack.sequence_rows(b)], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_rounds_a_pack_up_is_seen_by_nothing(family: str) -> None:
    policy = Policy(tiny_model(family))
    pack = Pack.of([partly(ids) for ids in CASES["longer than the window"]])
    with torch.no_grad():
        torch.testing.assert_close(policy.hidden(pack.rounded(64))[: pack.tokens], policy.hidden(pack), atol=2e-5, rtol=0)


def test_states_are_those_of_the_packs_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, pack, passed = Policy(tiny_model()), Pack.of([partly(ids) for ids in CASES["nested prefixes"]]), []
    monkeypatch.setattr(policy, "forward", lambda ids, *rest: passed.append(len(ids)) or Policy.forward(policy, ids, *rest))
    hidden, (state,) = policy.states(pack, [0])
    assert passed == [64 * -(-pack.tokens // 64)] and passed[0] > pack.tokens
    assert len(hidden) == len(state) == pack.tokens


def test_the_sink_receives_the_keys_and_values_of_every_layer() -> None:
    policy = Policy(tiny_model())
    pack = Pack.of([partly(ids) for ids in CASES["one shared prefix"]])
    sink: dict[int, tuple[Tensor, Tensor]] = {}
    policy.hidden(pack, sink)
    assert sorted(sink) == [0, 1, 2]
    assert all(k.shape == v.shape == (1, 2, pack.tokens, 8) for k, v in sink.values())


def test_packing_in_bfloat16_stays_within_its_rounding_of_the_rows() -> None:
    policy, plain = Policy(stored(tiny_model(), torch.bfloat16)), stored(tiny_model(), torch.bfloat16)
    sequences = [partly(ids) for ids in CASES["nested prefixes"]]
    with torch.no_grad():
        got, want = policy.logprobs(Pack.of(sequences)), plain_rows(plain, sequences)
    assert got.dtype == torch.float32
    assert float((got - want).abs().mean()) < 0.03


@pytest.mark.parametrize("family", FAMILIES)
def test_states_after_the_last_block_are_the_hidden_states_before_the_final_norm(family: str) -> None:
    policy = Policy(tiny_model(family))
    pack = Pack.of([sequence(ids, [len(ids) - 1]) for ids in CASES["nested prefixes"]])
    last = policy.config.get_text_config().num_hidden_layers - 1
    with torch.no_grad():
        hidden, (before, after) = policy.states(pack, [0, last])
        plain = policy.hidden(pack)
        torch.testing.assert_close(hidden, plain, atol=2e-5, rtol=0)
        assert torch.allclose(policy.base.base_model.norm(after), plain, atol=1e-6) and not torch.allclose(before, after)
    assert not any(block._forward_hooks for block in policy.base.base_model.layers)
