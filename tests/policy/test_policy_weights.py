"""Weights: merged once and rounded once, saved and loaded to the same fingerprint, cut where the recipe says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posttrain.policy import LoraOptions, Pack, Policy, cut_layers, fast_dtype, fingerprint, merge_adapter, save_dense
from posttrain.policy.weights import base_parameters
from tiny_models import FAMILIES, sequence, stored, tiny_model

PACK = Pack.of([sequence([*range(10, 40)])])


def adapted(seed: int = 1, **options: object) -> Policy:
    policy = Policy(stored(tiny_model()))
    policy.add_adapter("main", LoraOptions(rank=4, alpha=6, **options), seed)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(policy.adapter_parameters("main").items()):
        parameter.data.normal_(0.0, 0.1, generator=generator)
    return policy


@pytest.mark.parametrize(("options", "scale"), [({}, 6 / 4), ({"rslora": True}, 6 / 4**0.5)])
def test_merging_adds_in_float32_and_rounds_to_bfloat16_once(options: dict[str, object], scale: float) -> None:
    policy = adapted(**options)
    before = {name: p.detach().clone() for name, p in base_parameters(policy.model).items()}
    adapter = {name: p.detach().clone() for name, p in policy.adapter_parameters("main").items()}
    merge_adapter(policy, "main")
    touched = 0
    for name, parameter in base_parameters(policy.base).items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = adapter.get(f"{stem}.lora_A.main.weight"), adapter.get(f"{stem}.lora_B.main.weight")
        want = before[name]
        if a is not None and b is not None:
            touched += 1
            want = (want + scale * (b @ a)).bfloat16().float()
        assert torch.equal(parameter, want), name
    assert touched == 3 * 7 and policy.adapters == ()


def test_a_merged_policy_stays_within_one_rounding_of_base_and_adapter() -> None:
    policy = adapted()
    with torch.no_grad():
        want = policy.logprobs(PACK)
        with policy.only_base():
            base = policy.logprobs(PACK)
        merge_adapter(policy, "main")
        got = policy.logprobs(PACK)
    assert float((got - want).abs().mean()) < 0.02 < 0.2 < float((base - want).abs().mean())


def test_merging_into_bfloat16_weights_gives_what_merging_into_float32_gives() -> None:
    wide, narrow = adapted(), adapted()
    stored(narrow.base, torch.bfloat16)
    for policy in (wide, narrow):
        for parameter in policy.adapter_parameters("main").values():
            parameter.data = parameter.data.bfloat16().float()
        merge_adapter(policy, "main")
    assert wide.fingerprint == narrow.fingerprint


def test_merging_is_of_the_stored_weights_whatever_type_computes(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)  # in float32
    merged = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = Policy.load(tmp_path, dtype)
        policy.add_adapter("main", LoraOptions(rank=4), 1)
        generator = torch.Generator().manual_seed(1)
        for _, parameter in sorted(policy.adapter_parameters("main").items()):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator).mul(0.1).bfloat16())
        merge_adapter(policy, "main")
        merged.append(policy.fingerprint)
    assert merged[0] == merged[1]


def test_merging_moves_the_fingerprint_and_it_is_stable_over_save_and_load(tmp_path: Path) -> None:
    policy = adapted()
    before = policy.fingerprint
    merge_adapter(policy, "main")
    after = policy.fingerprint
    assert after != before
    save_dense(policy.base, tmp_path)
    assert Policy.load(tmp_path, torch.float32).fingerprint == after
    assert Policy.load(tmp_path, torch.bfloat16).fingerprint == after


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_to_the_same_numbers(family: str, tmp_path: Path) -> None:
    policy = Policy(stored(tiny_model(family)))
    save_dense(policy.base, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    loaded = Policy.load(tmp_path, torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded.logprobs(PACK), policy.logprobs(PACK))
    assert loaded.fingerprint == policy.fingerprint and loaded.folder == tmp_path


def test_saving_while_an_adapter_is_on_writes_the_base_alone(tmp_path: Path) -> None:
    policy = adapted()
    save_dense(policy.base, tmp_path)
    loaded = Policy.load(tmp_path, torch.float32)
    assert loaded.fingerprint == policy.fingerprint
    with torch.no_grad(), policy.only_base():
        assert torch.equal(loaded.logprobs(PACK), policy.logprobs(PACK))


def test_saving_does_not_change_the_models_own_configuration(tmp_path: Path) -> None:
    model = tiny_model()
    before = model.config.to_dict()
    save_dense(model, tmp_path)
    after = model.config.to_dict()
    assert {key for key in after if after[key] != before[key]} <= {"architectures"}  # which transformers fills in
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_hashed_once_and_stay_tied_over_save_and_load(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    assert ("lm_head.weight" in base_parameters(model)) is not tied
    policy = Policy(model)
    save_dense(model, tmp_path)
    loaded = Policy.load(tmp_path, torch.float32)
    assert (loaded.head.weight is loaded.base.get_input_embeddings().weight) is tied
    assert loaded.fingerprint == policy.fingerprint


def test_one_changed_weight_changes_the_fingerprint() -> None:
    model = tiny_model()
    before = fingerprint(model)
    with torch.no_grad():
        model.base_model.layers[1].mlp.up_proj.weight[3, 4] += 0.5
    assert fingerprint(model) != before


def test_the_computing_type_does_not_change_the_fingerprint() -> None:
    model = tiny_model()
    assert fingerprint(model) == fingerprint(stored(tiny_model(), torch.bfloat16))


# -- cutting ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_holds_copies_of_the_kept_layers_in_their_order(family: str) -> None:
    teacher = tiny_model(family, num_hidden_layers=4) if family != "gemma3" else tiny_model(family)
    keep = (0, 2, 3) if family != "gemma3" else (0, 2)
    student = cut_layers(teacher, keep)
    source = base_parameters(teacher)
    assert student.config.num_hidden_layers == len(keep) == len(student.base_model.layers)
    for name, parameter in base_parameters(student).items():
        origin = name
        if ".layers." in name:
            head, _, tail = name.partition(".layers.")
            index, _, rest = tail.partition(".")
            origin = f"{head}.layers.{keep[int(index)]}.{rest}"
        assert torch.equal(parameter, source[origin]), name
        assert parameter.data_ptr() != source[origin].data_ptr()


def test_a_student_keeps_the_kind_of_each_kept_layer() -> None:
    student = cut_layers(tiny_model("gemma3"), (1, 2))
    assert student.config.layer_types == ["full_attention", "sliding_attention"]


def test_a_student_with_every_layer_computes_what_its_teacher_computes() -> None:
    teacher = tiny_model()
    student = Policy(cut_layers(teacher, (0, 1, 2)))
    with torch.no_grad():
        assert torch.equal(student.logprobs(PACK), Policy(teacher).logprobs(PACK))


def test_a_student_is_cut_from_a_teacher_that_wears_an_adapter_without_the_adapter() -> None:
    policy = adapted()
    student = Policy(cut_layers(policy.base, (0, 2)))
    bare = Policy(cut_layers(stored(tiny_model()), (0, 2)))
    assert student.fingerprint == bare.fingerprint


def test_a_student_has_the_teachers_number_type() -> None:
    assert {p.dtype for p in cut_layers(stored(tiny_model(), torch.bfloat16), (0, 2)).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_student_computes_after_saving_and_loading_what_it_computed_in_training(family: str, tmp_path: Path) -> None:
    student = Policy(cut_layers(stored(tiny_model(family), torch.bfloat16), (0, 2)))
    save_dense(student.base, tmp_path)
    loaded = Policy.load(tmp_path, torch.bfloat16)
    frequencies = {name: buffer for name, buffer in student.base.named_buffers() if "inv_freq" in name}
    kept = dict(loaded.base.named_buffers())
    assert frequencies and all(torch.equal(buffer, kept[name]) for name, buffer in frequencies.items())
    with torch.no_grad():
        assert torch.equal(student.logprobs(PACK), loaded.logprobs(PACK))


@pytest.mark.parametrize("keep", [(), (3,), (-1, 0)])
def test_layers_that_do_not_exist_cannot_be_kept(keep: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="of 3"):
        cut_layers(tiny_model(), keep)


# -- number type -----------------------------------------------------------------------------------------------------------


def test_the_computing_type_is_measured_once_or_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTTRAIN_DTYPE", raising=False)
    fast_dtype.cache_clear()
    assert fast_dtype() in (torch.bfloat16, torch.float32)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        fast_dtype.cache_clear()
        monkeypatch.setenv("POSTTRAIN_DTYPE", name)
        assert fast_dtype() == dtype
    fast_dtype.cache_clear()
