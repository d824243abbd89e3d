"""Choosing among samples, searching trees, constrained decoding, retrieval and text matching."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import DataError, GrammarError
from posttrain.objectives import decoding, search, selection, textmatch
from posttrain.objectives.search import CallNode, NodeKind


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert selection.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_needs_enough_samples() -> None:
    with pytest.raises(AssertionError, match="k <= n"):
        selection.pass_at_k(3, 1, 4)


def test_best_of_k_for_a_known_probability() -> None:
    assert selection.best_of_k_prob(0.5, 3) == 0.875
    assert (selection.best_of_k_prob(0, 9), selection.best_of_k_prob(1, 1)) == (0, 1)
    assert selection.best_of_n_kl_bound(1) == 0
    assert selection.best_of_n_kl_bound(4) == pytest.approx(math.log(4) - 0.75)


def test_step_scores_by_every_name() -> None:
    found = selection.aggregate_steps([0.5, 0.8])
    assert (found.minimum, found.last, found.mean, found.total) == (0.5, 0.8, 0.65, 1.3)
    assert (found.product, found.log_product) == (pytest.approx(0.4), pytest.approx(math.log(0.4)))
    assert selection.aggregate_steps([0.5, 0.0]).log_product == -math.inf
    assert selection.aggregate_steps([0.5, 0.0]).product == 0


def test_process_labels_are_not_shifted_and_unlabelled_tokens_do_not_count() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.nan, 1.0]]], requires_grad=True)
    loss, metrics = selection.process_ce(logits, torch.tensor([[1, -100]]))
    loss.backward()
    assert (loss.item(), metrics["steps"].item()) == (pytest.approx(-math.log(0.75)), 1)
    assert not logits.grad[0, 1].any()
    assert selection.process_ce(logits, torch.full((1, 2), -100))[0].item() == 0


def test_rollout_labels_are_any_and_share() -> None:
    assert selection.rollout_labels([[1, 0, 1, 0], [0, 0], []]) == ([1, 0, 0], [0.5, 0.0, 0.0])


def test_best_of_n_and_votes_can_disagree_and_ties_go_first() -> None:
    found = selection.best_of_n_select([0.9, 0.5, 0.5, 0.99], ["A", "B", "B", None])
    assert (found.best_index, found.weighted_vote, found.majority) == (0, "B", "B")
    assert found.weighted_totals == {"A": 0.9, "B": 1.0}
    tie = selection.best_of_n_select([0.5, 0.5], ["Z", "A"])
    assert (tie.best_index, tie.weighted_vote, tie.majority) == (0, "Z", "Z")
    nobody = selection.best_of_n_select([0.5], [None])
    assert (nobody.best_index, nobody.weighted_vote, nobody.majority) == (None, None, None)


def test_star_keeps_right_answers_and_hints_only_where_the_direct_try_failed() -> None:
    attempts = [
        selection.Attempt("a", True, True, ()),
        selection.Attempt("b", False, True, ()),
        selection.Attempt("c", False, False, ()),
        selection.Attempt("d", False, None, ()),
    ]
    assert selection.star_filter(attempts) == (["a"], ["b"])


def test_rest_em_drops_wrong_and_double_samples_and_caps_each_problem() -> None:
    samples = ((True, "x"), (True, "x"), (False, "y"), (True, "z"), (True, "w"))
    attempts = [selection.Attempt("p", False, None, samples), selection.Attempt("q", False, None, samples[2:3])]
    assert selection.rest_em(attempts, 2) == [("p", 0), ("p", 3)]
    assert selection.rest_em(attempts, None) == [("p", 0), ("p", 3), ("p", 4)]
    assert selection.rest_em(attempts, 0) == []


# -- trees -----------------------------------------------------------------------------------------------------------------

TREE = {
    "r": CallNode(NodeKind.THINK, ("x", "y")),
    "x": CallNode(NodeKind.THINK, ("x1", "x2")),
    "x1": CallNode(NodeKind.ERROR),
    "x2": CallNode(NodeKind.THINK, ("deep",)),
    "deep": CallNode(NodeKind.ANSWER),
    "y": CallNode(NodeKind.ANSWER),
}


@pytest.mark.parametrize(
    ("max_nodes", "max_depth", "visited", "answer"),
    [
        (20, 9, ["r", "x", "x1", "x2", "deep"], "deep"),
        (4, 9, ["r", "x", "x1", "x2"], None),
        (20, 2, ["r", "x", "x1", "x2", "y"], "y"),
        (20, 0, ["r"], None),
        (0, 9, [], None),
    ],
)
def test_depth_first_backtracks_until_an_answer_or_its_budget(
    max_nodes: int, max_depth: int, visited: list[str], answer: str | None
) -> None:
    walk = search.depth_first(TREE, "r", max_nodes, max_depth)
    assert (list(walk.visited), walk.answer) == (visited, answer)


def test_the_greedy_chain_never_goes_back() -> None:
    assert search.greedy_chain(TREE, "r", 9) == search.TreeWalk(("r", "x", "x1"), None)
    assert search.greedy_chain(TREE, "r", 1).visited == ("r", "x")
    assert search.greedy_chain(TREE, "x2", 9).answer == "deep"


def test_a_child_that_is_nowhere_is_named() -> None:
    with pytest.raises(DataError, match="'gone'"):
        search.depth_first({"r": CallNode(NodeKind.THINK, ("gone",))}, "r", 9, 9)


def test_quality_values_of_an_all_right_path_are_k_over_k_and_errors_lower_them() -> None:
    _, values = search.quality_values([(3, 0), (2, 0), (1, 0), (0, 0)])
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0])
    weights, values = search.quality_values([(0, 1), (1, 0)])
    assert (weights, values) == ([-1.0, 0.5], [0.0, 0.5])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), max_size=8))
def test_quality_values_stay_between_zero_and_one(steps: list[tuple[int, int]]) -> None:
    assert all(0 <= value <= 1 for value in search.quality_values(steps)[1])


def test_uct_prefers_what_was_seen_less_and_gives_the_unseen_a_finite_bonus() -> None:
    scores = search.uct_scores([(0.5, 4), (0.5, 1), (0.5, 0)], 5, c=1.0, unvisited_bonus=2.0)
    assert scores == pytest.approx([0.5 + math.sqrt(2 * math.log(5) / 4), 0.5 + math.sqrt(2 * math.log(5)), 2.5])
    assert search.backed_up_value([(1.0, 1), (0.5, 3)]) == 0.625
    assert search.backed_up_value([(1.0, 0)]) == 0
    assert search.blended_value(0.4, 0.8, 0.25) == pytest.approx(0.5)


# -- decoding and retrieval ------------------------------------------------------------------------------------------------


def test_a_constrained_step_renormalises_over_what_is_allowed_before_temperature() -> None:
    logits = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    q, log_mass = decoding.constrained_step(logits, torch.tensor([True, False, True]))
    assert q.tolist() == pytest.approx([2 / 3, 0, 1 / 3])
    assert log_mass.exp().item() == pytest.approx(0.75)
    cold, _ = decoding.constrained_step(logits, torch.tensor([True, False, True]), 0.5)
    assert cold.tolist() == pytest.approx([0.8, 0, 0.2])


def test_nothing_allowed_is_an_error_never_an_argmax() -> None:
    with pytest.raises(GrammarError, match="no token is allowed"):
        decoding.constrained_step(torch.zeros(2, 3), torch.tensor([[True, False, False], [False, False, False]]))


def test_masking_token_by_token_is_not_conditioning_on_the_legal_set() -> None:
    second = {"a": {"x": 0.25, "y": 0.75}, "b": {"x": 1.0}}
    found = decoding.constrained_sequence({"a": 0.8, "b": 0.2}, second, ["ax", "bx"])
    assert found.legal_mass == pytest.approx(0.4)
    assert found.exact == pytest.approx({"ax": 0.5, "bx": 0.5})
    assert found.masked == pytest.approx({"ax": 0.8, "bx": 0.2})
    with pytest.raises(GrammarError, match="no probability"):
        decoding.constrained_sequence({"a": 1.0}, second, ["cx"])


def test_marginalising_over_documents_per_answer_or_per_token() -> None:
    docs, tokens = torch.tensor([0.5, 0.5]).log(), torch.tensor([[1.0, 0.5], [0.5, 0.25]]).log()
    assert decoding.rag_sequence(docs, tokens).exp().item() == pytest.approx(0.5 * 0.5 + 0.5 * 0.125)
    assert decoding.rag_token(docs, tokens).exp().item() == pytest.approx(0.75 * 0.375)
    one_token = tokens[:, :1]
    assert decoding.rag_token(docs, one_token).item() == pytest.approx(decoding.rag_sequence(docs, one_token).item())


def test_a_tool_call_must_beat_both_no_call_and_the_call_without_its_result() -> None:
    found = decoding.toolformer_gain(torch.full((7,), -0.5), torch.full((7,), -2.0), torch.full((7,), -1.0))
    assert found.weights_n.tolist() == pytest.approx([1 / 3, 4 / 15, 1 / 5, 2 / 15, 1 / 15, 0, 0])
    assert found.gain.item() == pytest.approx(0.5)
    short = decoding.toolformer_gain(torch.tensor([-0.5, -1.0]), torch.zeros(2), torch.zeros(2))
    assert short.with_result.item() == pytest.approx((0.5 + 0.8) / 1.8)


# -- text ------------------------------------------------------------------------------------------------------------------


def test_rouge_l_on_words_and_on_chinese_characters() -> None:
    found = textmatch.rouge_l(["a", "b", "c"], ["b", "x", "c", "y"])
    assert (found.lcs, found.precision, found.recall, found.f1) == (2, 0.5, pytest.approx(2 / 3), pytest.approx(4 / 7))
    assert textmatch.rouge_l("核对银行流水", "核对流水").lcs == 4
    assert textmatch.rouge_l([], ["a"]).f1 == 0


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_rouge_l_is_symmetric_and_one_only_for_equal_texts(a: str, b: str) -> None:
    found = textmatch.rouge_l(a, b)
    assert found.f1 == pytest.approx(textmatch.rouge_l(b, a).f1)
    assert (found.f1 > 1 - 1e-12) == (a == b and bool(a))


@pytest.mark.parametrize(
    ("predicted", "verdict"),
    [
        ("erp.query(table='ar', limit=5)", "match"),
        ("erp.query(limit=5, table='ar', order='asc')", "match"),
        ("erp.query(table='ar', limit=15)", "mismatch"),
        ("erp.query(table='ar', limit=5.0)", "mismatch"),
        ("erp.query(table='ar')", "mismatch"),
        ("erp.post(table='ar', limit=5)", "mismatch"),
        ("erp.drop(table='ar', limit=5)", "hallucination"),
        ("erp.query(table=", "unparsable"),
        ("erp.query", "unparsable"),
        ("x = erp.query()", "unparsable"),
        ("\x00", "unparsable"),
    ],
)
def test_calls_are_compared_as_syntax_trees(predicted: str, verdict: str) -> None:
    assert textmatch.match_call(predicted, "erp.query(table='ar', limit=5)", ["erp.query", "erp.post"]) == verdict


def test_positional_arguments_are_compared_in_their_places() -> None:
    assert textmatch.match_call("f(1, 2, 3)", "f(1, 2)", ["f"]) == "match"
    assert textmatch.match_call("f(2, 1)", "f(1, 2)", ["f"]) == "mismatch"
    assert textmatch.match_call("f(1)", "f(1, 2)", ["f"]) == "mismatch"
