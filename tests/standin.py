"""A stand-in for an accelerator: tensors on device `meta` that hold their numbers in a hidden CPU tensor.

What a GPU refuses is refused here too, so that a test without one finds it: an operation whose tensors lie on both sides (single
numbers and indices excepted), numpy on a device's tensor, kernels that are a CPU's. What it cannot show is speed and rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")
_MAKES = ("_to_copy", "to", "copy_", "set_")  # what may see both sides
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")


class StandIn(Tensor):
    """A tensor that says it lies on `DEVICE`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> StandIn:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            inner.stride(),
            inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.split("::")[1]
    flat = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    inside = any(isinstance(value, StandIn) for value in flat)
    places = [value for value in (*args, kwargs.get("device")) if isinstance(value, torch.device)]
    goes = DEVICE in places or (inside and not places)
    if not inside and not goes:
        return func(*args, **kwargs)
    if "for_cpu" in name:
        raise RuntimeError(f"{name}: a CPU's kernel on another device's tensors")
    if name in _INDEXED:
        flat = [value for value in tree_flatten((args[0], args[2:]))[0] if isinstance(value, Tensor)]  # indices may lie anywhere
    foreign = [value for value in flat if not isinstance(value, StandIn) and value.dim() > 0]
    if inside and foreign and name not in _MAKES:
        raise RuntimeError(f"{name}: tensors on {DEVICE} and on {foreign[0].device}")
    plain_args, plain_kwargs = tree_map_only(StandIn, lambda value: value.inner, (args, kwargs))
    plain_args, plain_kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (plain_args, plain_kwargs))
    out = func(*plain_args, **plain_kwargs)
    if not goes:
        return out
    out = tree_map_only(Tensor, StandIn, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if inside else out


class _Factories(TorchDispatchMode):
    """`device=meta` makes a stand-in, and `.to('meta')` one with the same numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def device() -> Iterator[torch.device]:
    with _Factories():
        yield DEVICE


def moved(model: Any) -> Any:
    """A model with its parameters and buffers on the stand-in."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, StandIn):
                module._parameters[name] = torch.nn.Parameter(StandIn(parameter.data), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, StandIn):
                module._buffers[name] = StandIn(buffer)
    model.tie_weights()
    return model


def numbers(tensor: Tensor) -> Tensor:
    """The hidden numbers."""
    return tensor.inner if isinstance(tensor, StandIn) else tensor
