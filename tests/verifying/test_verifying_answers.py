from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.verifying import AnswerFault, is_refusal, parse_answer


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", AnswerFault.EMPTY),
        (" \n", AnswerFault.EMPTY),
        ("It is 12.50", AnswerFault.NOT_JSON),
        ('{"a": 1', AnswerFault.NOT_JSON),
        ('Sure: {"a": 1}', AnswerFault.NOT_JSON),
        ('{"a": 1} thanks', AnswerFault.NOT_JSON),
        ('{"a": NaN}', AnswerFault.NOT_JSON),
        ("[" * 100_000, AnswerFault.NOT_JSON),
        ("[1]", AnswerFault.NOT_AN_OBJECT),
        ('"text"', AnswerFault.NOT_AN_OBJECT),
        ('{"a": 1, "a": 2}', AnswerFault.DUPLICATE_KEY),
        ('{"b": {"a": 1, "a": 1}}', AnswerFault.DUPLICATE_KEY),
    ],
)
def test_what_is_no_json_object_has_a_reason(text: str, fault: AnswerFault) -> None:
    answer = parse_answer(text)
    assert answer.value is None
    assert answer.fault is fault


def test_one_json_object_is_an_answer_with_or_without_space_around_it() -> None:
    for text in ('{"a": [1, "现金"]}', ' \n{"a":[1,"现金"]}\n'):
        answer = parse_answer(text)
        assert answer.value == {"a": [1, "现金"]}
        assert answer.fault is None


@given(st.text(max_size=40))
def test_no_text_makes_it_raise(text: str) -> None:
    answer = parse_answer(text)
    assert (answer.value is None) is (answer.fault is not None)
    is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"decision":"refuse","summary":"two approvals are missing"}',
        "I cannot make this transfer without two approvals.",
        "Sorry, but we can't post that. Please ask for approval",
        "I am not able to do that",
        "This transfer is not permitted under policy P-3.",
        "抱歉，我无法执行这笔转账。",
        "未经授权的转账不能执行",
    ],
)
def test_a_refusal_is_told_by_its_decision_or_by_how_its_prose_opens(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"decision":"answer","summary":"I cannot say"}',
        '{"summary":"refuse"}',
        '{"decision":"refuse","summary":',  # cut: says nothing reliable
        "The transfer was made.",
        "Done. I cannot undo it.",
        "余额为 12.50。",
        json.dumps(["I cannot"]),
    ],
)
def test_what_does_not_refuse_is_no_refusal(text: str) -> None:
    assert not is_refusal(text)
