"""Key/value cache of a decoding batch: one shared trunk, one private strip per row, attention merged from the two.

Axis letters: R rows, N new tokens (flat, all rows), n new tokens of one row, G query heads per key head, S cached tokens, P trunk
tokens, D head size, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.policy.pack import Pack


@dataclass(slots=True)
class Trunk:
    """A prefix that every row of the batch starts with. keys[l], values[l] are [Hkv, P, D]."""

    length: int
    keys: list[Tensor]
    values: list[Tensor]


class Cache:
    """Private strips keys[l], values[l] [rows, Hkv, capacity, D]; `lengths` [rows] counts the tokens each row holds."""

    def __init__(self, trunk: Trunk, layers: int, rows: int, capacity: int) -> None:
        kv_heads, _, size = trunk.keys[0].shape
        like = trunk.keys[0]
        self.trunk = trunk
        self.keys = [like.new_zeros(rows, kv_heads, capacity, size) for _ in range(layers)]
        self.values = [like.new_zeros(rows, kv_heads, capacity, size) for _ in range(layers)]
        self.lengths = torch.zeros(rows, dtype=torch.int64)

    def fill(self, row: int, pack_rows: Tensor, sink: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Copy a prefilled prompt, given by the pack rows that follow the trunk, into a row."""
        count = len(pack_rows)
        for layer, (k, v) in sink.items():
            self.keys[layer][row, :, :count] = k[0].index_select(1, pack_rows)
            self.values[layer][row, :, :count] = v[0].index_select(1, pack_rows)
        self.lengths[row] = count

    def copy(self, row: int) -> tuple[list[Tensor], list[Tensor]]:
        """What a row holds: keys and values per layer, [Hkv, length, D]."""
        count = int(self.lengths[row])
        return [k[row, :, :count].clone() for k in self.keys], [v[row, :, :count].clone() for v in self.values]

    def restore(self, row: int, keys: list[Tensor], values: list[Tensor]) -> None:
        """Give a row what `copy` took."""
        count = keys[0].shape[1]
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            self.keys[layer][row, :, :count] = k
            self.values[layer][row, :, :count] = v
        self.lengths[row] = count

    def move(self, source: int, target: int) -> None:
        """Overwrite row `target` with row `source`, so that the rows in use stay the first ones."""
        count = int(self.lengths[source])
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, :, :count] = tensor[source, :, :count]
        self.lengths[target] = count


class StepAttention:
    """Attention of one decoding step: new tokens, flat and grouped by row, see the trunk, their row's strip and each other causally."""

    def __init__(self, cache: Cache, counts: list[int]) -> None:
        """`counts[r]` is the number of new tokens of row r, at least one; rows are 0..R-1."""
        self.cache, rows = cache, len(counts)
        new = torch.tensor(counts)
        self.row = torch.repeat_interleave(torch.arange(rows), new)
        starts = torch.cumsum(new, 0) - new
        self.offset = torch.arange(len(self.row)) - starts[self.row]  # index of a token among its row's new tokens
        self.slot = cache.lengths[:rows][self.row] + self.offset  # where in the strip it goes
        self.positions = self.slot + cache.trunk.length
        self.span = int(self.slot.max()) + 1
        self._parts = [
            self._part(torch.tensor([r for r, c in enumerate(counts) if (c > 1) == several]), new) for several in (False, True)
        ]

    def _part(self, rows: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor, int] | None:
        """Rows with one new token and rows with several are computed apart, so that the many singles pay for no padding.
        Returns (rows, flat indices of their tokens, allowed [rows, n, S], n)."""
        if len(rows) == 0:
            return None
        width = int(new[rows].max())
        flat = torch.isin(self.row, rows).nonzero()[:, 0]
        # query j of row r sees strip slots up to the row's old length + j; padded queries see the same as the last
        last = self.cache.lengths[rows][:, None] + torch.arange(width)[None]
        allowed = torch.arange(self.span)[None, None] <= last[:, :, None]
        return rows, flat, allowed, width

    def commit(self, counts: list[int]) -> None:
        self.cache.lengths[: len(counts)] += torch.tensor(counts)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.row, :, self.slot] = k[0].transpose(0, 1)
        values[self.row, :, self.slot] = v[0].transpose(0, 1)
        out = torch.empty_like(q)
        for part in self._parts:
            if part is not None:
                rows, flat, allowed, width = part
                out[0, :, flat] = self._attend(layer, q[0, :, flat], rows, flat, allowed, width, scale, window)
        return out

    def _attend(
        self, layer: int, q_hnd: Tensor, rows: Tensor, flat: Tensor, allowed: Tensor, width: int, scale: float, window: int | None
    ) -> Tensor:
        heads, _, size = q_hnd.shape
        trunk = self.cache.trunk
        kv_heads = trunk.keys[layer].shape[0]
        whole = len(rows) == int(self.row.max()) + 1
        k = self.cache.keys[layer][: len(rows), :, : self.span] if whole else self.cache.keys[layer][rows, :, : self.span]
        v = self.cache.values[layer][: len(rows), :, : self.span] if whole else self.cache.values[layer][rows, :, : self.span]
        group = heads // kv_heads
        q = q_hnd.new_zeros(len(rows), width, heads, size)
        local = torch.searchsorted(rows, self.row[flat])
        q[local, self.offset[flat]] = q_hnd.transpose(0, 1)
        q = (
            q.view(len(rows), width, kv_heads, group, size)
            .permute(0, 2, 3, 1, 4)
            .reshape(len(rows), kv_heads, group * width, size)
        )
        mask = allowed if window is None else allowed & self._within(rows, width, window)
        own = torch.matmul(q, k.transpose(2, 3)).float() * scale
        own = own.view(len(rows), kv_heads, group, width, -1).masked_fill_(~mask[:, None, None], float("-inf")).view_as(own)
        shared = self._trunk_scores(layer, q, rows, width, scale, window)
        top = (
            torch.maximum(own.amax(-1, keepdim=True), shared.amax(-1, keepdim=True))
            if shared.shape[-1]
            else own.amax(-1, keepdim=True)
        )
        own, shared = (own - top).exp_(), (shared - top).exp_()
        total = own.sum(-1, keepdim=True) + shared.sum(-1, keepdim=True)
        mixed = torch.matmul(own.to(v.dtype), v)
        if shared.shape[-1]:
            flat_shared = shared.to(v.dtype).transpose(0, 1).reshape(kv_heads, -1, trunk.length)
            mixed = mixed + torch.matmul(flat_shared, trunk.values[layer]).view(
                kv_heads, len(rows), group * width, size
            ).transpose(0, 1)
        mixed = (mixed.float() / total).to(q_hnd.dtype)
        mixed = mixed.view(len(rows), kv_heads, group, width, size).permute(0, 3, 1, 2, 4).reshape(len(rows), width, heads, size)
        return mixed[local, self.offset[flat]].transpose(0, 1)

    def _trunk_scores(self, layer: int, q: Tensor, rows: Tensor, width: int, scale: float, window: int | None) -> Tensor:
        """[R, Hkv, G*n, P]: every row's queries against the one trunk, as one matrix product per key head."""
        trunk = self.cache.trunk
        kv_heads, count = q.shape[1], q.shape[2]
        flat = q.transpose(0, 1).reshape(kv_heads, -1, q.shape[-1])
        scores = torch.matmul(flat, trunk.keys[layer].transpose(1, 2)).float() * scale
        scores = scores.view(kv_heads, len(rows), count, trunk.length).transpose(0, 1)
        if window is None or trunk.length == 0:
            return scores
        positions = self.cache.lengths[rows][:, None] + torch.arange(width)[None] + trunk.length
        near = torch.arange(trunk.length)[None, None] > positions[:, :, None] - window
        shaped = scores.reshape(len(rows), kv_heads, -1, width, trunk.length)
        return shaped.masked_fill(~near[:, None, None], float("-inf")).view(len(rows), kv_heads, count, trunk.length)

    def _within(self, rows: Tensor, width: int, window: int) -> Tensor:
        last = self.cache.lengths[rows][:, None] + torch.arange(width)[None]
        return torch.arange(self.span)[None, None] > last[:, :, None] - window


def trunk_of(length: int, pack: Pack | None, sink: dict[int, tuple[Tensor, Tensor]]) -> Trunk:
    """The first `length` tokens of a prefilled single-sequence pack, as a trunk (length 0: no sharing)."""
    return Trunk(
        length,
        [sink[layer][0][0, :, :length].contiguous() for layer in sorted(sink)],
        [sink[layer][1][0, :, :length].contiguous() for layer in sorted(sink)],
    )
