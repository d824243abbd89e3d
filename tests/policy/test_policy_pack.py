"""The prefix tree: every sequence can be read back, nothing shared is stored twice, and packs are filled as promised."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.contract import Sequence
from posttrain.policy import Node, Pack, fill_packs
from posttrain.policy.pack import MIN_SHARED
from tiny_models import sequence

QUICK = settings(max_examples=120, deadline=None)
# few letters and repeated heads, so that prefixes of every length are shared often
HEADS = ([], [1] * (MIN_SHARED - 1), [1] * MIN_SHARED, [2] * 20, [2] * 20 + [3] * 11)
ROWS = st.tuples(st.sampled_from(HEADS), st.lists(st.integers(1, 3), min_size=1, max_size=6)).map(
    lambda parts: parts[0] + parts[1]
)


def learning(ids: Seq[int]) -> Sequence:
    return sequence(ids, [i for i in range(1, len(ids)) if i % 3 or i == len(ids) - 1])


def pack_of(*rows: Seq[int]) -> Pack:
    return Pack.of([learning(ids) for ids in rows])


def test_a_single_sequence_is_one_node() -> None:
    pack = pack_of([4, 5, 6])
    assert pack.nodes == (Node(0, 3, 0, -1),)
    assert pack.ids.tolist() == [4, 5, 6] and pack.positions.tolist() == [0, 1, 2]
    assert (pack.tokens, pack.lengths, pack.leaves, pack.ends) == (3, (3,), (0,), (2,))


def test_a_shared_prefix_is_stored_once_and_its_branches_start_at_its_end() -> None:
    prefix = list(range(10, 20))
    pack = pack_of([*prefix, 1, 2], [*prefix, 3])
    assert pack.nodes == (Node(0, 10, 0, -1), Node(10, 12, 10, 0), Node(12, 13, 10, 0))
    assert pack.ids.tolist() == [*prefix, 1, 2, 3]
    assert pack.positions.tolist() == [*range(10), 10, 11, 10]
    assert pack.ancestors(2) == [0] and pack.ancestors(0) == []


def test_prefixes_nest() -> None:
    trunk, branch = [1] * 10, [2] * 10
    pack = pack_of(trunk + branch + [5], [*trunk, 7, 7], trunk + branch + [6])
    assert pack.tokens == 10 + 10 + 1 + 1 + 2
    assert pack.ancestors(pack.leaves[2]) == [0, 1]
    assert pack.sequence_rows(2).tolist() == [*range(20), 21]


def test_a_rounded_pack_asks_the_same_of_the_same_tokens() -> None:
    pack = pack_of([*range(10, 20), 1, 2], [*range(10, 20), 3])
    rounded = pack.rounded(8)
    assert rounded.tokens == 16 and rounded.ids[:13].equal(pack.ids) and rounded.positions[:13].equal(pack.positions)
    assert rounded.nodes == (*pack.nodes, Node(13, 16, 0, -1)) and rounded.reach()[:3] == pack.reach()
    assert rounded.rows.equal(pack.rows) and rounded.members == pack.members and rounded.ends == pack.ends
    assert int(rounded.positions[13:].max()) == 0  # a position that every architecture has
    assert pack.rounded(13) is pack


@pytest.mark.parametrize(("shared", "stored"), [(MIN_SHARED - 1, 2 * (MIN_SHARED - 1) + 6), (MIN_SHARED, MIN_SHARED + 6)])
def test_a_prefix_shorter_than_the_minimum_is_not_split_off(shared: int, stored: int) -> None:
    assert pack_of([9] * shared + [1, 2, 3], [9] * shared + [4, 5, 6]).tokens == stored


def test_equal_sequences_are_stored_once_and_predicted_each() -> None:
    pack = pack_of([1, 2, 3, 4], [1, 2, 3, 4])
    assert pack.tokens == 4 and pack.leaves == (0, 0)
    assert pack.targets.tolist() == [2, 3, 4, 2, 3, 4]
    assert pack.sequence.tolist() == [0] * 3 + [1] * 3


def test_a_short_sequence_that_begins_a_longer_one_costs_nothing_even_below_the_minimum() -> None:
    pack = pack_of([1, 2, 3, 4, 5], [1, 2, 3])
    assert pack.tokens == 5
    assert pack.ends == (4, 2)


def test_rows_and_targets_are_one_apart_in_each_sequence() -> None:
    made = sequence([10, 11, 12, 13], [1, 3], weight=0.5)
    pack = Pack.of([made])
    assert pack.rows.tolist() == [0, 2]
    assert pack.targets.tolist() == [11, 13]
    assert pack.step.tolist() == [0, 1]
    assert pack.weights.tolist() == [0.5, 0.5] and pack.learned == 2


def test_the_first_token_after_a_fork_is_predicted_from_the_shared_prefix() -> None:
    prefix = [7] * 10
    pack = Pack.of([sequence([*prefix, 1], [10]), sequence([*prefix, 2], [10])])
    assert pack.rows.tolist() == [9, 9]
    assert pack.targets.tolist() == [1, 2]


def test_padding_puts_each_sequences_values_in_its_own_row() -> None:
    pack = Pack.of([sequence([1, 2, 3, 4], [1, 3]), sequence([9, 8], [1]), sequence([5, 6, 7], [])])
    values = torch.tensor([0.1, 0.2, 0.3])
    assert pack.pad(values).tolist() == torch.tensor([[0.1, 0.2], [0.3, 0.0], [0.0, 0.0]]).tolist()
    assert pack.pad(values, fill=-1.0)[2].tolist() == [-1.0, -1.0]
    assert pack.mask().tolist() == [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    assert pack.padded_weights().tolist() == [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]


def test_padding_keeps_gradients_apart() -> None:
    pack = Pack.of([sequence([1, 2, 3], [1, 2]), sequence([9, 8], [1])])
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (pack.pad(values)[0] * torch.tensor([10.0, 20.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [10.0, 20.0, 0.0]


def test_a_pack_in_which_nothing_is_learned_pads_to_no_columns() -> None:
    pack = Pack.of([sequence([1, 2], []), sequence([3], [])])
    assert pack.mask().shape == (2, 0) and pack.learned == 0


def test_an_empty_sequence_or_none_is_an_error() -> None:
    with pytest.raises(AssertionError, match="non-empty"):
        Pack.of([])
    with pytest.raises(AssertionError, match="non-empty"):
        pack_of([1, 2], [])


@QUICK
@given(st.lists(ROWS, min_size=1, max_size=9))
def test_any_pack_holds_every_sequence_whole_and_in_order(rows: list[list[int]]) -> None:
    pack = pack_of(*rows)
    for b, ids in enumerate(rows):
        own = pack.sequence_rows(b)
        assert pack.ids[own].tolist() == ids
        assert pack.positions[own].tolist() == list(range(len(ids)))
        assert int(own[-1]) == pack.ends[b] and pack.lengths[b] == len(ids)
        mine = pack.sequence == b
        places = own.tolist()
        learned = [i for i, weight in enumerate(learning(ids).weights) if weight > 0]
        assert pack.rows[mine].tolist() == [places[i - 1] for i in learned]
        assert pack.targets[mine].tolist() == [ids[i] for i in learned]
        assert pack.step[mine].tolist() == list(range(len(learned)))


@QUICK
@given(st.lists(ROWS, min_size=1, max_size=9))
def test_the_nodes_of_any_pack_tile_it_and_parents_come_first(rows: list[list[int]]) -> None:
    pack = pack_of(*rows)
    assert [node.start for node in pack.nodes] == [0, *(node.end for node in pack.nodes[:-1])]
    assert pack.nodes[-1].end == pack.tokens <= sum(map(len, rows))
    for index, node in enumerate(pack.nodes):
        assert node.parent < index and node.start < node.end
        parent = pack.nodes[node.parent] if node.parent >= 0 else None
        assert node.offset == (parent.offset + parent.end - parent.start if parent else 0)


@QUICK
@given(st.lists(ROWS, min_size=2, max_size=2))
def test_two_sequences_store_what_they_share_once_if_it_is_long_enough(rows: list[list[int]]) -> None:
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*rows, strict=False)))
    one_begins_the_other = shared == min(map(len, rows))
    saved = shared if shared >= MIN_SHARED or one_begins_the_other else 0
    assert pack_of(*rows).tokens == sum(map(len, rows)) - saved


# -- filling ---------------------------------------------------------------------------------------------------------------


@QUICK
@given(st.data())
def test_filling_places_every_member_once_keeps_units_together_and_respects_the_budget(data: st.DataObject) -> None:
    rows = data.draw(st.lists(ROWS, min_size=1, max_size=12))
    budget = data.draw(st.integers(5, 120))
    order = data.draw(st.permutations(range(len(rows))))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(rows) - 1)), max_size=4)) | {0, len(rows)})
    units = [order[a:b] for a, b in itertools.pairwise(cuts) if order[a:b]]
    sequences = [learning(ids) for ids in rows]
    packs = fill_packs(sequences, budget, units)
    assert sorted(member for pack in packs for member in pack.members) == list(range(len(rows)))
    where = {member: index for index, pack in enumerate(packs) for member in pack.members}
    for unit in units:
        assert len({where[member] for member in unit}) == 1
    for pack in packs:
        inside = [unit for unit in units if where[unit[0]] == where[pack.members[0]]]
        assert pack.tokens <= budget or len(inside) == 1  # a unit larger than the budget gets a pack of its own
        for place, member in enumerate(pack.members):
            assert pack.ids[pack.sequence_rows(place)].tolist() == rows[member]


def test_by_default_every_sequence_is_its_own_unit() -> None:
    sequences = [sequence([i] * 10) for i in range(1, 5)]
    packs = fill_packs(sequences, budget=20)
    assert [pack.members for pack in packs] == [(0, 1), (2, 3)]


def test_a_unit_joins_the_open_pack_it_shares_the_most_with() -> None:
    a, b = [1] * 30, [2] * 30
    rows = [[*a, 3], [*b, 4], [*b, 5], [*a, 6]]
    packs = fill_packs([sequence(ids) for ids in rows], budget=35)
    assert [pack.members for pack in packs] == [(0, 3), (1, 2)]
    assert [pack.tokens for pack in packs] == [32, 32]


def test_filling_is_deterministic() -> None:
    rows = [[1] * 9 + [i] for i in range(7)] + [[2] * 12 + [i] for i in range(5)]
    sequences = [sequence(ids) for ids in rows]
    first, second = fill_packs(sequences, 40), fill_packs(sequences, 40)
    assert [pack.members for pack in first] == [pack.members for pack in second]
    assert all(torch.equal(x.ids, y.ids) for x, y in zip(first, second, strict=True))


def test_no_sequences_fill_no_packs() -> None:
    assert fill_packs([], 100) == []
