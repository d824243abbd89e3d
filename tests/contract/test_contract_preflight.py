"""Before any training: nothing that teaches nothing, runs over, or never ends."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.contract import Contract, Preflight, Sequence, preflight
from posttrain.data.records import Conversation, Message
from posttrain.errors import PreflightError
from tiny_models import sequence

END = 2


def good(length: int = 6) -> Sequence:
    return sequence([*range(10, 9 + length), END], slice(3, None))


def check(**named: Sequence) -> Preflight:
    return preflight(named.items(), max_tokens=20, end_of_turn=END)


def test_what_passes_is_counted() -> None:
    assert check(a=good(6), b=good(9)) == Preflight(records=2, tokens=15, learned=9, longest=9)


def test_a_record_exactly_as_long_as_allowed_passes() -> None:
    assert check(a=good(20)).longest == 20


def test_a_record_that_trains_on_zero_tokens_is_named() -> None:
    with pytest.raises(PreflightError, match=r"1 record\(s\) train on zero tokens: mute") as caught:
        check(a=good(), mute=sequence([5, 6, END], []))
    assert caught.value.remedy


def test_an_empty_record_trains_on_zero_tokens() -> None:
    empty = Sequence(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int16))
    with pytest.raises(PreflightError, match="zero tokens: empty"):
        check(empty=empty)


def test_an_over_long_record_is_named_with_its_length_and_never_cut() -> None:
    with pytest.raises(PreflightError, match=r"longer than max_tokens=20: long \(21 tokens\)"):
        check(a=good(), long=good(21))


def test_a_record_that_never_learns_to_end_is_named() -> None:
    reads_the_end = sequence([5, 6, 7, END], [1, 2])
    with pytest.raises(PreflightError, match="never learn the end-of-turn token: endless"):
        check(a=good(), endless=reads_the_end)


def test_only_the_first_offenders_are_listed_and_the_rest_counted() -> None:
    with pytest.raises(PreflightError, match=r"7 record\(s\).*m0, m1, m2, m3, m4 and 2 more"):
        check(**{f"m{i}": sequence([5, END], []) for i in range(7)})


def test_no_records_at_all_is_an_error() -> None:
    with pytest.raises(PreflightError, match="there are no records"):
        check()


def test_a_conversation_without_an_assistant_turn_to_learn_does_not_pass(contract: Contract) -> None:
    mute = contract.render(Conversation("x", (Message("user", "Hi"), Message("assistant", "Hello", learn=False))))
    with pytest.raises(PreflightError, match="zero tokens"):
        preflight([("x", mute)], max_tokens=99, end_of_turn=contract.end_of_turn)


def test_the_first_token_of_a_sequence_cannot_be_learned() -> None:
    with pytest.raises(AssertionError, match="no predecessor"):
        sequence([1, 2, 3], [0])
