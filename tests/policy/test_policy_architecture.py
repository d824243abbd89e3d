"""What a loaded policy computes is what its model computes: proved on a small pack, row by row where packs would be wrong, else refused."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma3Config

from posttrain.errors import BaseModelError, PosttrainError
from posttrain.policy import LoraOptions, Pack, Policy, cut_layers
from posttrain.policy.importance import check_student, layer_importance
from posttrain.sampling import LocalSampler, SampleOptions, SampleRequest
from tiny_models import FAMILIES, SIZES, logprobs_of_row, random_ids, sequence, stored, tiny_model

RNG = random.Random(5)
TRUNK = random_ids(14, RNG)
ROWS = [TRUNK + random_ids(9, RNG), TRUNK + random_ids(16, RNG), random_ids(30, RNG), TRUNK + random_ids(1, RNG)]

OWN: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.0625},
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "lm_head_multiplier": 0.3,
    },
    "jetmoe": {},
    "smollm3": {"no_rope_layer_interval": 4, "num_hidden_layers": 6},
    "qwen2_moe": {
        "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [0],
    },
    "bloom": {"n_layer": 3, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 512},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 11},
    "stablelm": {},
    "gemma2": {"sliding_window": 11, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
}  # fmt: skip


def random_model(kind: str, **overrides: Any) -> Any:
    special = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 4}
    config = CONFIG_MAPPING[kind](**{**SIZES, **special, **OWN[kind], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).float().eval()


@torch.no_grad()
def compare(policy: Policy, plain: Any) -> None:
    pack = Pack.of([sequence(row) for row in ROWS])
    assert pack.tokens < sum(map(len, ROWS))
    got = pack.pad(policy.logprobs(pack))
    for b, row in enumerate(ROWS):
        want = logprobs_of_row(plain, row)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        torch.testing.assert_close(got[b, : len(want)], want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["cohere", "falcon_h1", "jetmoe"])
def test_an_architectures_own_scales_and_layers_are_heeded(kind: str) -> None:
    compare(Policy(random_model(kind)), random_model(kind))


@pytest.mark.parametrize("kind", ["bloom", "mpt", "gpt_neo", "stablelm", "gemma2"])
def test_an_architecture_whose_packs_would_be_wrong_is_loaded_to_run_row_by_row(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = random_model(kind)
    plain.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        policy = Policy.load(tmp_path, torch.float32)
    assert not policy.packs and type(plain).__name__ in caplog.text and "row by row" in caplog.text
    compare(policy, plain)


def test_an_architecture_that_runs_row_by_row_samples_what_the_learner_scores(tmp_path: Path) -> None:
    random_model("bloom").save_pretrained(tmp_path)
    policy = Policy.load(tmp_path, torch.float32)
    requests = [SampleRequest(tuple(row), i, SampleOptions(6, 1.0)) for i, row in enumerate(ROWS)]
    for request, got in zip(requests, LocalSampler(policy, 2).sample(requests), strict=True):
        ids = [*request.prompt, *got.ids]
        with torch.no_grad():
            own = policy.logprobs(Pack.of([sequence(ids, range(len(request.prompt), len(ids)))]))
        torch.testing.assert_close(torch.tensor(got.logprobs), own, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.1), (torch.bfloat16, 3.0)])
def test_a_model_whose_rows_would_be_wrong_too_is_refused(dtype: torch.dtype, scale: float, tmp_path: Path) -> None:
    random_model("mpt", logit_scale=scale).save_pretrained(tmp_path)  # of which transformers' own class takes no notice
    with pytest.raises(BaseModelError, match=r"nats from transformers' own.*MptForCausalLM"):
        Policy.load(tmp_path, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_supported_architecture_is_loaded_to_run_packs(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored(tiny_model(family)).save_pretrained(tmp_path)
    assert Policy.load(tmp_path, dtype).packs


def test_a_pack_given_to_an_architecture_that_cannot_run_it_is_refused_by_name() -> None:
    with pytest.raises(BaseModelError, match="StableLmAttention"), torch.no_grad():
        Policy(random_model("stablelm")).logprobs(Pack.of([sequence(row) for row in ROWS]))


STEADY = 20
DYNAMIC: dict[str, dict[str, Any]] = {
    "dynamic": {
        "max_position_embeddings": STEADY,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": STEADY,
            "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", DYNAMIC)
@torch.no_grad()
def test_a_neighbour_may_not_be_so_long_that_it_changes_how_positions_are_encoded(
    rope: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        policy = Policy(tiny_model(**DYNAMIC[rope]))
    assert f"over {STEADY} tokens" in caplog.text and policy.context == STEADY
    short, full, long = (sequence(random_ids(length, RNG)) for length in (12, STEADY, STEADY + 1))
    alone, beside = Pack.of([short]), Pack.of([short, full])
    want, got = policy.logprobs(alone), beside.pad(policy.logprobs(beside))[0]
    torch.testing.assert_close(got[: len(want)], want, atol=2e-5, rtol=0)
    with pytest.raises(BaseModelError, match=f"got {STEADY + 1}; keep sequences to {STEADY} tokens"):
        policy.logprobs(Pack.of([short, long]))


@pytest.mark.parametrize("rope", DYNAMIC)
def test_nothing_is_sampled_that_may_grow_so_long(rope: str) -> None:
    sampler = LocalSampler(Policy(tiny_model(**DYNAMIC[rope])), 2)
    prompt = tuple(random_ids(12, RNG))
    (sample,) = sampler.sample([SampleRequest(prompt, 0, SampleOptions(STEADY - 12))])
    assert len(sample.ids) <= STEADY - 12
    too_long = SampleRequest(prompt, 0, SampleOptions(STEADY - 11))
    with pytest.raises(PosttrainError, match=f"keep both to {STEADY} tokens"):
        sampler.sample([too_long])
    stream = sampler.open(1)
    (ticket,) = stream.admit([too_long])
    assert isinstance(stream.step()[ticket], PosttrainError)


def test_positions_that_are_scaled_alike_at_any_length_have_no_such_bound() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": STEADY}
    assert Policy(tiny_model(rope_parameters=yarn)).steady is None


# -- a decoder inside a model that also sees -------------------------------------------------------------------------------


def seeing_model() -> Any:
    text = {
        **SIZES, "vocab_size": 97, "sliding_window": 11, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }  # fmt: skip
    eyes = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    tokens = {"image_token_index": 2, "boi_token_index": 1, "eoi_token_index": 0, "mm_tokens_per_image": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Gemma3Config(text_config=text, vision_config=eyes, **tokens)
        return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
@pytest.mark.parametrize("top", [None, 1])
def test_only_the_text_decoder_of_a_model_that_also_sees_is_adapted(top: int | None, targets: Any) -> None:
    policy = Policy(seeing_model())
    policy.add_adapter("main", LoraOptions(rank=2, top=top, targets=targets), seed=0)
    adapted = {name.partition(".lora_")[0] for name in policy.adapter_parameters("main")}
    assert len(adapted) == (3 if top is None else 1) * (7 if targets == "all-linear" else 2)
    assert all(".language_model.layers." in name for name in adapted)


def test_the_decoder_of_a_model_that_also_sees_is_recomputed_block_by_block() -> None:
    policy = Policy(seeing_model())
    policy.recompute = True
    policy.add_adapter("main", LoraOptions(rank=2), seed=0)
    runs = [0]
    policy.base.get_decoder().layers[1].mlp.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    for parameter in policy.adapter_parameters("main").values():
        parameter.requires_grad_(True)
    policy.logprobs(Pack.of([sequence(row) for row in ROWS])).sum().backward()  # type: ignore[no-untyped-call]
    assert runs == [2]


@torch.no_grad()
def test_a_student_is_cut_from_the_decoder_of_a_model_that_also_sees() -> None:
    teacher = seeing_model()
    student = cut_layers(teacher, (0, 2))
    for own, old in zip(student.get_decoder().layers, (0, 2), strict=True):
        for name, parameter in own.named_parameters():
            assert torch.equal(parameter, teacher.get_decoder().layers[old].get_parameter(name))
    for name, parameter in student.model.vision_tower.named_parameters():
        assert torch.equal(parameter, teacher.model.vision_tower.get_parameter(name))
    assert len(layer_importance(Policy(teacher), Pack.of([sequence(row) for row in ROWS]))) == 3


def test_an_architecture_whose_blocks_are_not_known_says_so_when_they_are_asked_for() -> None:
    policy = Policy(random_model("bloom"))
    with pytest.raises(BaseModelError, match="BloomForCausalLM"):
        policy.recompute = True


def test_a_student_takes_along_all_that_the_configuration_lists_layer_by_layer() -> None:
    kept = (0, 2, 3, 5)
    teacher = random_model("smollm3", eos_token_id=[1, 2, 3, 4, 5, 6])  # as many as layers, but no layer's
    wanted = [teacher.config.no_rope_layers[layer] for layer in kept]
    student = cut_layers(teacher, kept)
    assert student.config.no_rope_layers == wanted != teacher.config.no_rope_layers[: len(kept)]
    assert student.config.eos_token_id == [1, 2, 3, 4, 5, 6]
    check_student(Policy(student), Policy(teacher), kept)


def test_a_student_that_is_not_its_teacher_without_the_other_layers_is_refused() -> None:
    teacher = random_model("smollm3")
    student = cut_layers(teacher, (0, 2, 3, 5))
    student.model.layers[2].self_attn.use_rope = not student.model.layers[2].self_attn.use_rope
    with pytest.raises(BaseModelError, match=r"nats from its teacher.*SmolLM3ForCausalLM"):
        check_student(Policy(student), Policy(teacher), (0, 2, 3, 5))


def test_a_student_whose_layers_would_be_of_another_kind_is_refused() -> None:
    teacher = random_model("qwen2_moe")  # its dense layers are listed by number
    with pytest.raises(BaseModelError, match="Qwen2MoeForCausalLM"):
        cut_layers(teacher, (1, 2, 3))
