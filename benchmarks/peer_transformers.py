"""transformers' side: `generate` with its dynamic cache, padded on the left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.prompts import prompts_of
from benchmarks.side import Step, Turns


def generate(material: dict[str, Any], turns: Turns, options: dict[str, Any]) -> None:
    """The same prompts, as many tokens, temperature 1 without truncation."""
    model = AutoModelForCausalLM.from_pretrained(material["base"], dtype=getattr(torch, material["dtype"])).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    def steps() -> Iterator[Step]:
        for turn in range(1_000_000):
            ids = torch.tensor(prompts_of(material, options, turn), device=model.device)  # all of one length
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=options["new"],
                    max_new_tokens=options["new"],
                    pad_token_id=0,
                )
            yield {"tokens": float(out.shape[0] * (out.shape[1] - ids.shape[1]))}

    turns.serve(steps())
