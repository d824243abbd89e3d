"""Small terms that every objective shares: width, masks, counts and shape checks.

Axis letters of this room: B rows (sequences, pairs), T tokens of a row, V vocabulary, N tokens in one line, G completions of one
prompt, K answers or steps. A name such as `logp_bt` says its axes; a name without suffix is a number or any shape.

Masks are 0/1 floats (SFT weights may be fractional) aligned with the values: `logp_bt[b, t]` is the log-probability of
completion token t. Metrics are detached 0-dim tensors that add up over micro-batches: a count, a sum, or a share of a mean
whose global count was given as `normaliser`.
"""

from __future__ import annotations

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
Objective = tuple[Tensor, Metrics]

EXPONENT_LIMIT = 20.0


def wide(values: Tensor) -> Tensor:
    """float32 at least: log-probabilities, ratios and losses are never computed in 16 bits; float64 stays."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """values where mask > 0, exactly 0 elsewhere, with exactly zero gradient there even if values hold infinity or NaN
    (0 * inf is NaN, so multiplication is no mask). Everything not learned passes through here *before* any arithmetic."""
    return torch.where(mask > 0, values, 0.0)


def same_shape(*tensors: Tensor, rank: int | None = None) -> None:
    """Assert that all tensors have one shape, of the given rank."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    assert all(shape == shapes[0] for shape in shapes), f"shapes differ: {shapes}"
    assert rank is None or len(shapes[0]) == rank, f"expected {rank} axes, got {shapes[0]}"


def divide(total: Tensor, count: Tensor | float) -> Tensor:
    """total / count, and total / 1 for an empty count: an empty mask gives loss 0 with zero gradient, never NaN."""
    if isinstance(count, Tensor):
        return total / torch.where(count > 0, count, 1.0)
    return total / (count if count > 0 else 1.0)


def lengths_of(mask_bt: Tensor) -> Tensor:
    """[B] number of tokens with mask > 0."""
    return (mask_bt > 0).sum(dim=1)


def mask_from_lengths(lengths_b: Tensor, width: int) -> Tensor:
    """[B, width] float 0/1: the first lengths_b[b] places of row b."""
    return (torch.arange(width, device=lengths_b.device) < lengths_b[:, None]).to(torch.get_default_dtype())
