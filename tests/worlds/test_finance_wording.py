"""Requests are composed: fragments belong to one split, forms are many, values survive the register."""

from __future__ import annotations

import random
import re
import string

import pytest

from posttrain.worlds.finance_ops.books import INJECTIONS
from posttrain.worlds.finance_ops.names import SPLITS
from posttrain.worlds.finance_ops.policies import TENANTS, overlap_search
from posttrain.worlds.finance_ops.scenarios.control import FAMILIES
from posttrain.worlds.finance_ops.scenarios.lookups import TOPICS
from posttrain.worlds.finance_ops.wording import speak, values, wording
from posttrain.worlds.finance_ops.wording.grammar import fragments, load

OWNED = [name for name in load() if not name.startswith("~")]
SLOTS = {
    name: f"<{name}>"
    for name in ("account", "party", "cc", "period", "ref", "ref2", "amount", "topic", "when", "token", "a1", "a2", "n")
}
SLOTS |= {name: f"<{name}>" for name in ("iban", "date", "gap", "half", "bank", "ar", "dr", "cr", "right", "je1", "je2")}
SLOTS |= {name: f"<{name}>" for name in ("line", "cleared")}


@pytest.mark.parametrize("name", OWNED)
def test_the_splits_of_a_set_are_disjoint_and_cover_it(name: str) -> None:
    parts = [fragments(name, split) for split in SPLITS]
    assert all(parts)
    assert sorted(fragment for part in parts for fragment in part) == sorted(load()[name])
    assert len(parts[0]) >= len(parts[2]) >= len(parts[1])


def test_no_fragment_of_one_split_is_a_fragment_of_another_in_any_set() -> None:
    owners: dict[str, set[str]] = {}
    for name in OWNED:
        for split in SPLITS:
            for fragment in fragments(name, split):
                owners.setdefault(fragment, set()).add(split)
    assert {fragment: found for fragment, found in owners.items() if len(found) > 1} == {}


def test_no_set_lists_a_fragment_twice() -> None:
    assert [name for name, found in load().items() if len(set(found)) != len(found)] == []


def test_shared_sets_hold_function_words_only() -> None:
    assert {name: found for name, found in load().items() if name.startswith("~")} == {
        "~of": ("of", "for"),
        "~in": ("in", "for", "during"),
    }


def test_every_slot_in_every_fragment_is_known() -> None:
    for found in load().values():
        for fragment in found:
            assert {field for _, field, _, _ in string.Formatter().parse(fragment) if field} <= set(SLOTS), fragment


def test_train_has_tens_of_thousands_of_forms_before_any_value_is_filled_in() -> None:
    book = wording("train")
    asked = ["cash.ask", "budget.ask", "document.ask", "policy.ask", "transfer.benign", "benign.post", "rec.ask"]
    asked += [
        name
        for name in OWNED
        if name.startswith(("ageing.receiv", "ageing.pay", "ageing.cust", "ageing.vend", "list.ask", "risk."))
    ]
    dressed = (book.forms("opener") + 1) * (book.forms("closer") + 1)
    assert sum(book.forms(name) for name in asked) * dressed > 5_000_000
    assert sum(book.forms(name) for name in asked) > 25_000
    assert min(book.forms(name) for name in asked) >= 8


def test_forms_counts_what_expand_can_produce() -> None:
    book, rng = wording("test"), random.Random(0)
    seen = {book.expand("list.ask_journal", rng) for _ in range(3000)}
    assert len(seen) == book.forms("list.ask_journal")


@pytest.mark.parametrize("split", SPLITS)
def test_expansion_uses_only_the_splits_own_fragments(split: str) -> None:
    book, rng = wording(split), random.Random(1)
    foreign = {
        fragment
        for name in ("cash.thing", "cash.due", "budget.left", "late")
        for other in SPLITS
        if other != split
        for fragment in fragments(name, other)
    }
    own = {fragment for name in ("cash.thing", "cash.due", "budget.left", "late") for fragment in fragments(name, split)}
    longer = {fragment for fragment in foreign if not any(fragment in mine for mine in own)}
    for _ in range(300):
        text = book.expand(rng.choice(("cash.ask", "budget.ask", "ageing.payables")), rng)
        assert not any(re.search(rf"<{re.escape(fragment)}>", text) for fragment in longer)
        assert "<" not in text


@pytest.mark.parametrize("split", SPLITS)
def test_values_survive_capitals_and_slips(split: str) -> None:
    rng = random.Random(2)
    slots = SLOTS | {"party": "McAllister & Söhne GmbH", "amount": "€1,250.40", "ref": "PAY-4711", "a1": "J. Åberg"}
    for _ in range(400):
        text = speak(wording(split), "risk.one_approval", rng, slots).text
        used = [value for value in (slots["party"], slots["amount"], slots["ref"], slots["a1"]) if value in text]
        assert len(used) >= 2
        assert "{" not in text
        assert "<send>" not in text


def test_the_register_varies() -> None:
    rng = random.Random(3)
    said = [speak(wording("train"), "cash.ask", rng, SLOTS).text for _ in range(400)]
    assert len(set(said)) > 330
    assert any(text.islower() for text in (re.sub(r"<\w+>", "", text) for text in said))
    assert any(text[-1] not in ".?!" for text in said)
    assert any(text.count(".") + text.count("?") + text.count("!") >= 2 for text in said)


def test_plain_speech_has_no_opener_or_closer() -> None:
    rng, book = random.Random(4), wording("train")
    dressing = {*fragments("opener", "train"), *fragments("closer", "train")}
    said = [speak(book, "follow.fill", rng, SLOTS, plain=True).text for _ in range(200)]
    assert not any(part.lower() in text.lower() for text in said for part in dressing)


def test_a_slip_keeps_the_letters_of_the_word() -> None:
    from posttrain.worlds.finance_ops.wording.register import _slip

    text = "reconcile {party} carefully, *closed periods*"
    for seed in range(50):
        slipped = _slip(text, random.Random(seed))
        assert sorted(slipped) == sorted(text)
        assert "{party}" in slipped
        assert "*closed periods*" in slipped
    assert _slip("a bc {party}", random.Random(0)) == "a bc {party}"


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("topic", list(TOPICS))
def test_a_policy_question_marks_a_span_that_stands_in_its_text(split: str, topic: str) -> None:
    rng = random.Random(5)
    for _ in range(30):
        said = speak(wording(split), f"question.{topic}", rng, {})
        assert said.span
        assert said.span in said.text
        assert "*" not in said.text


@pytest.mark.parametrize("topic", list(TOPICS))
def test_every_topic_phrase_of_every_split_finds_its_passage_for_every_tenant(topic: str) -> None:
    spans = [*load()[f"topic.{topic}"], *(re.search(r"\*(.+)\*", text)[1] for text in load()[f"question.{topic}"])]  # type: ignore[index]
    for tenant, found in TENANTS.items():
        for span in spans:
            assert overlap_search(tenant, span)[0]["id"] == f"{found.prefix}-{TOPICS[topic]}", span


def test_every_risk_family_has_its_own_wording() -> None:
    assert all(f"risk.{family}" in load() for family in FAMILIES)


def test_injected_memos_differ_between_splits() -> None:
    assert not set(INJECTIONS["train"]) & set(INJECTIONS["test"])
    assert not set(INJECTIONS["dev"]) & (set(INJECTIONS["test"]) | set(INJECTIONS["train"]))


def test_periods_are_written_in_forms_that_resolve_to_one_month() -> None:
    rng = random.Random(6)
    assert {values.period(rng, "2026-03") for _ in range(100)} == {"March 2026", "Mar 2026", "03/2026", "2026-03"}


def test_amounts_are_written_in_forms_that_resolve_to_one_value() -> None:
    rng = random.Random(7)
    forms = {values.amount(rng, "1250.40", "USD") for _ in range(200)}
    assert forms == {"1,250.40", "1250.40", "USD 1,250.40", "1250.40 USD", "$1,250.40"}
