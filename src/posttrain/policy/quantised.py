"""QLoRA: the frozen linear layers of the blocks kept as NF4 while an adapter trains (Dettmers 2023, section 3), by bitsandbytes.

Four bits a weight and a scale for each 64 of them, the scales quantised again: 4.13 bits instead of 16 or 32. Each pass dequantises a
layer where it is used and forgets it, which costs time; embeddings, norms and the output head stay dense. Nothing is ever merged into
NF4 weights: an adapter trained on them is measured and released on the dense parent (`pipeline/pull.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from posttrain.errors import BaseModelError
from posttrain.policy.architecture import blocks_of

BLOCK = 64  # weights that share a scale


def quantise(model: Any) -> None:
    """Replace every linear layer inside the blocks of a Hugging Face model by its NF4 form, in place.

    Raises BaseModelError when bitsandbytes is not installed, the blocks are not known, or a row of a layer does not fill whole blocks.
    """
    bnb = _bitsandbytes()
    layers: nn.Module = blocks_of(model)
    linear = [(name, module) for name, module in layers.named_modules() if type(module) is nn.Linear]
    for name, module in linear:
        if module.in_features % BLOCK:  # bitsandbytes' CPU kernel then restores other weights than it was given, without an error
            raise BaseModelError(
                "a layer's rows do not fill whole blocks of NF4",
                where=f"layers.{name}",
                value=tuple(module.weight.shape),
                remedy="train on the dense base: adapter.base: dense",
            )
        parent, _, last = name.rpartition(".")
        setattr(layers.get_submodule(parent), last, _nf4(bnb, module))  # one at a time: the dense one is freed before the next
    model.is_loaded_in_4bit = True  # what PEFT asks before it adapts such layers


def _nf4(bnb: Any, dense: nn.Linear) -> nn.Module:
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            dense.in_features,
            dense.out_features,
            bias=dense.bias is not None,
            compute_dtype=dense.weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
        )
    # Where a CPU has AVX512-BF16, bitsandbytes 0.50 repacks a layer at its first pass without a gradient: from then on its product is in
    # bf16 whatever the type asked for, and no gradient comes through it, without an error.
    layer.support_avx512bf16_for_cpu = False
    layer.bias = dense.bias
    layer.weight = bnb.nn.Params4bit(
        dense.weight.detach(), requires_grad=False, blocksize=BLOCK, compress_statistics=True, quant_type="nf4", module=layer
    ).to(dense.weight.device)  # moving it to its device is what quantises it
    found: nn.Module = layer.eval()
    return found


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise BaseModelError(
            "QLoRA needs bitsandbytes", where="adapter.base: nf4", remedy="pip install 'posttrain[qlora]'"
        ) from error
    return bitsandbytes
