"""Rendering once: what is read back is what was rendered, for these records and this contract only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from posttrain.contract import Contract, Sequence, rendering
from posttrain.contract.rendering import Rendered, Renderer
from posttrain.data.records import Conversation, Message, Preference
from tiny_models import train_tokenizer

CONTRACT = Contract(train_tokenizer())
ASKED = [Message("user", f"What is due on account {i}?") for i in range(9)]
CONVERSATIONS = [Conversation(str(i), (m, Message("assistant", f"{i}2.50 is due"))) for i, m in enumerate(ASKED)]
PAIRS = [
    Preference(str(i), (m,), (Message("assistant", f"{i}2.50"),), (Message("assistant", "a lot"),)) for i, m in enumerate(ASKED)
]


def same(found: object, wanted: list[Sequence]) -> None:
    found = list(found)  # type: ignore[call-overload]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        for name in ("ids", "weights", "origin"):
            a, b = getattr(one, name), getattr(other, name)
            assert a.dtype == b.dtype and np.array_equal(a, b)


def direct() -> list[Sequence]:
    return [CONTRACT.render(c) for c in CONVERSATIONS]


@pytest.mark.parametrize("cached", [False, True])
def test_conversations_and_pairs_come_in_order(cached: bool, tmp_path: Path) -> None:
    renderer = Renderer(CONTRACT, tmp_path if cached else None)
    told: list[int] = []
    same(renderer.conversations(CONVERSATIONS, told.append), direct())
    assert sum(told) == len(CONVERSATIONS)
    same(renderer.preferences(PAIRS), [side for pair in PAIRS for side in CONTRACT.render_preference(pair)])
    assert len(list(tmp_path.iterdir())) == (2 if cached else 0)


def test_what_was_rendered_is_read_not_rendered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Renderer(CONTRACT, tmp_path).conversations(CONVERSATIONS)
    monkeypatch.setattr(rendering, "_render", lambda *_: pytest.fail("rendered again"))
    again = Renderer(CONTRACT, tmp_path).conversations(CONVERSATIONS)
    same(again, direct())
    assert isinstance(again, Rendered) and isinstance(again.ids, np.memmap)
    same(again[2:5], direct()[2:5])
    same([again[-1]], direct()[-1:])
    with pytest.raises(IndexError):
        again[len(CONVERSATIONS)]


def test_other_records_or_another_contract_are_rendered_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Renderer(CONTRACT, tmp_path).conversations(CONVERSATIONS)
    Renderer(CONTRACT, tmp_path).conversations(CONVERSATIONS[::-1])
    other = Contract(train_tokenizer())
    monkeypatch.setattr(other, "lock", type("Lock", (), {"fingerprint": "another"}))
    Renderer(other, tmp_path).conversations(CONVERSATIONS)
    assert len(list(tmp_path.iterdir())) == 3


def test_several_processes_render_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_PARALLEL", 8)
    monkeypatch.setattr(rendering, "_CHUNK", 2)
    monkeypatch.setattr(rendering.os, "cpu_count", lambda: 2)
    told: list[int] = []
    same(Renderer(CONTRACT).conversations(CONVERSATIONS, told.append), direct())
    assert told == [2, 2, 2, 2, 1]


def test_no_records_are_no_sequences() -> None:
    assert list(Renderer(CONTRACT).conversations([])) == []
