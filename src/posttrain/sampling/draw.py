"""Drawing one token per row: grammar mask, temperature, truncation, and both log-probabilities. No sort unless truncating."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.sampling.protocol import SampleOptions


def uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """The `count` uniform numbers of a request: a function of its seed alone, so a neighbour in the batch changes nothing."""
    return np.random.default_rng(seed & (2**63 - 1)).random(count)


def unpack_mask(bits: NDArray[np.int32], vocabulary: int) -> Tensor:
    """[R, ceil(V/32)] packed bits, least significant first -> [R, V] bool."""
    flat = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(
        flat[:, :vocabulary].view(bool)
        if flat.shape[1] >= vocabulary
        else np.pad(flat, ((0, 0), (0, vocabulary - flat.shape[1]))).view(bool)
    )


def draw(
    logits: Tensor, options: Sequence[SampleOptions], u: Sequence[float], allowed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [R, V] float32 -> (tokens [R], full log-probabilities [R], log-probabilities drawn from [R]).

    Greedy rows (temperature 0) take the most probable allowed token; its drawn-from log-probability is 0: nothing was left to chance.
    """
    full = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    masked = full if allowed is None else full.masked_fill(~allowed, float("-inf"))
    tokens = masked.argmax(dim=-1)
    drawn = torch.zeros(len(tokens))
    warm = [i for i, option in enumerate(options) if option.temperature > 0]
    if warm:
        temperatures = torch.tensor([options[i].temperature for i in warm])[:, None]
        log_p = torch.log_softmax(masked[warm] / temperatures, dim=-1)
        log_p = _truncate(log_p, [options[i] for i in warm])
        cumulative = log_p.exp().cumsum(dim=-1)
        total = cumulative[:, -1:]
        # strictly below the total (u may round up to 1 in float32): then the running sum rises past it at a token of positive
        # probability, never at one that the mask or the truncation took away
        wanted = torch.minimum(torch.tensor([u[i] for i in warm])[:, None] * total, torch.nextafter(total, torch.zeros(1)))
        chosen = torch.searchsorted(cumulative, wanted, right=True)
        tokens[warm] = chosen[:, 0]
        drawn[warm] = log_p.gather(1, chosen)[:, 0]
    return tokens, full.gather(1, tokens[:, None])[:, 0], drawn


def _truncate(log_p: Tensor, options: Sequence[SampleOptions]) -> Tensor:
    """top-k, then top-p, renormalised; rows that ask for neither are untouched and nothing is sorted for them."""
    rows = [i for i, option in enumerate(options) if option.top_k > 0 or option.top_p < 1]
    if not rows:
        return log_p
    part = log_p[rows]
    values, order = part.sort(dim=-1, descending=True)
    rank = torch.arange(part.shape[1])
    ks = torch.tensor([options[i].top_k or part.shape[1] for i in rows])[:, None]
    ps = torch.tensor([options[i].top_p for i in rows])[:, None]
    before = values.exp().cumsum(dim=-1) - values.exp()
    keep = (rank[None] < ks) & ((before < ps) | (rank[None] == 0))
    kept = torch.full_like(part, float("-inf")).scatter(1, order, values.masked_fill(~keep, float("-inf")))
    out = log_p.clone()
    out[rows] = torch.log_softmax(kept, dim=-1)
    return out
