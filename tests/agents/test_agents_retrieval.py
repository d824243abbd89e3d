from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.agents import Retriever
from posttrain.agents.retrieval import tokens
from posttrain.errors import DataError

CORPUS = [
    {"id": "BA-1", "tenant": "bank_A", "title": "Transfers", "text": "Every transfer needs two approvals before it is made."},
    {"id": "BA-2", "tenant": "bank_A", "text": "Entries above 1000.00 need dual approval."},
    {"id": "RB-1", "tenant": "retail_B", "text": "Small transfers below the limit may skip the second approval."},
    {"id": "ZH-1", "tenant": "saas_C", "text": "超过限额的付款申请需要两名主管审批。"},
    {"id": "ZH-2", "tenant": "saas_C", "text": "月末对账差异应在三日内说明原因。"},
    {"id": "ALL", "tenant": "", "text": "Keep a record of every approval."},
]


@pytest.fixture
def retriever() -> Retriever:
    return Retriever(CORPUS)


def test_the_best_passage_comes_first_with_its_id(retriever: Retriever) -> None:
    hits = retriever.search("two approvals for a transfer", tenant="bank_A")
    assert hits[0].id == "BA-1"
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_another_tenants_passages_are_never_found_and_shared_ones_are(retriever: Retriever) -> None:
    for tenant in ("bank_A", "retail_B", "saas_C", None, "stranger"):
        hits = retriever.search("approval transfer second limit entries record 审批 对账", tenant=tenant, k=10)
        assert {hit.tenant for hit in hits} <= {tenant, None}
        assert "ALL" in {hit.id for hit in hits}


def test_another_tenants_text_does_not_move_a_score(retriever: Retriever) -> None:
    flooded = Retriever([*CORPUS, *({"id": f"x{n}", "tenant": "retail_B", "text": "two approvals transfer"} for n in range(50))])
    query = "two approvals for a transfer"
    assert flooded.search(query, tenant="bank_A") == retriever.search(query, tenant="bank_A")


def test_the_tenant_is_chosen_before_the_best_k() -> None:
    crowd = [{"id": f"x{n}", "tenant": "retail_B", "text": "approval approval"} for n in range(20)]
    assert [hit.id for hit in Retriever([*crowd, CORPUS[1]]).search("approval", tenant="bank_A", k=1)] == ["BA-2"]


def test_chinese_is_found_by_its_bigrams(retriever: Retriever) -> None:
    assert [hit.id for hit in retriever.search("付款要谁审批？", tenant="saas_C")] == ["ZH-1"]
    assert [hit.id for hit in retriever.search("对账差异", tenant="saas_C")] == ["ZH-2"]


def test_what_shares_no_word_is_not_found(retriever: Retriever) -> None:
    for query in ("zebra", "", "  ,;", "的"):
        assert retriever.search(query, tenant="bank_A") == ()


def test_no_passages_find_nothing() -> None:
    assert Retriever([]).search("approval", tenant="bank_A") == ()
    assert Retriever([CORPUS[0]]).search("approval", tenant="retail_B") == ()


def test_ties_keep_the_order_of_the_corpus() -> None:
    same = [{"id": str(n), "tenant": "t", "text": "approval"} for n in range(5)]
    assert [hit.id for hit in Retriever(same).search("approval", tenant="t", k=3)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Dual-Approval, 1000.00!", ["dual", "approval", "1000", "00"]),
        ("付款审批", ["付款", "款审", "审批"]),
        ("款", ["款"]),
        ("按SOP对账", ["按", "sop", "对账"]),
        ("ＦＵＬＬ　width", ["full", "width"]),
        ("JV_1002", ["jv", "1002"]),
    ],
)
def test_words_are_lower_case_and_chinese_runs_are_bigrams(text: str, found: list[str]) -> None:
    assert tokens(text) == found


@given(st.text(max_size=30), st.sampled_from(["bank_A", "retail_B", "saas_C"]))
def test_no_query_leaves_the_tenant_or_breaks_the_search(query: str, tenant: str) -> None:
    assert {hit.tenant for hit in Retriever(CORPUS).search(query, tenant=tenant, k=10)} <= {tenant, None}


@pytest.mark.parametrize("passage", [{"id": "", "text": "x"}, {"id": "x", "text": ""}, {"text": "x"}, CORPUS[0]])
def test_a_passage_needs_an_id_of_its_own_and_a_text(passage: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"corpus\[1\]"):
        Retriever([CORPUS[0], passage])
