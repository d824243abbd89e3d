"""Which layers an adapter adapts, in PEFT's words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from posttrain.policy.architecture import beside_text, blocks_of, mixing_layers

if TYPE_CHECKING:
    from posttrain.policy.policy import LoraOptions

# of layers that mix tokens, which PEFT refuses to adapt: their kernels read the weights themselves
_SPARED = ["out_proj", "conv1d"]


def targets(model: Any, options: LoraOptions) -> dict[str, Any]:
    """What LoraConfig is told. Nothing is adapted beside the text's decoder: what sees or hears learns nothing from text.

    Raises BaseModelError for the last blocks of a model whose blocks are not known."""
    kept = _excluded(model)
    if options.top is None:
        return {"target_modules": options.targets if isinstance(options.targets, str) else list(options.targets), **kept}
    blocks = blocks_of(model)
    linear = [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear) and ".lora_" not in name]
    inner = {name.removesuffix(".base_layer").rpartition(".")[2] for name in linear}
    names = inner if options.targets == "all-linear" else options.targets
    return {
        "target_modules": [names] if isinstance(names, str) else sorted(names),
        "layers_to_transform": list(range(max(0, len(blocks) - options.top), len(blocks))),
        "layers_pattern": "layers",
        **kept,
    }


def _excluded(model: Any) -> dict[str, Any]:
    spared = _SPARED if mixing_layers(model.config) else []
    beside = beside_text(model)
    if beside is not None:
        return {"exclude_modules": "|".join([beside, *(rf".*\.{name}" for name in spared)])}
    return {"exclude_modules": spared} if spared else {}
