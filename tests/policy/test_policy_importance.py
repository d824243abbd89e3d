"""Which layers a model can do without: against a plain model that lacks the layer, and the choice among them."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from posttrain.errors import BaseModelError
from posttrain.policy import Pack, Policy, cut_layers
from posttrain.policy.importance import layer_importance, most_important
from posttrain.policy.refit import fit_layer
from tiny_models import SIZES, random_ids, sequence, tiny_model

RNG = random.Random(5)
PACK = Pack.of([sequence(ids, [3, len(ids) - 1]) for ids in (random_ids(12, RNG) for _ in range(4))])


@torch.no_grad()
def divergence(policy: Policy, other: Policy) -> float:
    """KL(policy || other) over plain full logits."""
    logs = [p.head.logits(p.hidden(PACK)[PACK.rows]).log_softmax(-1) for p in (policy, other)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layers_importance_is_the_divergence_of_the_model_that_lacks_it(family: str) -> None:
    policy = Policy(tiny_model(family))
    before = policy.hidden(PACK)
    found = layer_importance(policy, PACK)
    assert torch.equal(policy.hidden(PACK), before)
    without = [Policy(cut_layers(policy.base, keep)) for keep in ((1, 2), (0, 2), (0, 1))]
    assert found == pytest.approx([divergence(policy, student) for student in without], rel=1e-3)
    assert not any(layer._forward_hooks for layer in policy.base.base_model.layers)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_after_a_fit_it_is_the_divergence_of_a_model_whose_next_layer_was_fitted(family: str) -> None:
    policy = Policy(tiny_model(family))
    before = policy.fingerprint
    found = layer_importance(policy, PACK, ridge=0.1)
    policy._fingerprint = None
    assert policy.fingerprint == before
    assert not any(layer._forward_hooks or layer.mlp._forward_hooks for layer in policy.base.base_model.layers)
    _, states = policy.states(PACK, (1, 2))
    wanted = []
    for kept, place, state in (((1, 2), 0, states[0]), ((0, 2), 1, states[1]), ((0, 1), 1, states[1])):
        student = Policy(cut_layers(policy.base, kept))
        hooks = fit_layer(student.base.base_model.layers[place], state, 0.1)
        student.hidden(PACK)
        for hook in hooks:
            hook.remove()
        wanted.append(divergence(policy, student))
    assert found == pytest.approx(wanted, rel=1e-3)
    assert all(fit < skip for fit, skip in zip(found, layer_importance(policy, PACK), strict=True))


def test_layers_that_cannot_be_fitted_are_refused_before_anything_is_computed() -> None:
    policy = Policy(tiny_model("gemma3"))
    with pytest.raises(BaseModelError, match="cannot be refitted"):
        layer_importance(policy, PACK, ridge=0.1)
    assert len(layer_importance(policy, PACK)) == len(policy.base.base_model.layers)


@torch.no_grad()
def test_layers_that_share_keys_and_values_are_judged_with_those_they_have_them_from() -> None:
    own = {"head_dim": 8, "global_head_dim": 8, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8}
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma4TextConfig(
        **{**SIZES, "vocab_size": 97, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": kinds, **own}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(AutoModelForCausalLM.from_config(config).float().eval())
    assert policy.packs and min(layer_importance(policy, PACK)) > 1e-3


def test_neighbours_of_which_each_was_fitted_to_do_without_the_other_go_together() -> None:
    importance = [9.0, 0.1, 0.2, 0.3, 5.0, 0.4]
    assert most_important(importance, 4, apart=False) == (0, 3, 4, 5)
    assert most_important(importance, 2, apart=False) == (0, 4)


def test_what_comes_before_a_layer_is_computed_once_for_all() -> None:
    policy = Policy(tiny_model())
    passes = [0, 0, 0]
    for place, layer in enumerate(policy.base.base_model.layers):

        def count(*inputs: object, place: int = place) -> None:
            passes[place] += 1

        layer.mlp.register_forward_hook(count)
    layer_importance(policy, PACK)
    assert passes == [2, 3, 4]  # the whole, and without each layer up to itself, whose own output is thrown away


def test_a_layer_that_adds_nothing_is_the_first_to_go() -> None:
    policy = Policy(tiny_model())
    layer = policy.base.base_model.layers[1]
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        projection.weight.data.zero_()
    found = layer_importance(policy, PACK)
    assert found[1] == pytest.approx(0.0, abs=1e-6) and min(found[0], found[2]) > 1e-4
    assert most_important(found, 2) == (0, 2)


def test_neighbours_go_together_only_when_nothing_else_is_left() -> None:
    importance = [9.0, 0.1, 0.2, 0.3, 5.0, 0.4]
    assert most_important(importance, 4) == (0, 2, 4, 5)  # 1 and 3; 2 stands between them
    assert most_important(importance, 3) == (0, 2, 4)  # and 5
    assert most_important(importance, 2) == (0, 4)  # now 2 as well


def test_a_dear_layer_stays_though_cheap_neighbours_must_go_together() -> None:
    assert most_important([0.1, 0.1, 0.1, 0.1, 5.0, 5.0, 9.0], 4) == (3, 4, 5, 6)
    assert most_important([9.0, 0.1, 0.1, 0.1, 0.15, 9.0], 4) == (0, 2, 4, 5)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40), st.data())
def test_as_many_layers_as_asked_stay_in_their_order(importance: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(importance)))
    kept = most_important(importance, count)
    assert len(kept) == count and list(kept) == sorted(set(kept)) and set(kept) <= set(range(len(importance)))
