"""JSON values of a case file as float64 tensors, and gradients for what a case expects of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Values = Mapping[str, Any]
Outputs = dict[str, Any]
Adapter = Callable[[Values, Values], Outputs]


def number(value: Any) -> float:
    """A JSON number, or "inf", "-inf"."""
    return float(value)


def tensor(value: Any) -> Tensor:
    """Nested lists of numbers, "inf" and "-inf" as float64."""
    return torch.tensor(_numbers(value), dtype=torch.float64)


def integers(value: Any) -> Tensor:
    """Nested lists of whole numbers as int64."""
    return torch.tensor(value, dtype=torch.int64)


def leaf(value: Any) -> Tensor:
    """`tensor` with a gradient."""
    return tensor(value).requires_grad_(True)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    """d loss / d of, 0 where the loss does not depend on it; the graph stays for the next one."""
    if not loss.requires_grad:
        return torch.zeros_like(of)
    (found,) = torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)
    return torch.zeros_like(of) if found is None else found


def _numbers(value: Any) -> Any:
    return [_numbers(item) for item in value] if isinstance(value, list) else number(value)
