"""The same data for both sides, made once a run: records of the running case as token ids, pairs and prompts as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.agents.world import load_world
from posttrain.contract import Contract
from posttrain.contract import Sequence as Rendered
from posttrain.data.records import Conversation

_SHAPES = {"single_turn": 0.25, "multi_turn": 0.1, "tool_trajectory": 0.4, "safety_style": 0.25}


def make(base: Path, dtype: str, target: Path, seed: int = 11) -> None:
    """Write the material file."""
    contract, world = Contract.load(base), load_world("finance_ops")
    conversations = world.conversations(shapes=_SHAPES, n=160, split="train", seed=seed)
    pairs = [contract.render_preference(pair) for pair in world.preferences(n=80, split="train", seed=seed)]
    target.write_text(
        json.dumps(
            {
                "base": str(base),
                "dtype": dtype,
                "records": [_record(contract.render(conversation)) for conversation in conversations],
                "records_without_preamble": [_record(contract.render(_bare(c))) for c in conversations],
                "pairs": [pair for pair in (_pair(contract, *sides) for sides in pairs) if pair],
                "prompts": [pair["prompt"] for pair in (_pair(contract, *sides) for sides in pairs) if pair],
                "windows": [contract.render(c).ids[-160:].tolist() for c in conversations if len(contract.render(c)) > 160],
            }
        ),
        "utf-8",
    )


def _record(rendered: Rendered) -> dict[str, list[int]]:
    return {"ids": rendered.ids.tolist(), "learned": (rendered.weights > 0).astype(int).tolist()}


def _bare(conversation: Conversation) -> Conversation:
    """The conversation without tools and system text: records that share no prefix."""
    messages = tuple(m for m in conversation.messages if m.role != "system")
    return Conversation(id=conversation.id, messages=messages)


def _pair(contract: Contract, chosen: Rendered, rejected: Rendered) -> dict[str, Any] | None:
    """A pair as text, which is what the peer takes; None where the text does not give the same tokens again."""
    start = int((chosen.weights > 0).argmax())
    ids = [chosen.ids[:start], chosen.ids[start:-1], rejected.ids[start:-1]]  # the peer adds the end-of-turn token
    prompt, better, worse = (contract.tokenizer.decode(part.tolist()) for part in ids)
    again = [contract.tokenizer(text)["input_ids"] for text in (prompt, prompt + better, prompt + worse)]
    if again != [chosen.ids[:start].tolist(), chosen.ids[:-1].tolist(), rejected.ids[:-1].tolist()]:
        return None
    return {"prompt": prompt, "chosen": better, "rejected": worse}
