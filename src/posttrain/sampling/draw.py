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
_ALONE = 1 << 14  # elements that torch computes without waking its threads
_HEAD = 512  # candidates of top-p looked at first


def uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """The `count` uniform numbers of a request: a function of its seed alone, so a neighbour in the batch changes nothing."""
    return np.random.default_rng(seed & (2**63 - 1)).random(count)


class Allowed:
    """The packed masks of a batch, int32 [R, ceil(V/32)], least significant bit first, row by row as weights are multiplied by them."""

    def __init__(self, bits: NDArray[np.int32], vocabulary: int) -> None:
        self._bytes, self._vocabulary = bits.view(np.uint8), vocabulary

    def __getitem__(self, row: int) -> Tensor:
        """[V] float32: 1 allowed, 0 forbidden."""
        flat = _SPREAD.take(self._bytes[row], axis=0).reshape(-1)
        missing = self._vocabulary - len(flat)
        return torch.from_numpy(np.pad(flat, (0, missing)) if missing > 0 else flat[: self._vocabulary])


# a byte of a mask as eight weights: one look-up is a third of the time of unpacking bits and converting them
_SPREAD = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.float32)


def draw(
    logits: Tensor,
    options: Sequence[SampleOptions],
    u: Sequence[float],
    allowed: Allowed | Tensor | None,
    context: Sequence[Callable[[], Sequence[int]]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [R, V] float32, allowed [R, V] (0: forbidden, 1: allowed) -> (tokens [R], full log-probabilities [R], log-probabilities
    drawn from [R]).

    A row takes the token in whose stretch of the unit interval its number u falls. Greedy rows take the most probable
    allowed token; its drawn-from log-probability is 0: nothing was left to chance. `context` gives a row's prompt and answer so far,
    asked for only where a repetition penalty needs it. The full log-probabilities know neither mask nor options.
    """
    tokens = _argmax(logits)
    top = logits.gather(1, tokens[:, None])
    weights = (logits - top).exp_()
    normaliser = top[:, 0] + weights.sum(dim=-1).log_()
    # most rows are drawn from these very weights, less what the mask forbids; the others have weights of their own. Row by row, as a
    # row and its mask stay in a core's cache from one operation to the next, and by numpy, as torch would wake its threads for each
    for i, option in enumerate(options):
        mask = None if allowed is None else allowed[i]
        fits = (mask is None or bool(mask[tokens[i]])) and option.repetition_penalty == 1
        if not fits or not (option.greedy or option.temperature == 1):
            scores = _penalised(logits[i], option, None if context is None else context[i])
            if not fits:
                tokens[i] = _best(scores, mask)
            if not option.greedy:
                _weigh(weights[i], scores, tokens[i], option.temperature)
        if mask is not None and not option.greedy:
            np.multiply(weights[i].numpy(), mask.float().numpy(), out=weights[i].numpy())
    drawn = torch.zeros(len(tokens))
    warm = [i for i, option in enumerate(options) if not option.greedy]
    if warm:
        weights = weights if len(warm) == len(tokens) else weights[warm]
        for row, i in enumerate(warm):
            _cut(weights[row], options[i])
        chosen = _inverse_cdf(weights, torch.tensor([u[i] for i in warm], dtype=torch.float64))
        tokens[warm] = chosen
        drawn[warm] = (weights.gather(1, chosen[:, None])[:, 0] / weights.sum(dim=-1)).log()
    return tokens, logits.gather(1, tokens[:, None])[:, 0] - normaliser, drawn


def _argmax(scores: Tensor) -> Tensor:
    """[R, V] -> [R], the first of equals. numpy's takes a twentieth of the time of torch's on a CPU."""
    return torch.from_numpy(scores.numpy(force=True).argmax(axis=1))


def _best(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The best allowed token of one row [V]."""
    row = scores.numpy()
    # adding 0 or a number below all scores is exact for what is allowed, and a quarter of masked_fill's time
    return torch.tensor((row if mask is None else row + (mask.float().numpy() - 1) * np.float32(1e30)).argmax())


def _penalised(logits: Tensor, option: SampleOptions, context: Callable[[], Sequence[int]] | None) -> Tensor:
    """Scores of tokens already in the context of one row [V] divided (positive) or multiplied (negative) by the penalty (Keskar 2019,
    eq. 4)."""
    if option.repetition_penalty == 1:
        return logits
    assert context is not None, "a repetition penalty needs the rows' contexts"
    seen, out = torch.tensor(sorted(set(context()))), logits.clone()
    values, penalty = out[seen], option.repetition_penalty
    out[seen] = torch.where(values > 0, values / penalty, values * penalty)
    return out


def _weigh(weights: Tensor, scores: Tensor, best: Tensor, temperature: float) -> None:
    """Set one row [V] to the unnormalised probabilities of tempered scores: 1 for the best allowed token, at most 1 for those that a mask
    takes away afterwards."""
    # forbidden scores may lie above the best allowed one; exp of -inf in their place would take twenty times as long
    row, plain = weights.numpy(), scores.numpy()
    np.subtract(plain, plain[int(best)], out=row)
    np.minimum(row, 0, out=row)
    if temperature != 1:
        np.divide(row, np.float32(temperature), out=row)
    for part in torch.split(weights, _ALONE):
        part.exp_()  # torch's, as its last bits are those of the other rows


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
