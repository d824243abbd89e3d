"""Drawing one token per row: grammar mask, repetition penalty, temperature, truncation, and both log-probabilities.

No pass over the vocabulary that is not needed: no sort, no multinomial, no running sum over all of it. Axis letters: R rows,
V vocabulary, W rows that are not greedy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from posttrain.sampling.protocol import SampleOptions

_BLOCK = 256  # tokens summed together before one of them is looked for
_HEAD = 512  # candidates of top-p looked at first


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
    logits: Tensor,
    options: Sequence[SampleOptions],
    u: Sequence[float],
    allowed: Tensor | None,
    context: Sequence[Callable[[], Sequence[int]]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [R, V] float32 -> (tokens [R], full log-probabilities [R], log-probabilities drawn from [R]).

    A row takes the token in whose stretch of the unit interval its number u falls. Greedy rows (temperature 0) take the most probable
    allowed token; its drawn-from log-probability is 0: nothing was left to chance. `context` gives a row's prompt and answer so far,
    asked for only where a repetition penalty needs it. The full log-probabilities know neither mask nor options.
    """
    normaliser = torch.logsumexp(logits, dim=-1)
    scores = _penalised(logits, options, context)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    tokens = scores.argmax(dim=-1)
    drawn = torch.zeros(len(tokens))
    warm = [i for i, option in enumerate(options) if option.temperature > 0]
    if warm:
        rows = scores if len(warm) == len(tokens) else scores[warm]
        weights = _weights(rows, tokens[warm], [options[i] for i in warm])
        chosen = _inverse_cdf(weights, torch.tensor([u[i] for i in warm], dtype=torch.float64))
        tokens[warm] = chosen
        drawn[warm] = (weights.gather(1, chosen[:, None])[:, 0] / weights.sum(dim=-1)).log()
    return tokens, logits.gather(1, tokens[:, None])[:, 0] - normaliser, drawn


def _penalised(logits: Tensor, options: Sequence[SampleOptions], context: Sequence[Callable[[], Sequence[int]]] | None) -> Tensor:
    """Scores of tokens already in the context divided (positive) or multiplied (negative) by the penalty (Keskar 2019, eq. 4)."""
    rows = [i for i, option in enumerate(options) if option.repetition_penalty != 1]
    if not rows:
        return logits
    assert context is not None, "a repetition penalty needs the rows' contexts"
    out = logits.clone()
    for row in rows:
        seen = torch.tensor(sorted(set(context[row]())))
        values, penalty = out[row, seen], options[row].repetition_penalty
        out[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
    return out


def _weights(scores: Tensor, best: Tensor, options: Sequence[SampleOptions]) -> Tensor:
    """Unnormalised probabilities [W, V] of tempered and truncated scores; the best token's is 1, what is cut has 0."""
    temperatures = torch.tensor([option.temperature for option in options])[:, None]
    weights = scores - scores.gather(1, best[:, None])
    if (temperatures != 1).any():
        weights.div_(temperatures)
    weights.exp_()
    for row, option in enumerate(options):
        if option.top_k or option.top_p < 1 or option.min_p:
            _cut(weights[row], option)
    return weights


def _cut(weights: Tensor, option: SampleOptions) -> None:
    """Set to 0, in place, what top-k, then top-p, then min-p take away from one row [V]. Equals of the last one kept are kept too."""
    if 0 < option.top_k < len(weights):
        weights.masked_fill_(weights < weights.topk(option.top_k).values[-1], 0)
    if option.top_p < 1:
        wanted, size = option.top_p * float(weights.sum(dtype=torch.float64)), min(_HEAD, len(weights))
        while True:  # the head is nearly always short; a flat distribution may need more of it
            head = weights.topk(size).values
            before = head.cumsum(0, dtype=torch.float64) - head
            if size == len(weights) or float(before[-1]) >= wanted:
                break
            size = min(8 * size, len(weights))
        kept = max(1, int((before < wanted).sum()))
        weights.masked_fill_(weights < head[kept - 1], 0)
    if option.min_p:
        weights.masked_fill_(weights < option.min_p, 0)  # the best token's weight is 1 (Nguyen 2024)


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """For each row of weights [W, V], at least one of them positive, the token where the running sum rises past u [W] times the total.

    In two steps, blocks then tokens of one block: a running sum over the vocabulary is slow, and in float32 not exact enough.
    """
    count, vocabulary = weights.shape
    if vocabulary % _BLOCK:
        weights = F.pad(weights, (0, -vocabulary % _BLOCK))
    blocks = weights.view(count, -1, _BLOCK)
    block, share = _past(blocks.sum(dim=-1), u)
    token, _ = _past(blocks[torch.arange(count), block], share)
    return block * _BLOCK + token


def _past(values: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Where u [W] of each row's total lies in values [W, n]: the entry, and how far into it, as a share of the entry."""
    running = values.cumsum(dim=-1, dtype=torch.float64)
    total = running[:, -1:]
    # strictly below the total: then the running sum rises past it at an entry that is positive
    wanted = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    entry = torch.searchsorted(running, wanted, right=True)
    size = values.gather(1, entry).to(torch.float64)
    share = (wanted - (running.gather(1, entry) - size)) / size
    return entry[:, 0], share[:, 0].clamp_(0, 1)
