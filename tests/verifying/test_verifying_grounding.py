from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import Episode, Message, StopReason
from posttrain.verifying import episode_groundedness, figures, grounded


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The balance is 1,234.50 and 12 invoices are due.", ["1234.50", "12"]),
        ("$50, EUR 60.10, USD70, 80.00CNY, ￥90 and ¥5", ["50", "60.10", "70", "80.00", "90", "5"]),
        ("余额为1.5万元，共２００元，另有2亿", ["15000", "200", "200000000"]),
        ("15k, 3m and 1bn", ["15000", "3000000", "1000000000"]),
        ("up 12.5% or 3 %", ["12.5", "3"]),
        ("-50.00 against 50.00", ["50.00", "50.00"]),
        ("1234.50 2050.00 0.05", ["1234.50", "2050.00", "0.05"]),
        ("a total of 100.50.Then", ["100.50"]),
        ("15\u00a0000.00 and 1\u202f250", ["15000.00", "1250"]),
        ("range 100-200", ["100", "200"]),
    ],
)
def test_figures_are_read_with_separators_signs_and_units(text: str, found: list[str]) -> None:
    assert figures(text) == tuple(Decimal(value) for value in found)


@pytest.mark.parametrize(
    "text",
    [
        "JV-1002, INV2024/77, INV-2024-0033, PO_77, #88, 1001-A, v1.2.3 and 1e5",
        "on 2024-03-01, 2024/3/1, 01.03.2024, 15/03/2024 at 12:30:05 and in 2024-03",
        "2024年3月15日，3月31日，2023年 日期2024-03-01余额",
        "in 2023 and 1999, three of 3 or 10 invoices",
        "1. first\n2) second\n11. eleventh",
        "",
    ],
)
def test_identifiers_dates_years_and_small_counts_are_no_figures(text: str) -> None:
    assert figures(text) == ()


def test_of_a_json_answer_only_the_values_are_read() -> None:
    answer = {"figures": [{"name": "due 2024", "amount": "1234.50"}], "sources": ["AP-12"], "1001": True, "n": 44, "x": None}
    assert figures(json.dumps(answer)) == (Decimal("1234.50"), Decimal(44))


@pytest.mark.parametrize(
    ("answer", "source"),
    [
        ("1,234.5", '{"amount":"1234.50"}'),
        ("1234.50", "the amount of 1,234.50 is due"),
        ("overdrawn by 50.00", '{"balance":"-50.00"}'),
        ("12.5%", '{"share":0.125}'),
        ("12.5%", "12.5 percent"),
        ("15000", "1.5万"),
        ("1.5万", '{"amount":15000}'),
        ("account 1001", '{"1001":"5.00"}'),
        ("journal 1002", "JV-1002"),
    ],
)
def test_a_figure_is_grounded_in_another_spelling_of_the_same_number(answer: str, source: str) -> None:
    result = grounded(answer, [source])
    assert result.figures
    assert not result.ungrounded
    assert result.share == 1.0


@pytest.mark.parametrize(
    ("answer", "source"),
    [
        ("1234.51", "1234.50"),
        ("300.00", "100.00 and 200.00"),  # a sum is not in the record
        ("234.50", "1,234.50"),
        ("100200", "[100,200]"),  # in JSON a comma parts numbers
        ("15", "1.5万"),
        ("77", ""),
    ],
)
def test_a_figure_that_was_never_shown_is_ungrounded(answer: str, source: str) -> None:
    assert grounded(answer, [source]).ungrounded


def test_an_answer_without_figures_has_no_share() -> None:
    assert grounded("Nothing is due.", ["5.00"]).share is None


@given(st.lists(st.decimals(min_value=11, max_value=10**8, places=2), min_size=1, max_size=6))
def test_amounts_that_were_all_shown_are_all_grounded_however_they_are_written(amounts: list[Decimal]) -> None:
    source = json.dumps([{"amount": str(amount)} for amount in amounts])
    prose = "; ".join(f"{amount:,}" for amount in amounts)
    result = grounded(prose, [source])
    assert len(result.figures) == len(amounts)
    assert not result.ungrounded


def test_an_episodes_answer_is_compared_with_request_system_and_results_but_not_with_itself() -> None:
    messages = (
        Message("system", "The limit is 5,000.00"),
        Message("user", "Is 120.00 due?"),
        Message("assistant", "I think 777.00"),
        Message("tool", '{"due":"120.00"}'),
        Message("assistant", "120.00 is due, below 5000.00; fees are 777.00"),
    )
    result = episode_groundedness(Episode("t", None, "task", messages, (), (), StopReason.END_OF_TURN, ()))
    assert result.ungrounded == (Decimal("777.00"),)
    assert result.share == pytest.approx(2 / 3)
