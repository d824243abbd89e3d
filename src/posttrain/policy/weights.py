"""Weights: what they hash to, which number type computes fastest here, merging an adapter, cutting a student."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import BaseModelError, BindingError
from posttrain.policy.architecture import blocks_of, name_of


def fingerprint(model: Any) -> str:
    """SHA-256 over the bf16 bytes of every base parameter, sorted by name (adapters left out, tied weights once)."""
    digest = hashlib.sha256()
    for name, parameter in sorted(base_parameters(model).items()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Base parameters under their Hugging Face names, also while PEFT has wrapped the layers."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            found[name.replace(".base_layer.", ".").removeprefix("base_model.model.")] = parameter
    return found


@cache
def fast_dtype(device: str = "cpu") -> torch.dtype:
    """bf16 or fp32, whichever multiplies a training-shaped matrix faster on this machine.

    CPUs with AMX are several times faster in bf16; with AVX512-BF16 alone it was a quarter slower than fp32, and without either it is
    emulated and several times slower.
    `POSTTRAIN_DTYPE` (bfloat16 | float32) decides instead of the measurement.
    """
    import os

    named = os.environ.get("POSTTRAIN_DTYPE")
    if named:
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[named]
    if device != "cpu":
        return torch.bfloat16
    best = dict.fromkeys((torch.bfloat16, torch.float32), float("inf"))
    for _ in range(_TRIES):  # in turn, the best of each: other work on the machine must not decide
        for dtype in best:
            best[dtype] = min(best[dtype], _matmul_seconds(dtype))
    return min(best, key=lambda dtype: best[dtype])


_TRIES = 12


def _matmul_seconds(dtype: torch.dtype) -> float:
    x, w = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    start = time.perf_counter()
    torch.nn.functional.linear(x, w)
    return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class MergeParity:
    """How far a merged model is from base + adapter: on probe hidden rows, in natural-log units."""

    max_abs_logprob_difference: float
    mean_abs_logprob_difference: float
    probes: int

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def merge_adapter(policy: Any, name: str) -> None:
    """W <- round_bf16(W + s B A), added in fp32 and rounded once (objectives.md 2.1); the adapters are dropped afterwards. W is what its
    fingerprint is of, the weights in bf16: where they are stored in fp32, the type they are computed in must not decide.

    Raises BindingError on a quantised base: what was rounded to four bits is not the parent the adapter is released on."""
    if policy.quantised:
        raise BindingError(
            "an adapter is never merged into quantised weights", where=name, remedy="load it on its dense parent and merge there"
        )
    for parameter in base_parameters(policy.base).values():
        parameter.copy_(parameter.to(torch.bfloat16))
    for module in policy.model.modules():
        if name in getattr(module, "lora_A", {}):
            weight = module.get_base_layer().weight
            a, b = module.lora_A[name].weight.float(), module.lora_B[name].weight.float()
            merged = weight.float() + module.scaling[name] * (b @ a)
            weight.copy_(merged.to(torch.bfloat16).to(weight.dtype))
    policy.remove_adapters()
    policy._fingerprint = None


def save_dense(model: Any, folder: Path) -> None:
    """Write a Hugging Face folder with bf16 safetensors (the stored type of every release)."""
    state: dict[str, Tensor] = {
        name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in base_parameters(model).items()
    }
    config = model.config
    before = config.dtype
    config.dtype = torch.bfloat16
    model.save_pretrained(folder, state_dict=state)
    config.dtype = before


@torch.no_grad()
def cut_layers(model: Any, keep: tuple[int, ...]) -> Any:
    """A student with the same embeddings and head and the layers `keep` of the teacher, copied. BaseModelError where the configuration
    does not lead to layers of the same shapes; whether they compute the same is asked by `importance.check_student`."""
    layers = blocks_of(model)
    assert keep and all(0 <= i < len(layers) for i in keep), f"layers {keep} of {len(layers)}"
    like = next(model.parameters())
    student = type(model)(_cut_config(model.config, keep, len(layers))).to(like.device)
    for parameter in student.parameters():  # parameters only: rotary frequencies stay float32, as they do when loaded
        parameter.data = parameter.data.to(like.dtype)
    source = base_parameters(model)
    blocks = f"{name_of(model, layers)}."
    renumber = {f"{blocks}{new}.": f"{blocks}{old}." for new, old in enumerate(keep)}
    for target_name, parameter in student.named_parameters():
        name = target_name
        for new, old in renumber.items():
            if target_name.startswith(new):
                name = target_name.replace(new, old)
                break
        if name not in source or source[name].shape != parameter.shape:
            raise BaseModelError(
                "a student of this architecture cannot be cut: its layers differ by what the configuration does not list layer by layer",
                where=name,
                value=type(model).__name__,
                remedy="distil a model whose layers are alike",
            )
        parameter.copy_(source[name])
    student.tie_weights()
    return student


def _cut_config(config: Any, keep: tuple[int, ...], layers: int) -> Any:
    """A copy of a configuration for the layers `keep` of so many: of every list with a value for each layer, theirs."""
    import copy

    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    text.num_hidden_layers = len(keep)
    for name, values in list(vars(text).items()):
        listed = isinstance(values, list | tuple) and len(values) == layers
        if listed and name != "architectures" and not name.endswith("token_id"):
            setattr(text, name, type(values)(values[layer] for layer in keep))
    return cut
