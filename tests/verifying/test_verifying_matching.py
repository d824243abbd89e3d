from __future__ import annotations

from decimal import Decimal
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import VerifierError
from posttrain.verifying import contains, same, same_call
from posttrain.verifying.matching import assign

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("expected", "actual", "equal"),
    [
        ("12.50", "12.5", True),
        ("12.50", "012.50", True),
        ("12.50", "12.51", False),
        ("12.50", "-12.50", False),
        ("-0.00", "0.00", True),
        ("12.50", "12.5O", False),
        ("12.50", "1e1", False),
        ("12.50", 12.5, False),  # money is text
        (12.5, "12.50", False),
        ("1000.00", "1000", True),
        ("0100", "100", False),  # a code
        ("100", "100.0", False),
        (1, 1.0, True),
        (0.1, Decimal("0.10"), True),
        (1, True, False),
        (True, 1, False),
        (False, False, True),
        (None, None, True),
        (None, 0, False),
        ("a", "A", False),
        ([1, 2], [2, 1], False),
        ([1, 2], (1, 2), True),
        ([1], [1, 2], False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": {"b": "1.10"}}, {"a": {"b": "1.1"}}, True),
        ({"$any": True}, None, True),
        ({"$in": ["x", "1.50"]}, "1.5", True),
        ({"$in": ["x"]}, "y", False),
        ({"$contains": "Approval"}, "needs approval", True),
        ({"$contains": "approval"}, 3, False),
    ],
)
def test_values_are_equal_as_json_and_amounts_as_decimals(expected: Any, actual: Any, equal: bool) -> None:
    assert same(expected, actual) is equal


@pytest.mark.parametrize(
    ("expected", "actual", "held"),
    [
        ({}, {"a": 1}, True),
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}, "d": 3}, True),
        ({"a": {"b": 1}}, {"a": 1}, False),
        ([{"n": "x"}], [{"n": "y"}, {"n": "x", "m": 1}], True),
        ([1, 1], [1, 2], False),
        ([1, 1], [1, 2, 1], True),
        ([{"$in": [1, 2]}, 1], [1, 2], True),  # needs the second element for the first expectation
        ([], [1], True),
        ([1], {"a": 1}, False),
        ({"a": {"$contains": "x"}}, {"a": "axb"}, True),
    ],
)
def test_a_partial_match_may_be_larger(expected: Any, actual: Any, held: bool) -> None:
    assert contains(expected, actual) is held


@given(json_values)
def test_every_value_equals_itself_and_contains_itself(value: Any) -> None:
    assert same(value, value)
    assert contains(value, value)


@given(json_values, json_values)
def test_what_is_the_same_is_contained(one: Any, other: Any) -> None:
    assert not same(one, other) or contains(one, other)


@pytest.mark.parametrize("expected", [{"$regex": "a"}, {"$any": True, "x": 1}, {"$in": [1], "$any": True}])
def test_an_unknown_operator_is_an_error_of_the_task_not_a_failure_of_the_model(expected: Any) -> None:
    with pytest.raises(VerifierError, match="unknown way to compare"):
        same(expected, 1)


@pytest.mark.parametrize(
    ("text", "extra", "equal"),
    [
        ('{"account":"1001","amount":"5.00"}', False, True),
        ('{"amount":"5","account":"1001"}', False, True),
        ('{"account":"1001","amount":"5.00","memo":"x"}', False, False),
        ('{"account":"1001","amount":"5.00","memo":"x"}', True, True),
        ('{"account":"1001"}', True, False),
        ("{", True, False),
        ("[]", True, False),
        ('{"account":1001,"amount":"5.00"}', False, False),
    ],
)
def test_calls_are_compared_by_name_and_arguments(text: str, extra: bool, equal: bool) -> None:
    arguments = {"account": "1001", "amount": "5.00"}
    assert same_call("post", arguments, "post", text, extra=extra) is equal
    assert not same_call("post", arguments, "transfer", text, extra=extra)


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), max_size=4))
def test_an_assignment_is_found_exactly_when_one_exists(fits: list[list[bool]]) -> None:
    exists = any(
        all(row[column] for row, column in zip(fits, chosen, strict=True)) for chosen in permutations(range(4), len(fits))
    )
    found = assign(fits)
    assert (found is not None) is exists
    if found is not None:
        assert len(set(found)) == len(fits)
        assert all(row[column] for row, column in zip(fits, found, strict=True))
