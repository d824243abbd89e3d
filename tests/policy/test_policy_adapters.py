"""Adapters: they start as the base, come off exactly, travel as PEFT folders, and refuse a parent that is not theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from posttrain.errors import BaseModelError, BindingError
from posttrain.policy import LoraOptions, Pack, Policy
from tiny_models import FAMILIES, sequence, stored, tiny_model

PACK = Pack.of([sequence([*range(10, 30), 5, 6]), sequence([*range(10, 30), 7])])


def randomise(policy: Policy, name: str, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(policy.adapter_parameters(name).items()):
        parameter.data.normal_(0.0, 0.1, generator=generator)


@torch.no_grad()
def logprobs(policy: Policy) -> Tensor:
    return policy.logprobs(PACK)


@pytest.fixture
def policy() -> Policy:
    return Policy(tiny_model())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_equals_its_base_bit_for_bit(family: str) -> None:
    policy = Policy(tiny_model(family))
    before = logprobs(policy)
    policy.add_adapter("main", LoraOptions(rank=4), seed=1)
    assert torch.equal(logprobs(policy), before)


def test_a_fresh_adapter_equals_its_base_bit_for_bit_in_bfloat16() -> None:
    policy = Policy(stored(tiny_model(), torch.bfloat16))
    before = logprobs(policy)
    policy.add_adapter("main", LoraOptions(rank=4), seed=1)
    assert torch.equal(logprobs(policy), before)
    assert {p.dtype for p in policy.adapter_parameters("main").values()} == {torch.bfloat16}


def test_the_adapter_covers_every_linear_layer_but_the_head(policy: Policy) -> None:
    policy.add_adapter("main", LoraOptions(rank=4), seed=1)
    names = policy.adapter_parameters("main")
    assert len(names) == 3 * 7 * 2  # layers x projections x (A, B)
    assert not any("lm_head" in name or "embed" in name for name in names)
    assert policy.adapters == ("main",)


@pytest.mark.parametrize("before", [[], ["other"]])
def test_an_adapter_of_the_top_blocks_leaves_the_lower_ones_alone(policy: Policy, before: list[str], tmp_path: Path) -> None:
    for name in before:
        policy.add_adapter(name, LoraOptions(rank=2), seed=1)
    policy.add_adapter("main", LoraOptions(rank=4, top=1), seed=1)
    names = policy.adapter_parameters("main")
    assert len(names) == 7 * 2 and all(".layers.2." in name for name in names)
    randomise(policy, "main")
    policy.save_adapter("main", tmp_path / "a", "base")
    other = Policy(tiny_model())
    other.load_adapter("main", tmp_path / "a")
    torch.testing.assert_close(logprobs(other), logprobs(policy), atol=2e-2, rtol=0)


def test_a_shallower_model_than_the_top_is_adapted_as_a_whole(policy: Policy) -> None:
    policy.add_adapter("main", LoraOptions(rank=4, top=20), seed=1)
    assert len(policy.adapter_parameters("main")) == 7 * 2 * 3


def test_named_targets_limit_the_adapter(policy: Policy) -> None:
    policy.add_adapter("main", LoraOptions(rank=2, targets=("q_proj", "v_proj")), seed=1)
    assert len(policy.adapter_parameters("main")) == 3 * 2 * 2


def test_the_seed_decides_the_adapters_start_and_leaves_the_global_generator_alone() -> None:
    def start(seed: int) -> dict[str, Tensor]:
        policy = Policy(tiny_model())
        policy.add_adapter("main", LoraOptions(rank=2), seed)
        return dict(policy.adapter_parameters("main"))

    state = torch.get_rng_state()
    first, again, other = start(1), start(1), start(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_everything_is_frozen_until_a_learner_says_otherwise(policy: Policy) -> None:
    policy.add_adapter("main", LoraOptions(rank=2), seed=1)
    assert not any(p.requires_grad for p in policy.model.parameters())


def test_only_base_gives_the_numbers_from_before_the_adapter_and_no_gradient(policy: Policy) -> None:
    before = logprobs(policy)
    policy.add_adapter("main", LoraOptions(rank=4), seed=1)
    randomise(policy, "main")
    for parameter in policy.adapter_parameters("main").values():
        parameter.requires_grad_(True)
    adapted = policy.logprobs(PACK)
    with policy.only_base():
        reference = policy.logprobs(PACK)
    assert torch.equal(reference, before) and not reference.requires_grad
    assert float((adapted.detach() - before).abs().max()) > 1e-2 and adapted.requires_grad
    assert torch.equal(policy.logprobs(PACK), adapted)
    assert all(p.requires_grad for p in policy.adapter_parameters("main").values())


def test_only_base_is_left_again_when_its_block_raises(policy: Policy) -> None:
    policy.add_adapter("main", LoraOptions(rank=4), seed=1)
    randomise(policy, "main")
    adapted = logprobs(policy)
    with pytest.raises(RuntimeError, match="stop"), policy.only_base():
        raise RuntimeError("stop")
    assert torch.equal(logprobs(policy), adapted)


def test_only_base_without_adapters_and_while_none_is_active_is_the_base(policy: Policy) -> None:
    before = logprobs(policy)
    with policy.only_base():
        assert torch.equal(policy.logprobs(PACK), before)
    policy.add_adapter("main", LoraOptions(rank=4), seed=1)
    randomise(policy, "main")
    policy.use(None)
    with policy.only_base():
        assert torch.equal(policy.logprobs(PACK), before)
    assert torch.equal(logprobs(policy), before)


def test_adapters_are_switched_by_name_and_do_not_add_up(policy: Policy) -> None:
    base = logprobs(policy)
    seen: dict[str | None, Tensor] = {None: base}
    for seed, name in enumerate(("bank_a", "retail_b")):
        policy.add_adapter(name, LoraOptions(rank=4), seed)
        randomise(policy, name, seed)
        seen[name] = logprobs(policy)  # a new adapter is the active one
    for name in ("bank_a", None, "retail_b", "bank_a"):
        policy.use(name)
        assert torch.equal(logprobs(policy), seen[name])
    assert not torch.equal(seen["bank_a"], seen["retail_b"])


def test_using_an_adapter_changes_nobodys_requires_grad(policy: Policy) -> None:
    policy.add_adapter("a", LoraOptions(rank=2), 1)
    policy.add_adapter("b", LoraOptions(rank=2), 2)
    for parameter in policy.adapter_parameters("a").values():
        parameter.requires_grad_(True)
    before = {name: p.requires_grad for name, p in policy.model.named_parameters()}
    for name in ("b", None, "a", "b"):
        policy.use(name)
        assert {key: p.requires_grad for key, p in policy.model.named_parameters()} == before


def test_one_adapters_name_inside_anothers_does_not_mix_their_parameters(policy: Policy) -> None:
    policy.add_adapter("bank", LoraOptions(rank=2), 1)
    policy.add_adapter("bank_a", LoraOptions(rank=3), 2)
    assert {p.shape[0] for name, p in policy.adapter_parameters("bank").items() if "lora_A" in name} == {2}
    assert {p.shape[0] for name, p in policy.adapter_parameters("bank_a").items() if "lora_A" in name} == {3}


def test_an_adapter_called_like_a_part_of_the_model_holds_its_own_parameters_only(policy: Policy, tmp_path: Path) -> None:
    names = ("1", "2", "mlp", "q_proj", "lora_A", "weight")
    seen = {}
    for seed, name in enumerate(names):
        policy.add_adapter(name, LoraOptions(rank=2), seed)
        for parameter in policy.adapter_parameters(name).values():
            parameter.data.copy_(torch.randn_like(parameter).bfloat16() / 8)
        seen[name] = logprobs(policy)
    for name in names:
        own = policy.adapter_parameters(name)
        assert len(own) == 3 * 7 * 2 and all(f".lora_{side}.{name}." in key for key, side in zip(own, "AB" * 21, strict=True))
        policy.save_adapter(name, tmp_path / name, "owner/base")  # beside all the others
        fresh = Policy(tiny_model())
        fresh.load_adapter(name, tmp_path / name, policy.fingerprint)
        assert torch.equal(logprobs(fresh), seen[name]), name


@pytest.mark.parametrize("name", ["", "acme.com", "forward"])
def test_a_name_that_no_adapter_can_have_is_refused(policy: Policy, name: str, tmp_path: Path) -> None:
    with pytest.raises(BindingError, match="no adapter can have this name"):
        policy.add_adapter(name, LoraOptions(rank=2), 1)
    with pytest.raises(BindingError, match="no adapter can have this name"):
        policy.load_adapter(name, tmp_path)
    assert policy.adapters == ()


def test_an_adapter_the_policy_does_not_hold_is_refused_by_name(policy: Policy) -> None:
    policy.add_adapter("main", LoraOptions(rank=2), 1)
    with pytest.raises(BindingError, match=r"no such adapter.*loaded: main"):
        policy.use("stranger")


def test_the_fingerprint_is_the_bases_alone(policy: Policy) -> None:
    before = policy.fingerprint
    policy.add_adapter("main", LoraOptions(rank=4), seed=1)
    randomise(policy, "main")
    policy._fingerprint = None
    assert policy.fingerprint == before == Policy(tiny_model()).fingerprint
    assert Policy(tiny_model(seed=1)).fingerprint != before


def test_removing_the_adapters_leaves_the_bare_base(policy: Policy) -> None:
    before = logprobs(policy)
    policy.add_adapter("main", LoraOptions(rank=4), seed=1)
    randomise(policy, "main")
    policy.remove_adapters()
    assert policy.adapters == () and torch.equal(logprobs(policy), before)
    policy.add_adapter("next", LoraOptions(rank=4), seed=2)
    assert policy.adapters == ("next",) and torch.equal(logprobs(policy), before)


# -- folders ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained() -> Policy:
    policy = Policy(tiny_model())
    policy.add_adapter("main", LoraOptions(rank=4, alpha=6, rslora=True), seed=1)
    randomise(policy, "main")
    for parameter in policy.adapter_parameters("main").values():
        parameter.data.copy_(parameter.data.bfloat16())  # what training leaves behind: values the stored type can hold
    return policy


def test_a_saved_adapter_loads_back_to_the_same_numbers(trained: Policy, tmp_path: Path) -> None:
    want = logprobs(trained)
    trained.save_adapter("main", tmp_path / "adapter", "owner/base")
    assert torch.equal(logprobs(trained), want)
    loaded = Policy(tiny_model())
    loaded.load_adapter("again", tmp_path / "adapter", trained.fingerprint)
    assert loaded.adapters == ("again",) and torch.equal(logprobs(loaded), want)
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_a_second_adapter_loads_beside_the_first(trained: Policy, tmp_path: Path) -> None:
    want = logprobs(trained)
    trained.save_adapter("main", tmp_path / "adapter", "owner/base")
    policy = Policy(tiny_model())
    policy.add_adapter("other", LoraOptions(rank=2), 5)
    randomise(policy, "other")
    other = logprobs(policy)
    policy.load_adapter("main", tmp_path / "adapter")
    assert torch.equal(logprobs(policy), want)
    policy.use("other")
    assert torch.equal(logprobs(policy), other)


def test_the_folder_is_one_that_peft_itself_loads(trained: Policy, tmp_path: Path) -> None:
    want = logprobs(trained)
    trained.save_adapter("main", tmp_path / "adapter", "owner/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "owner/base" and config["peft_type"] == "LORA" and config["inference_mode"]
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert not any(".main." in name for name in stored)
    model = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"))
    ids = [*list(range(10, 30)), 5, 6]
    with torch.no_grad():
        row = model(torch.tensor([ids])).logits[0].log_softmax(-1)[torch.arange(21), torch.tensor(ids[1:])]
    torch.testing.assert_close(row, want[:21], atol=2e-5, rtol=0)


def test_saving_does_not_change_how_the_adapter_trains_on(trained: Policy, tmp_path: Path) -> None:
    before = trained.model.peft_config["main"].to_dict()
    trained.save_adapter("main", tmp_path / "adapter", "owner/base")
    assert trained.model.peft_config["main"].to_dict() == before


def test_an_adapter_is_refused_on_a_parent_it_was_not_trained_on(trained: Policy, tmp_path: Path) -> None:
    trained.save_adapter("main", tmp_path / "adapter", "owner/base")
    stranger = Policy(tiny_model(seed=9))
    with pytest.raises(BindingError, match="trained on another parent") as caught:
        stranger.load_adapter("main", tmp_path / "adapter", trained.fingerprint)
    assert trained.fingerprint in str(caught.value) and stranger.adapters == ()


# -- folders ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write", [lambda folder: None, lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}')]
)
def test_a_folder_that_holds_no_model_is_an_error_that_names_it(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    with pytest.raises(BaseModelError) as caught:
        Policy.load(tmp_path, torch.float32)
    assert caught.value.where == str(tmp_path)


def test_weights_in_pickle_format_are_not_loaded(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BaseModelError):
        Policy.load(tmp_path, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_being_trained_gives_its_references_bits(family: str) -> None:
    """Or DPO starts from a preference that is rounding."""
    policy = Policy(stored(tiny_model(family), torch.bfloat16))
    policy.add_adapter("main", LoraOptions(rank=2), seed=1)
    for parameter in policy.adapter_parameters("main").values():
        parameter.requires_grad_(True)
    pack = Pack.of([sequence([5, 6, 7, *range(10, 40)]), sequence([5, 6, 7, *range(20, 60)])])
    with policy.only_base():
        reference = policy.logprobs(pack)
    assert torch.equal(policy.logprobs(pack).detach(), reference)
