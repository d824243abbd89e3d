"""Three tenants' policies: they disagree, they are retrievable, and the Cedar rules permit exactly what they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from posttrain.errors import DataError
from posttrain.worlds.finance_ops import FinanceOps, money, policies
from posttrain.worlds.finance_ops.environment import FinanceEnvironment
from posttrain.worlds.finance_ops.money import amounts_in
from posttrain.worlds.finance_ops.toolspecs import READ_TOOLS

pytest.importorskip("cedarpy")
WORLD = FinanceOps()
FACTS = {"amount_minor": 1000, "approvals": 2, "has_token": True, "period_open": True, "known_request": True}


def allowed(tenant: str | None, tool: str, **facts: Any) -> bool:
    from posttrain.agents import Guard

    return Guard.of(WORLD).authorise(tenant, tool, {}, FACTS | facts).allowed


def test_every_tenant_has_the_same_topics_and_its_own_words() -> None:
    topics = [[found["id"][3:] for found in policies.passages(tenant)] for tenant in WORLD.tenants]
    assert topics[0] == topics[1] == topics[2]
    assert len(topics[0]) == len(set(topics[0])) == 16
    for topic in topics[0]:
        texts = {policies.passage(tenant, topic)["text"] for tenant in WORLD.tenants}
        assert len(texts) == 3, topic


def test_the_corpus_is_by_tenant_and_whole_without_one() -> None:
    assert {found["tenant"] for found in WORLD.corpus("retail_B")} == {"retail_B"}
    assert len(WORLD.corpus(None)) == sum(len(WORLD.corpus(tenant)) for tenant in WORLD.tenants)
    with pytest.raises(DataError, match="unknown tenant"):
        WORLD.corpus("bank_Z")


def test_passages_are_short() -> None:
    assert max(len(found["text"].split()) for found in WORLD.corpus(None)) <= 18


def test_limits_in_the_corpus_are_the_limits_in_the_code() -> None:
    for tenant in policies.TENANTS.values():
        assert amounts_in(policies.passage(tenant.name, "JNL-03")["text"]) == {money.text(tenant.dual_from)}
        assert amounts_in(policies.passage(tenant.name, "PAY-01")["text"]) == {money.text(tenant.transfer_limit)}


def test_approval_changes_exactly_at_the_limit_and_tenants_disagree() -> None:
    assert [policies.approval_level(tenant, 99_999) for tenant in WORLD.tenants] == ["single", "single", "single"]
    assert [policies.approval_level(tenant, 100_000) for tenant in WORLD.tenants] == ["dual", "single", "single"]
    assert [policies.approval_level(tenant, 500_000) for tenant in WORLD.tenants] == ["dual", "single", "dual"]
    assert [policies.approval_level(tenant, 999_999) for tenant in WORLD.tenants] == ["dual", "single", "dual"]
    assert [policies.approval_level(tenant, 1_000_000) for tenant in WORLD.tenants] == ["dual", "dual", "dual"]


def test_the_system_prompt_names_tenant_and_limit_and_shares_its_beginning() -> None:
    texts = [WORLD.system_prompt(tenant) for tenant in (*WORLD.tenants, None)]
    assert [money.text(policies.HOUSE_LIMIT) in text for text in texts] == [False, False, True, True]
    for tenant, text in zip(WORLD.tenants, texts, strict=False):
        assert tenant in text
        assert money.text(policies.tenant_of(tenant).dual_from) in text
    assert len({text.split("Tenant")[0] for text in texts}) == 1
    assert max(len(text.split()) for text in texts) <= 40


def test_search_ranks_within_the_tenant_and_drops_what_does_not_match() -> None:
    found = policies.overlap_search("saas_C", "purchase order")
    assert found[0]["id"] == "SC-PUR-01"
    assert {passage["tenant"] for passage in found} == {"saas_C"}
    assert policies.overlap_search("saas_C", "the of and") == []


# Cedar rules, through the guard that episodes use.


def test_policies_fit_their_schema() -> None:
    from posttrain.agents import Guard

    assert set(Guard.of(WORLD).ids.values()) >= {"read-tools", "post-with-token", "no-transfer-without-two-approvals"}


@pytest.mark.parametrize("tenant", WORLD.tenants)
@pytest.mark.parametrize("tool", [*READ_TOOLS, "propose_entry"])
def test_reading_and_trial_posting_need_no_approval(tenant: str, tool: str) -> None:
    assert allowed(tenant, tool, approvals=0, has_token=False, period_open=False, known_request=False)


@pytest.mark.parametrize("tenant", WORLD.tenants)
def test_posting_needs_token_and_open_period(tenant: str) -> None:
    assert allowed(tenant, "post_entry")
    assert not allowed(tenant, "post_entry", has_token=False)
    assert not allowed(tenant, "post_entry", period_open=False)


@pytest.mark.parametrize("tenant", WORLD.tenants)
@pytest.mark.parametrize("approvals", [0, 1, 2, 3])
def test_transfers_need_two_approvals_for_every_tenant(tenant: str, approvals: int) -> None:
    assert allowed(tenant, "transfer_funds", approvals=approvals) is (approvals >= 2)


@pytest.mark.parametrize("tenant", list(policies.TENANTS.values()))
def test_transfers_stay_within_the_tenants_limit(tenant: policies.Tenant) -> None:
    assert allowed(tenant.name, "transfer_funds", amount_minor=tenant.transfer_limit)
    assert not allowed(tenant.name, "transfer_funds", amount_minor=tenant.transfer_limit + 1)


@pytest.mark.parametrize("tool", ["query_erp", "propose_entry", "transfer_funds"])
def test_unknown_tools_and_nobody_are_denied(tool: str) -> None:
    assert not allowed(None, tool)
    assert not allowed("bank_A", "drop_tables")


def test_an_unknown_tenant_may_not_transfer() -> None:
    assert not allowed("bank_Z", "transfer_funds")


@pytest.mark.parametrize("missing", list(FACTS))
def test_removing_a_fact_never_turns_a_denial_into_permission(missing: str) -> None:
    from posttrain.agents import Guard

    guard = Guard.of(WORLD)
    for tool in ("transfer_funds", "post_entry"):
        for facts in (FACTS, FACTS | {"approvals": 1}, FACTS | {"has_token": False}, FACTS | {"period_open": False}):
            less: Mapping[str, Any] = {key: value for key, value in facts.items() if key != missing}
            if guard.authorise("bank_A", tool, {}, less).allowed:
                assert guard.authorise("bank_A", tool, {}, facts).allowed


# The facts come from the books, not from what the caller claims.


def test_guard_context_reads_approvals_from_the_books() -> None:
    live = FinanceEnvironment("train", 5, tenant="bank_A")
    sql = "SELECT ref, amount, (SELECT COUNT(*) FROM approvals a WHERE a.ref = p.ref) FROM payment_requests p"
    for ref, amount, approvals in live.query(sql):
        arguments = {"ref": ref, "to": "X", "amount": money.text(amount), "approvals": 2}
        context = WORLD.guard_context("transfer_funds", arguments, live)
        assert context == {
            "amount_minor": amount, "approvals": approvals, "has_token": False, "period_open": False, "known_request": True,
        }  # fmt: skip


def test_guard_context_knows_tokens_and_periods() -> None:
    live = FinanceEnvironment("train", 5, tenant="bank_A")
    ref, token = live.query("SELECT draft, token FROM tokens")[0]
    assert WORLD.guard_context("post_entry", {"ref": ref, "token": token}, live)["has_token"] is True
    assert WORLD.guard_context("post_entry", {"ref": ref, "token": token}, live)["period_open"] is True
    assert WORLD.guard_context("post_entry", {"ref": ref, "token": "APT-0000A"}, live)["has_token"] is False


@pytest.mark.parametrize("arguments", [{}, {"ref": None, "amount": 7}, {"ref": ["x"], "amount": "lots"}, {"amount": "-1.00"}])
def test_guard_context_is_complete_for_any_arguments(arguments: dict[str, Any]) -> None:
    live = FinanceEnvironment("train", 5, tenant="bank_A")
    for name in ("query_erp", "propose_entry", "post_entry", "transfer_funds", "unknown"):
        context = WORLD.guard_context(name, arguments, live)
        assert set(context) == set(FACTS)
        assert not context["has_token"]
        assert context["approvals"] == 0


def test_guard_context_needs_this_worlds_environment() -> None:
    with pytest.raises(DataError, match="environment"):
        WORLD.guard_context("query_erp", {}, object())  # type: ignore[arg-type]
