"""vLLM's side, in an environment of its own (`POSTTRAIN_VLLM_PYTHON` names its interpreter): nothing of posttrain is imported here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from benchmarks.prompts import prompts_of
from benchmarks.side import Step, Turns


def generate(material: dict[str, Any], turns: Turns, options: dict[str, Any]) -> None:
    """The same prompts, as many tokens, temperature 1 without truncation, compiled as vLLM does by default."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, whose memory is measured
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by default it takes a share of the machine
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM, SamplingParams

    engine = LLM(model=material["base"], dtype=material["dtype"], max_model_len=1024, max_num_seqs=64, seed=0)
    how = SamplingParams(temperature=1.0, min_tokens=options["new"], max_tokens=options["new"], ignore_eos=True)

    def steps() -> Iterator[Step]:
        for turn in range(1_000_000):
            prompts = [{"prompt_token_ids": ids} for ids in prompts_of(material, options, turn)]
            answers = engine.generate(prompts, how, use_tqdm=False)
            yield {"tokens": float(sum(len(answer.outputs[0].token_ids) for answer in answers))}

    turns.serve(steps())
