"""Packs: many sequences as one prefix tree. A token shared by several sequences is computed once, and no sequence is padded (a pass
may round the pack as a whole up, see `Pack.rounded`).

A pack is laid out depth first. A node is a run of tokens `[start, end)` whose ancestors are earlier runs; a token attends to
itself, to what precedes it in its node, and to all its ancestors, at the position it has in its own sequence. That is exactly
causal attention over each separate sequence (objectives.md 1.3, generalised from a list of segments to a tree).

Axis letters: T tokens of the pack, B sequences, N predictions (a target token and the row that predicts it), L padded length.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.contract.sequence import Sequence

# A shared prefix shorter than this is cheaper to compute twice than to split a node for.
MIN_SHARED = 8


@dataclass(frozen=True, slots=True)
class Node:
    """A run of tokens of the pack, `[start, end)`; `offset` is the position of its first token; `parent` a node index or -1."""

    start: int
    end: int
    offset: int
    parent: int


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Token ids [T] with their positions [T], the tree, and the predictions asked for.

    rows      [N] int64  row whose hidden state predicts the target
    targets   [N] int64  token to predict
    sequence  [N] int64  which sequence (0..B-1) the prediction belongs to
    step      [N] int64  index of the prediction within its sequence's learned tokens, from 0
    weights   [N] float32
    members   [B]        index of each sequence in the list the pack was filled from
    """

    ids: Tensor
    positions: Tensor
    nodes: tuple[Node, ...]
    rows: Tensor
    targets: Tensor
    sequence: Tensor
    step: Tensor
    weights: Tensor
    members: tuple[int, ...]
    lengths: tuple[int, ...]
    leaves: tuple[int, ...]  # [B] node in which each sequence ends
    ends: tuple[int, ...]  # [B] row of each sequence's last token
    _cache: dict[str, object] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def learned(self) -> int:
        return int((self.weights > 0).sum())

    @classmethod
    def of(cls, sequences: Seq[Sequence], members: Seq[int] | None = None) -> Pack:
        """Pack all of `sequences` (empty ones are an error) into one prefix tree, in the order given."""
        assert sequences and all(len(s) > 0 for s in sequences), "a pack needs non-empty sequences"
        tree = _grow_tree([s.ids for s in sequences])
        ids = np.concatenate(
            [
                sequences[owner].ids[node.offset : node.offset + node.end - node.start]
                for node, owner in zip(tree.nodes, tree.owners, strict=True)
            ]
        )
        positions = np.concatenate([np.arange(node.offset, node.offset + node.end - node.start) for node in tree.nodes])
        parts = [
            _predictions(s, tree.row_of(leaf, len(s)), b) for b, (s, leaf) in enumerate(zip(sequences, tree.leaves, strict=True))
        ]
        rows, targets, sequence, step, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        return cls(
            torch.from_numpy(ids.astype(np.int64)),
            torch.from_numpy(positions.astype(np.int64)),
            tuple(tree.nodes),
            torch.from_numpy(rows),
            torch.from_numpy(targets),
            torch.from_numpy(sequence),
            torch.from_numpy(step),
            torch.from_numpy(weights),
            tuple(members if members is not None else range(len(sequences))),
            tuple(len(s) for s in sequences),
            tuple(tree.leaves),
            tuple(tree.nodes[leaf].end - 1 for leaf in tree.leaves),
        )

    def to(self, device: torch.device) -> Pack:
        """The pack with its tensors on a device; itself where they are."""
        if self.ids.device == device:
            return self
        names = ("ids", "positions", "rows", "targets", "sequence", "step", "weights")
        return replace(self, **{name: getattr(self, name).to(device) for name in names}, _cache={})

    def rounded(self, multiple: int) -> Pack:
        """The pack with tokens behind its own, up to a multiple of so many, that nobody sees and nothing is asked of: a node of their own,
        all at position 0, which every architecture knows."""
        missing = -self.tokens % multiple
        if not missing:
            return self
        filler = self.ids.new_zeros(missing)
        return replace(
            self,
            ids=torch.cat([self.ids, filler]),
            positions=torch.cat([self.positions, filler]),
            nodes=(*self.nodes, Node(self.tokens, self.tokens + missing, 0, -1)),
            _cache={},
        )

    def ancestors(self, node: int) -> list[int]:
        """Node indices from the root down to, not including, `node`."""
        path: list[int] = []
        parent = self.nodes[node].parent
        while parent >= 0:
            path.append(parent)
            parent = self.nodes[parent].parent
        return path[::-1]

    def reach(self) -> list[int]:
        """Where each node's subtree ends: its tokens and its descendants' are one run from the node's start."""
        ends = [node.end for node in self.nodes]
        for index in range(len(ends) - 1, -1, -1):
            if self.nodes[index].parent >= 0:
                ends[self.nodes[index].parent] = max(ends[self.nodes[index].parent], ends[index])
        return ends

    def sequence_rows(self, b: int) -> Tensor:
        """[length] pack row of every token of sequence b, in order."""
        path = [*self.ancestors(self.leaves[b]), self.leaves[b]]
        return torch.cat([torch.arange(self.nodes[i].start, self.nodes[i].end) for i in path])

    def pad(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[N] values -> [B, L]: row b holds sequence b's learned tokens in order, `fill` after its last."""
        length = int(self.step.max()) + 1 if len(self.step) else 0
        flat = self.sequence * length + self.step
        out = values.new_full((len(self.members) * length,), fill)
        return out.scatter(0, flat, values).view(len(self.members), length)

    def mask(self) -> Tensor:
        """[B, L] float 0/1: which places of `pad` hold a prediction."""
        return self.pad(torch.ones(len(self.rows), device=self.rows.device))

    def padded_weights(self) -> Tensor:
        return self.pad(self.weights)


@dataclass(slots=True)
class _Tree:
    nodes: list[Node]
    owners: list[int]  # a sequence whose tokens the node holds
    leaves: list[int]

    def row_of(self, leaf: int, length: int) -> NDArray[np.int64]:
        """Pack row of every token of the sequence that ends in `leaf`."""
        rows = np.empty(length, dtype=np.int64)
        index = leaf
        while index >= 0:
            node = self.nodes[index]
            rows[node.offset : node.offset + node.end - node.start] = np.arange(node.start, node.end)
            index = node.parent
        return rows


def _grow_tree(sequences: list[NDArray[np.int32]]) -> _Tree:
    """Radix tree over the sequences, laid out depth first; common prefixes under MIN_SHARED are not split off."""
    tree = _Tree([], [], [-1] * len(sequences))
    stack: list[tuple[list[int], int, int]] = [(list(range(len(sequences))), 0, -1)]
    start = 0
    while stack:
        members, offset, parent = stack.pop()
        groups = _split(sequences, members, offset)
        if len(groups) > 1:
            stack += [(group, offset, parent) for group, _ in reversed(groups)]
            continue
        group, end = groups[0]
        tree.nodes.append(Node(start, start + end - offset, offset, parent))
        tree.owners.append(group[0])
        start += end - offset
        index = len(tree.nodes) - 1
        rest = []
        for member in group:
            if len(sequences[member]) == end:
                tree.leaves[member] = index
            else:
                rest.append(member)
        if rest:
            stack.append((rest, end, index))
    return tree


def _split(sequences: list[NDArray[np.int32]], members: list[int], offset: int) -> list[tuple[list[int], int]]:
    """Partition members by their next tokens; each part with the position up to which it stays together."""
    parts: list[tuple[list[int], int]] = []
    for member in members:
        ids = sequences[member]
        for index, (group, end) in enumerate(parts):
            shared = _shared(sequences[group[0]], ids, offset, end)
            if shared == min(end, len(ids)) or shared - offset >= MIN_SHARED:
                parts[index] = ([*group, member], shared)
                break
        else:
            parts.append(([member], len(ids)))
    return parts


def _shared(a: NDArray[np.int32], b: NDArray[np.int32], offset: int, end: int) -> int:
    """Position up to which a and b agree, given that they agree before `offset`, looking no further than `end`."""
    stop = min(end, len(a), len(b))
    differs = np.nonzero(a[offset:stop] != b[offset:stop])[0]
    return offset + int(differs[0]) if len(differs) else stop


def _predictions(
    sequence: Sequence, rows: NDArray[np.int64], index: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    learned = np.nonzero(sequence.weights > 0)[0]
    return (
        rows[learned - 1],  # position t-1 predicts token t, once
        sequence.ids[learned].astype(np.int64),
        np.full(len(learned), index, dtype=np.int64),
        np.arange(len(learned), dtype=np.int64),
        sequence.weights[learned],
    )


def fill_packs(sequences: Seq[Sequence], budget: int, units: Iterable[Seq[int]] | None = None) -> list[Pack]:
    """Fill packs of at most `budget` distinct tokens. `units` are lists of indices that must stay in one pack (a preference
    pair, a group of samples); by default every sequence is its own unit. A unit larger than the budget gets a pack of its own.

    Units are placed longest first (best-fit decreasing); each goes to the open pack it shares the most with and still fits.
    """
    whole = [[i] for i in range(len(sequences))] if units is None else [list(unit) for unit in units]
    packs: list[list[int]] = []
    sizes: list[int] = []
    owns = [_cost([], unit, sequences) for unit in whole]
    for own, unit in sorted(zip(owns, whole, strict=True), key=lambda pair: -pair[0]):
        costs = [_cost(pack, unit, sequences) for pack in packs]
        fitting = [index for index, cost in enumerate(costs) if sizes[index] + cost <= budget]
        for index in sorted(fitting, key=lambda i: costs[i] - own):
            size = _size(packs[index] + unit, sequences)
            if size <= budget:
                packs[index] += unit
                sizes[index] = size
                break
        else:
            packs.append(list(unit))
            sizes.append(_size(unit, sequences))
    return [Pack.of([sequences[i] for i in pack], pack) for pack in packs]


def _size(pack: list[int], sequences: Seq[Sequence]) -> int:
    """Tokens of the pack these sequences make."""
    return _grow_tree([sequences[i].ids for i in pack]).nodes[-1].end


def _cost(pack: list[int], unit: Seq[int], sequences: Seq[Sequence]) -> int:
    """About the tokens a unit adds to a pack: its own, less what it shares with one member already there. The tree may add a few
    more, where a new fork leaves a piece too short to share."""
    present = [sequences[i].ids for i in pack]
    total = 0
    for i in unit:
        ids = sequences[i].ids
        shared = max((_shared(other, ids, 0, len(ids)) for other in present), default=0)
        total += len(ids) - (shared if shared >= MIN_SHARED else 0)
        present.append(ids)
    return total
