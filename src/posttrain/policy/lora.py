"""Where PEFT keeps an adapter inside a model, and what it may be called.

PEFT and transformers know adapters by parts of dotted names, in which an adapter "1" is also the layer `layers.1`. Here an adapter is
what a LoRA layer holds under its name, so that it may be called like any part of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from posttrain.errors import BindingError


def check_adapter_name(name: str, where: str = "policy") -> None:
    """Refuse a name that PEFT cannot hold an adapter under. Raises BindingError."""
    try:
        nn.ModuleDict({name: nn.Identity()})  # what PEFT keeps adapters in: no dots, not empty, none of its own attributes
    except KeyError as error:
        raise BindingError(
            f"no adapter can have this name ({error.args[0]})", where=where, value=name, remedy="use letters, digits, - and _"
        ) from error


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that PEFT adapted, with their full names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def own_parameters(model: nn.Module, name: str) -> Iterator[tuple[str, str, nn.Parameter]]:
    """An adapter's parameters: the full name of the place in a layer, the name below the adapter's, the parameter."""
    for prefix, layer in lora_layers(model):
        for place in layer.adapter_layer_names:
            held = getattr(layer, place)
            if isinstance(held, nn.ModuleDict) and name in held:
                for inner, parameter in held[name].named_parameters():
                    yield f"{prefix}.{place}", inner, parameter
