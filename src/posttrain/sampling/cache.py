"""Key/value cache of a decoding batch: trunks that rows share, one private strip per row, attention merged from the two.

Axis letters: R rows, N new tokens (flat, all rows), n new tokens of one row, G query heads per key head, S cached tokens, P trunk
tokens, D head size, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Trunk:
    """A prefix that every row of the batch starts with. keys[l], values[l] are [Hkv, P, D]."""

    length: int
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def nbytes(self) -> int:
        return 2 * sum(k.numel() * k.element_size() for k in self.keys)


class Cache:
    """Private strips keys[l], values[l] [rows, Hkv, capacity, D]; `lengths` [rows] counts the tokens each row holds after its trunk,
    `trunk_of` [rows] says which of `trunks` that is. The strips' memory is taken when the first keys and values show their shape."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.trunks: list[Trunk] = []
        self._unused: list[int] = []  # numbers of trunks that were dropped
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.trunk_of = torch.zeros(rows, dtype=torch.int64)

    def add(self, trunk: Trunk) -> int:
        """Take in a trunk; its number."""
        if self._unused:
            number = self._unused.pop()
            self.trunks[number] = trunk
            return number
        self.trunks.append(trunk)
        return len(self.trunks) - 1

    def drop(self, number: int) -> None:
        """Forget a trunk that no row hangs on; its number may be given to another."""
        self.trunks[number] = Trunk(0, [], [])
        self._unused.append(number)

    def reserve(self, rows: int, capacity: int) -> None:
        """Room for at least so many rows of so many tokens; what the rows hold is kept. Grows by half at least, so that a stream of
        requests settles on one size."""
        if rows <= self.rows and capacity <= self.capacity:
            return
        before, held = self.rows, self.capacity
        if rows > before:
            self.rows = max(rows, before + before // 2)
            self.lengths = torch.cat([self.lengths, torch.zeros(self.rows - before, dtype=torch.int64)])
            self.trunk_of = torch.cat([self.trunk_of, torch.zeros(self.rows - before, dtype=torch.int64)])
        if capacity > held:
            self.capacity = max(capacity, held + held // 2)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_zeros(self.rows, old.shape[1], self.capacity, old.shape[3])
                tensors[layer][:before, :, :held] = old

    def fill(self, first: int, prompts: list[Tensor], trunks: list[int], sink: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Copy prefilled prompts, each given by the pack rows that follow its trunk, into the rows from `first` on."""
        counts = torch.tensor([len(rows) for rows in prompts])
        source = torch.cat(prompts)
        row = torch.repeat_interleave(torch.arange(first, first + len(prompts)), counts)
        slot = torch.cat([torch.arange(int(count)) for count in counts])
        if not self.keys:
            self._take([sink[layer][0][0] for layer in sorted(sink)])
        row, slot, source = (index.to(self.keys[0].device) for index in (row, slot, source))
        for layer, (k, v) in sink.items():  # [T, Hkv, D] is how they lie in memory: whole tokens are copied
            self.keys[layer][row, :, slot] = k[0].transpose(0, 1)[source]
            self.values[layer][row, :, slot] = v[0].transpose(0, 1)[source]
        self.lengths[first : first + len(prompts)] = counts
        self.trunk_of[first : first + len(prompts)] = torch.tensor(trunks)

    def _take(self, like: list[Tensor]) -> None:
        """Allocate for layers with keys like these [Hkv, *, D]."""
        self.keys = [k.new_zeros(self.rows, k.shape[0], self.capacity, k.shape[2]) for k in like]
        self.values = [torch.zeros_like(k) for k in self.keys]

    def copy(self, row: int) -> tuple[list[Tensor], list[Tensor]]:
        """What a row holds: keys and values per layer, [Hkv, length, D]."""
        count = int(self.lengths[row])
        return [k[row, :, :count].clone() for k in self.keys], [v[row, :, :count].clone() for v in self.values]

    def restore(self, row: int, keys: list[Tensor], values: list[Tensor], trunk: int) -> None:
        """Give a row what `copy` took, on the trunk that it hung on."""
        count = keys[0].shape[1]
        if not self.keys:
            self._take(keys)
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            self.keys[layer][row, :, :count] = k
            self.values[layer][row, :, :count] = v
        self.lengths[row], self.trunk_of[row] = count, trunk

    def move(self, source: int, target: int) -> None:
        """Overwrite row `target` with row `source`, so that the rows in use stay the first ones."""
        count = int(self.lengths[source])
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, :, :count] = tensor[source, :, :count]
        self.lengths[target], self.trunk_of[target] = count, self.trunk_of[source]


_CALL = 2000  # pairs of a query and a key whose attention takes as long as one call more


@dataclass(frozen=True, slots=True)
class _Part:
    """Neighbouring rows whose attention is one product, padded to the widest and the longest of them: `rows` and their new `tokens` are
    slices, so that no strip is copied; `place`: where their tokens go in [rows * width] (None: no row is padded); `bias`: what each may
    see, additive [rows, 1, group * width (or 1), span]."""

    rows: slice
    tokens: slice
    place: Tensor | None
    width: int
    span: int
    bias: Tensor


class StepAttention:
    """Attention of one decoding step: new tokens, flat and grouped by row, see their trunk, their row's strip and each other causally.

    Strips and trunks are attended to apart and merged by their log-sum-exps (Juravsky 2024, Hydragen): a trunk's part is one product
    for all its rows, the strips' reads what the rows hold and little padding.
    """

    def __init__(self, cache: Cache, counts: list[int]) -> None:
        """`counts[r]` is the number of new tokens of row r, at least one; rows are 0..R-1."""
        self.cache, rows = cache, len(counts)
        new = torch.tensor(counts)
        self.row = torch.repeat_interleave(torch.arange(rows), new)
        ends = torch.cumsum(new, 0)
        offset = torch.arange(len(self.row)) - (ends - new)[self.row]  # index of a token among its row's new tokens
        self.slot = cache.lengths[:rows][self.row] + offset  # where in the strip it goes
        trunk_of = cache.trunk_of[:rows][self.row]
        self.positions = self.slot + torch.tensor([trunk.length for trunk in cache.trunks])[trunk_of]
        # trunks with their queries; None: every query
        self._trunks: list[tuple[Trunk, Tensor | None]] = []
        for number, trunk in enumerate(cache.trunks):
            asking = trunk_of == number
            if trunk.length and asking.any():
                self._trunks.append((trunk, None if asking.all() else asking.nonzero()[:, 0]))
        self._parts: dict[int | None, list[_Part]] = {}
        self._counts, self._spans = counts, (cache.lengths[:rows] + new).tolist()
        self._ends = [0, *ends.tolist()]
        # once a step, not once a layer
        self._device = cache.keys[0].device
        self.row, self.slot, self.positions = (index.to(self._device) for index in (self.row, self.slot, self.positions))
        self._trunks = [(trunk, None if asking is None else asking.to(self._device)) for trunk, asking in self._trunks]

    def commit(self, counts: list[int]) -> None:
        self.cache.lengths[: len(counts)] += torch.tensor(counts)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.row, :, self.slot] = k[0].transpose(0, 1)
        values[self.row, :, self.slot] = v[0].transpose(0, 1)
        _, heads, count, size = q.shape
        group = heads // keys.shape[1]
        q_nkgd = q[0].transpose(0, 1).reshape(count, -1, group, size)
        if window not in self._parts:
            self._parts[window] = self._split(window, group)
        parts = self._parts[window]
        if len(parts) == 1:
            out, lse = self._strips(parts[0], q_nkgd, keys, values, scale)
        else:
            out, lse = torch.empty_like(q_nkgd), q_nkgd.new_empty(q_nkgd.shape[:3], dtype=torch.float32)
            for part in parts:
                out[part.tokens], lse[part.tokens] = self._strips(part, q_nkgd[part.tokens], keys, values, scale)
        for trunk, asking in self._trunks:
            if asking is None:
                out = _with_trunk(trunk, layer, q_nkgd, self.positions, scale, window, out, lse)
            else:
                asked = q_nkgd[asking], self.positions[asking]
                out[asking] = _with_trunk(trunk, layer, *asked, scale, window, out[asking], lse[asking])
        return out.reshape(1, count, heads, size).transpose(1, 2)

    def _split(self, window: int | None, group: int) -> list[_Part]:
        """Neighbours together as long as what they are padded by costs less than a call more."""
        parts, start = [], 0
        width, span = self._counts[0], self._spans[0]
        for row in range(1, len(self._counts)):
            wider, longer = max(width, self._counts[row]), max(span, self._spans[row])
            apart = (row - start) * width * span + self._counts[row] * self._spans[row]
            if (row - start + 1) * wider * longer <= apart + _CALL:
                width, span = wider, longer
            else:
                parts.append(self._part(start, row, window, group))
                start, width, span = row, self._counts[row], self._spans[row]
        return [*parts, self._part(start, len(self._counts), window, group)]

    def _part(self, start: int, stop: int, window: int | None, group: int) -> _Part:
        counts = self._counts[start:stop]
        width, span = max(counts), max(self._spans[start:stop])
        # query j of a row sees strip slots up to the row's old length + j
        last = self.cache.lengths[start:stop, None] + torch.arange(width)
        slots = torch.arange(span)
        seen = slots <= last[..., None]
        if window is not None:
            seen &= slots > last[..., None] - window
            seen[..., 0] |= ~seen.any(-1)  # a padded query may lie beyond every slot; it is thrown away, but must not be nan
        bias = torch.zeros(seen.shape, dtype=self.cache.keys[0].dtype).masked_fill_(~seen, float("-inf"))[:, None]
        place = None
        if min(counts) < width:
            place = torch.cat([torch.arange(row * width, row * width + count) for row, count in enumerate(counts)]).to(
                self._device
            )
        if width > 1:
            bias = bias.repeat(1, 1, group, 1)  # once a step, not once a layer
        tokens = slice(self._ends[start], self._ends[stop])
        return _Part(slice(start, stop), tokens, place, width, span, bias.to(self._device))

    @staticmethod
    def _strips(part: _Part, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention [n, Hkv, G, D] of the part's new tokens q to their rows' own strips, and its log-sum-exp [n, Hkv, G]."""
        k, v = keys[part.rows, :, : part.span], values[part.rows, :, : part.span]
        if part.width == 1:
            return attention_with_lse(q, k, v, part.bias, scale)
        (_, kv_heads, group, size), count = q.shape, k.shape[0]
        if part.place is not None:
            padded = q.new_zeros(count * part.width, kv_heads, group, size)
            padded[part.place] = q
            q = padded
        asked = q.view(count, part.width, kv_heads, group, size).permute(0, 2, 3, 1, 4)
        mixed, total = attention_with_lse(asked.reshape(count, kv_heads, group * part.width, size), k, v, part.bias, scale)
        mixed = mixed.view(count, kv_heads, group, part.width, size).permute(0, 3, 1, 2, 4).reshape(-1, kv_heads, group, size)
        total = total.view(count, kv_heads, group, part.width).permute(0, 3, 1, 2).reshape(-1, kv_heads, group)
        return (mixed, total) if part.place is None else (mixed[part.place], total[part.place])


def _with_trunk(
    trunk: Trunk, layer: int, q: Tensor, positions: Tensor, scale: float, window: int | None, own: Tensor, own_lse: Tensor
) -> Tensor:
    """The strips' attention `own` [N, Hkv, G, D] merged with that of every query q [N, Hkv, G, D] to the one trunk."""
    count, kv_heads, group, size = q.shape
    asked = q.permute(1, 0, 2, 3).reshape(1, kv_heads, count * group, size)
    bias = blind = None
    if window is not None:
        near = torch.arange(trunk.length, device=positions.device) > positions[:, None] - window
        if not near.any():
            return own
        bias = q.new_zeros(near.shape).masked_fill_(~near, float("-inf"))
        bias, blind = bias.repeat_interleave(group, 0)[None, None], ~near.any(-1)
    mixed, total = attention_with_lse(asked, trunk.keys[layer][None], trunk.values[layer][None], bias, scale)
    shared = mixed.view(kv_heads, count, group, size).transpose(0, 1)
    shared_lse = total.view(kv_heads, count, group).transpose(0, 1)
    merged = torch.lerp(own, shared, torch.sigmoid(shared_lse - own_lse).unsqueeze(-1).to(own.dtype))
    return merged if blind is None else torch.where(blind[:, None, None, None], own, merged)  # blind: the window ends before


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale + bias) v and the log of its denominator. q [B, H, n, D], k and v [B, H, S, D], bias [B, 1, 1 or n, S];
    returns [B, H, n, D] and [B, H, n] float32."""
    if q.device.type == "cpu":
        if bias is not None:
            bias = bias.expand(-1, -1, q.shape[2], -1)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
        return out, lse
    scores = torch.matmul(q, k.transpose(2, 3)).float().mul_(scale)
    if bias is not None:
        scores += bias
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    return torch.matmul(weights.to(v.dtype), v).div_(total.to(v.dtype)), (total.log_() + top)[..., 0]


def trunk_of(rows: Tensor, sink: dict[int, tuple[Tensor, Tensor]]) -> Trunk:
    """The prefilled tokens at these rows of a pack, as a trunk (no rows: no sharing)."""
    keys, values = ([sink[layer][i][0, :, rows].contiguous() for layer in sorted(sink)] for i in (0, 1))
    return Trunk(len(rows), keys, values)
