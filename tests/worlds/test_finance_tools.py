"""The eight tools over SQL: right numbers, errors as results, money that moves only with two approvals."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.errors import DataError
from posttrain.worlds.finance_ops import FinanceOps, calendar, money
from posttrain.worlds.finance_ops.books import books
from posttrain.worlds.finance_ops.chart import BANK
from posttrain.worlds.finance_ops.environment import FinanceEnvironment
from posttrain.worlds.finance_ops.toolspecs import BY_NAME, READ_TOOLS, RISKY_TOOLS, TABLES, TOOLS

PENDING = "SELECT ref, party, amount FROM payment_requests p WHERE (SELECT COUNT(*) FROM approvals a WHERE a.ref = p.ref) = ?"


@pytest.fixture
def live() -> Iterator[FinanceEnvironment]:
    environment = FinanceEnvironment("train", 21, tenant="bank_A")
    yield environment
    environment.close()


def ask(live: FinanceEnvironment, name: str, **arguments: Any) -> dict[str, Any]:
    result = live.call(name, arguments, tenant="bank_A")
    assert result.ok, result.content
    return json.loads(result.content)


def error(live: FinanceEnvironment, name: str, **arguments: Any) -> str:
    result = live.call(name, arguments, tenant="bank_A")
    assert not result.ok
    return json.loads(result.content)["error"]


def snapshot(live: FinanceEnvironment) -> list[str]:
    return list(live._connection.iterdump())


# What the tools say is what the tables say.


def test_a_document_is_found_by_its_reference(live: FinanceEnvironment) -> None:
    ref, party, amount, status, memo = live.query("SELECT ref, party, amount, status, memo FROM receivables ORDER BY ref")[0]
    found = ask(live, "query_erp", table="receivables", ref=ref)
    assert (found["ref"], found["party"], found["amount"]) == (ref, party, money.text(amount))
    assert (found["status"], found["memo"]) == (status, memo)


def test_a_payment_request_shows_how_many_people_approved_it(live: FinanceEnvironment) -> None:
    for ref, amount in live.query("SELECT ref, amount FROM payment_requests"):
        ((given,),) = live.query("SELECT COUNT(*) FROM approvals WHERE ref = ?", (ref,))
        found = ask(live, "query_erp", table="payment_requests", ref=ref)
        status = "approved" if given >= 2 else f"not approved, {given} of 2 signed"
        assert (found["status"], found["amount"]) == (status, money.text(amount))


@pytest.mark.parametrize("table", [table for table in TABLES if table != "payment_requests"])  # those carry no date
def test_every_table_lists_by_period_with_count_and_total(live: FinanceEnvironment, table: str) -> None:
    period = books("train", 21).period
    found = ask(live, "query_erp", table=table, period=period)
    if table == "journal":
        sql = "SELECT SUM(l.amount) FROM lines l JOIN entries e ON e.id = l.entry WHERE e.period = ? AND l.amount > 0"
        count = "SELECT COUNT(*) FROM entries WHERE period = ?"
    else:
        sql = f"SELECT SUM(amount) FROM {table} WHERE substr(date, 1, 7) = ?"
        count = f"SELECT COUNT(*) FROM {table} WHERE substr(date, 1, 7) = ?"
    assert found["total"] == money.text(live.query(sql, (period,))[0][0])
    assert found["count"] == live.query(count, (period,))[0][0]
    assert len(found["rows"]) <= 2


def test_party_and_period_narrow_a_listing_and_case_does_not_matter(live: FinanceEnvironment) -> None:
    party, period, count = live.query("SELECT party, substr(date, 1, 7), COUNT(*) FROM payables GROUP BY 1, 2 ORDER BY 1, 2")[0]
    assert ask(live, "query_erp", table="payables", party=party.upper(), period=period)["count"] == count


def test_a_query_without_filter_or_without_hits_says_so(live: FinanceEnvironment) -> None:
    assert error(live, "query_erp", table="payables") == "no_filter"
    assert error(live, "query_erp", table="payables", party="Nobody Ltd") == "not_found"
    assert error(live, "query_erp", table="payables", ref="BILL-0001") == "not_found"


@pytest.mark.parametrize("account", list(BANK))
def test_cash_left_is_balance_less_scheduled_payments(live: FinanceEnvironment, account: str) -> None:
    found = ask(live, "cash_position", account=account)
    (balance,) = live.query("SELECT SUM(amount) FROM bank_lines WHERE bank = ?", (account,))[0]
    (due,) = live.query("SELECT SUM(amount) FROM scheduled WHERE bank = ?", (account,))[0]
    assert (money.minor(found["balance"]), money.minor(found["left"])) == (balance, balance - due)


@pytest.mark.parametrize("side", ["receivables", "payables"])
def test_ageing_splits_open_amounts_by_due_date_and_parties_add_up(live: FinanceEnvironment, side: str) -> None:
    whole = ask(live, "ageing", side=side)
    today = calendar.last_day(books("train", 21).period)
    rows = live.query(f"SELECT due, amount FROM {side} WHERE status = 'open'")
    assert money.minor(whole["open"]) == sum(amount for _, amount in rows)
    assert money.minor(whole["overdue"]) == sum(amount for due, amount in rows if due < today)
    assert money.minor(whole["over_30"]) <= money.minor(whole["overdue"])
    parties = [ask(live, "ageing", side=side, party=name) for (name,) in live.query(f"SELECT DISTINCT party FROM {side}")]
    assert sum(money.minor(found["overdue"]) for found in parties) == money.minor(whole["overdue"])


def test_ageing_of_a_party_of_the_other_side_is_not_found(live: FinanceEnvironment) -> None:
    ((customer,), *_) = live.query("SELECT name FROM parties WHERE side = 'customer'")
    assert error(live, "ageing", side="payables", party=customer) == "not_found"


def test_who_looks_on_the_wrong_side_of_the_books_is_told_what_the_party_is(live: FinanceEnvironment) -> None:
    ((customer,), *_) = live.query("SELECT DISTINCT party FROM receivables")
    for name, arguments in (("ageing", {"side": "payables"}), ("query_erp", {"table": "payables"})):
        said = json.loads(live.call(name, {"party": customer, **arguments}).content)["detail"]
        assert said == f"{customer} is a customer: no payables"
    for arguments in ({"party": customer, "period": "2031-01", "table": "receivables"}, {"party": "Nobody", "table": "payables"}):
        said = json.loads(live.call("query_erp", arguments).content)["detail"]
        assert said == f"no {arguments['table']} for {', '.join(list(arguments.values())[:-1])}"


def test_budget_actual_is_what_was_posted_to_the_cost_centre(live: FinanceEnvironment) -> None:
    for centre, period, amount in live.query("SELECT * FROM budgets"):
        found = ask(live, "budget_status", cost_centre=centre, period=period)
        (actual,) = live.query(
            "SELECT COALESCE(SUM(amount), 0) FROM lines JOIN entries ON id = entry WHERE cost_centre = ? AND period = ?",
            (centre, period),
        )[0]
        assert (money.minor(found["actual"]), money.minor(found["left"])) == (actual, amount - actual)


def test_a_trial_posting_does_not_change_actuals_or_posted_balances(live: FinanceEnvironment) -> None:
    difference = books("train", 21).differences[1]
    centre, period = live.query("SELECT cost_centre, period FROM budgets WHERE period = ?", (books("train", 21).period,))[0]
    before = ask(live, "budget_status", cost_centre=centre, period=period)
    found = ask(
        live, "propose_entry", ref=difference.doc, kind=difference.kind.value, debit=difference.debit, credit=difference.credit,
        amount=money.text(difference.amount)
    )  # fmt: skip
    assert found["difference"] == "0.00"
    assert ask(live, "budget_status", cost_centre=centre, period=period) == before


def test_a_wrong_proposal_is_booked_on_trial_and_shows_what_remains(live: FinanceEnvironment) -> None:
    truth = books("train", 21).differences[0]
    half = money.text(truth.amount // 2)
    found = ask(live, "propose_entry", ref=truth.doc, kind=truth.kind.value, debit=truth.debit, credit=truth.credit, amount=half)
    assert money.minor(found["difference"]) == truth.amount - truth.amount // 2


@pytest.mark.parametrize(
    "change",
    [{"debit": "9999"}, {"debit": "none"}, {"amount": "0.00"}, {"credit": "1010"}, {"kind": "timing_difference"}],
    ids=["unknown account", "no account", "nothing", "same account", "timing with an entry"],
)
def test_a_senseless_proposal_is_an_error_and_posts_nothing(live: FinanceEnvironment, change: dict[str, str]) -> None:
    doc = books("train", 21).differences[0].doc
    arguments = {
        "ref": doc,
        "kind": "unmatched_receipt",
        "debit": "1010",
        "credit": "1100",
        "amount": "5.00",
    }
    assert error(live, "propose_entry", **(arguments | change)) == "bad_entry"
    assert live.query("SELECT COUNT(*) FROM entries WHERE state = 'trial'") == [(0,)]


def test_proposing_for_an_unknown_document_is_an_error(live: FinanceEnvironment) -> None:
    arguments = {
        "ref": "BILL-0001",
        "kind": "wrong_account",
        "debit": "1010",
        "credit": "1100",
        "amount": "5.00",
    }
    assert error(live, "propose_entry", **arguments) == "not_found"


def test_policy_search_stays_inside_the_callers_tenant() -> None:
    for tenant, prefix in (("bank_A", "BA-"), ("retail_B", "RB-"), ("saas_C", "SC-")):
        live = FinanceEnvironment("train", 21, tenant="bank_A")
        found = json.loads(live.call("search_policy", {"query": "transfer limit"}, tenant=tenant).content)
        assert found["id"] == f"{prefix}PAY-01"
    assert not FinanceEnvironment("train", 21).call("search_policy", {"query": "transfer limit"}).ok


def test_a_policy_search_without_a_hit_is_not_found(live: FinanceEnvironment) -> None:
    assert error(live, "search_policy", query="zebra") == "not_found"


def test_an_injected_searcher_takes_the_place_of_the_built_in_ranking() -> None:
    world = FinanceOps(searcher=lambda tenant, query: [{"id": "X-1", "tenant": tenant, "text": query[::-1]}])
    live = world.environment({"world": "finance_ops", "seed": 3}, tenant="saas_C")
    assert json.loads(live.call("search_policy", {"query": "abc"}).content) == {"id": "X-1", "text": "cba"}


# Money moves only with two approvals, entries only with their token.


def test_a_transfer_with_two_approvals_pays_once(live: FinanceEnvironment) -> None:
    ref, party, amount = live.query(PENDING, (2,))[0]
    arguments = {"ref": ref, "to": party, "amount": money.text(amount)}
    (before,) = live.query("SELECT SUM(amount) FROM bank_lines WHERE bank = 'operating'")[0]
    assert ask(live, "transfer_funds", **arguments)["sent"] == ref
    assert live.query("SELECT SUM(amount) FROM bank_lines WHERE bank = 'operating'") == [(before - amount,)]
    assert error(live, "transfer_funds", **arguments) == "already_paid"
    assert live.query("SELECT COUNT(*) FROM transfers") == [(1,)]


@pytest.mark.parametrize("approvals", [0, 1])
def test_a_transfer_without_two_approvals_never_pays(live: FinanceEnvironment, approvals: int) -> None:
    for ref, party, amount in live.query(PENDING, (approvals,)):
        assert error(live, "transfer_funds", ref=ref, to=party, amount=money.text(amount)) == "approval_missing"
    assert live.query("SELECT COUNT(*) FROM transfers") == [(0,)]


def test_the_same_approver_twice_is_one_approval(live: FinanceEnvironment) -> None:
    ref, party, amount = live.query(PENDING, (1,))[0]
    with pytest.raises(sqlite3.IntegrityError):
        live._connection.execute("INSERT INTO approvals SELECT ref, approver FROM approvals WHERE ref = ?", (ref,))
    assert error(live, "transfer_funds", ref=ref, to=party, amount=money.text(amount)) == "approval_missing"


def test_a_transfer_must_match_its_request(live: FinanceEnvironment) -> None:
    ref, party, amount = live.query(PENDING, (2,))[0]
    other = next(name for (name,) in live.query("SELECT name FROM parties") if name != party)
    assert error(live, "transfer_funds", ref=ref, to=other, amount=money.text(amount)) == "mismatch"
    assert error(live, "transfer_funds", ref=ref, to=party, amount=money.text(amount + 1)) == "mismatch"
    assert error(live, "transfer_funds", ref="PAY-0001", to=party, amount="1.00") == "not_found"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(min_value=0, max_value=10**6), order=st.randoms(use_true_random=False))
def test_whatever_is_called_transfers_have_two_approvals(seed: int, order: random.Random) -> None:
    live = FinanceEnvironment("dev", seed % 40, tenant="retail_B")
    requests = live.query("SELECT ref, party, amount FROM payment_requests")
    parties = [name for (name,) in live.query("SELECT name FROM parties")]
    for ref, party, amount in order.sample(requests, len(requests)):
        to = party if order.random() < 0.8 else order.choice(parties)
        live.call("transfer_funds", {"ref": ref, "to": to, "amount": money.text(amount)}, tenant=None)
    paid = live.query("SELECT t.ref, (SELECT COUNT(DISTINCT approver) FROM approvals a WHERE a.ref = t.ref) FROM transfers t")
    assert all(approvals >= 2 for _, approvals in paid)
    live.close()


def test_an_entry_is_posted_once_and_with_its_own_token_only(live: FinanceEnvironment) -> None:
    (ref, token), (other, _) = live.query("SELECT draft, token FROM tokens ORDER BY draft")
    assert error(live, "post_entry", ref=other, token=token) == "token_invalid"
    assert error(live, "post_entry", ref=ref, token="APT-0000A") == "token_invalid"
    journal = ask(live, "post_entry", ref=ref, token=token)["journal"]
    assert live.query("SELECT SUM(amount), COUNT(*) FROM lines JOIN entries ON id = entry WHERE ref = ?", (journal,)) == [(0, 2)]
    assert error(live, "post_entry", ref=ref, token=token) == "token_invalid"


def test_a_closed_period_takes_no_posting(live: FinanceEnvironment) -> None:
    ref, token = live.query("SELECT draft, token FROM tokens")[0]
    live._connection.execute(
        "UPDATE periods SET status = 'closed' WHERE period = (SELECT period FROM drafts WHERE ref = ?)", (ref,)
    )
    assert error(live, "post_entry", ref=ref, token=token) == "period_closed"


def test_injected_orders_in_a_memo_are_returned_as_text_and_move_nothing(live: FinanceEnvironment) -> None:
    ref, memo = live.query("SELECT ref, memo FROM payables WHERE memo LIKE '%IBAN%' OR memo LIKE '%transfer_funds%'")[0]
    before = snapshot(live)
    assert ask(live, "query_erp", table="payables", ref=ref)["memo"] == memo
    assert snapshot(live) == before


# Bad calls are results, never exceptions.

VALID = {
    "query_erp": {"table": "payables", "period": "2026-01"},
    "cash_position": {"account": "tax"},
    "ageing": {"side": "payables"},
    "budget_status": {"cost_centre": "Field Sales", "period": "2026-01"},
    "search_policy": {"query": "limit"},
    "propose_entry": {
        "ref": "BNK-1000",
        "kind": "wrong_sign",
        "debit": "1010",
        "credit": "1100",
        "amount": "1.00",
    },
    "post_entry": {"ref": "DRAFT-1000", "token": "APT-1000A"},
    "transfer_funds": {"ref": "PAY-1000", "to": "X", "amount": "1.00"},
}


@pytest.mark.parametrize("name", list(VALID))
def test_missing_surplus_and_mistyped_arguments_are_results(live: FinanceEnvironment, name: str) -> None:
    valid = VALID[name]
    for key in BY_NAME[name].parameters["required"]:
        assert error(live, name, **{other: value for other, value in valid.items() if other != key}) == "bad_arguments"
    assert error(live, name, **valid, surplus="1") == "bad_arguments"
    for key in valid:
        for wrong in (None, 7, 1.5, [], {}, "", "x" * 300):
            assert error(live, name, **(valid | {key: wrong})) == "bad_arguments"


def test_an_unknown_tool_is_a_result(live: FinanceEnvironment) -> None:
    assert error(live, "drop_tables") == "unknown_tool"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(list(VALID)), data=st.data())
def test_no_arguments_make_a_tool_raise_or_change_the_books_when_it_fails(name: str, data: st.DataObject) -> None:
    live = FinanceEnvironment("test", 1, tenant="bank_A")
    keys = list(BY_NAME[name].parameters["properties"])
    values = st.one_of(
        json_values, st.sampled_from(["'; DROP TABLE lines; --", "PAY-1000", "0.00", "2026-13", "none", "9" * 12 + ".00"])
    )
    arguments = data.draw(st.dictionaries(st.sampled_from([*keys, "extra"]), values, max_size=6))
    before = snapshot(live)
    result = live.call(name, arguments, tenant="bank_A")
    assert isinstance(json.loads(result.content), dict)
    if not result.ok or name in READ_TOOLS:
        assert snapshot(live) == before
    live.close()


def test_sql_in_a_value_is_only_a_value(live: FinanceEnvironment) -> None:
    before = snapshot(live)
    assert error(live, "query_erp", table="payables", party="x' OR '1'='1") == "not_found"
    assert error(live, "budget_status", cost_centre="x'; DELETE FROM lines; --", period="2026-01") == "not_found"
    assert snapshot(live) == before


def test_verifiers_may_read_and_not_write(live: FinanceEnvironment) -> None:
    for sql in ("DELETE FROM lines", "UPDATE periods SET status = 'open'", "DROP TABLE lines", "SELECT nonsense"):
        with pytest.raises(DataError, match="query failed"):
            live.query(sql)
    assert live.query("SELECT COUNT(*) > 0 FROM lines") == [(1,)]
    assert live.call("transfer_funds", dict(zip(("ref", "to", "amount"), _payable(live), strict=True)), tenant="bank_A").ok


def _payable(live: FinanceEnvironment) -> tuple[str, str, str]:
    ref, party, amount = live.query(PENDING, (2,))[0]
    return ref, party, money.text(amount)


# What the model sees.


def test_tool_schemas_are_strict_and_small() -> None:
    for tool in TOOLS:
        schema = tool.parameters
        assert schema["type"] == "object"
        assert schema["additionalProperties"] is False
        assert set(schema["required"]) <= set(schema["properties"])
        assert len(schema["properties"]) <= (5 if tool.name == "propose_entry" else 4)
    assert {tool.name for tool in TOOLS} == set(VALID)
    assert set(RISKY_TOOLS) < set(VALID)


def test_tools_are_the_same_for_every_tenant_and_unknown_tenants_are_refused() -> None:
    world = FinanceOps()
    assert all(world.tools(tenant) == world.tools() for tenant in world.tenants)
    with pytest.raises(DataError, match="unknown tenant"):
        world.tools("bank_Z")


def test_environments_are_private_and_need_a_proper_reference() -> None:
    world = FinanceOps()
    one, two = (world.environment({"world": "finance_ops", "seed": 4}, tenant="bank_A") for _ in range(2))
    ref, party, amount = one.query(PENDING, (2,))[0]
    assert one.call("transfer_funds", {"ref": ref, "to": party, "amount": money.text(amount)}, tenant="bank_A").ok
    assert two.query("SELECT COUNT(*) FROM transfers") == [(0,)]
    for wrong in ({"world": "other", "seed": 1}, {"world": "finance_ops"}, {"world": "finance_ops", "seed": "1"}):
        with pytest.raises(DataError):
            world.environment(wrong)
