"""`python -m benchmarks.gpu`: the same duels on one CUDA GPU, with Llama-shaped random weights, and model FLOPs utilisation.

Weights and tokens are random: speed does not depend on what they say. Tokens/s count every token of a record; records share no prefix
here, so no side computes fewer. `--smoke` runs the whole script with a tiny shape on whatever device there is.

Model FLOPs of a LoRA step on a frozen base, per token (Kaplan 2020, appendix B; Chowdhery 2022, appendix B, without gradients of frozen
weights): 4 P for the blocks (forward, gradient of the input), 12 L h s for attention (h: width of all heads, s: mean number of keys a
query sees, its backward pass twice the forward), and 4 V d for each learned token's logits. What is computed twice counts once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import duel, results
from benchmarks.duel import Duel, Outcome, Side


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama: hidden and MLP width, layers, query and key heads, head size, vocabulary."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    size: int
    vocabulary: int = 128256

    @property
    def block_parameters(self) -> int:
        """Of all blocks' matrices; embeddings and output head are counted apart."""
        attention = self.hidden * self.size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    def step_flops(self, lengths: list[int], learned: int) -> float:
        """Model FLOPs of one LoRA step over records of these lengths with so many learned tokens."""
        tokens, keys = sum(lengths), sum(length * (length + 1) / 2 for length in lengths)
        attention = 12 * self.layers * self.heads * self.size * keys
        return 4.0 * self.block_parameters * tokens + attention + 4.0 * self.vocabulary * self.hidden * learned


SHAPES = {
    "1b": Shape(2048, 8192, 16, 32, 8, 64),  # Llama 3.2 1B
    "3b": Shape(3072, 8192, 28, 24, 8, 128),  # Llama 3.2 3B
    "tiny": Shape(64, 128, 2, 4, 2, 16, 49152),
}
# Dense bf16 peak, TFLOP/s, from the makers' data sheets (without sparsity); the name with the most words that fits wins.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}


LONGEST, SHORT = 2048, 96  # tokens of the longest record, and of a smoke run's


def peak_tflops(name: str) -> float | None:
    """The table's figure for a device's name; None for one it does not hold. Whole words only: an L40 is no L4, a GH200 no H200."""
    words = set(re.findall(r"\w+", name))
    fitting = [known for known in PEAKS if set(known.split()) <= words and "Laptop" not in words]
    return PEAKS[max(fitting, key=len)] if fitting else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--shapes", default="1b,3b", help=f"comma-separated, of: {', '.join(SHAPES)}")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of a device that the table does not hold")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape on any device; its figures mean nothing")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    chosen = parser.parse_args()
    if not chosen.smoke and not torch.cuda.is_available():
        parser.exit(2, "torch sees no CUDA device here: run this on one, or with --smoke\n")
    shapes = ["tiny"] if chosen.smoke else chosen.shapes.split(",")
    if unknown := sorted(set(shapes) - set(SHAPES)):
        parser.error(f"no such shape: {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    peak = chosen.peak_tflops or peak_tflops(results.device())
    if peak is None and not chosen.smoke:
        parser.error(f"the peak of {results.device()} is not known: give --peak-tflops")

    rows: list[dict[str, Any]] = []
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    log_path = Path(tempfile.gettempdir()) / "posttrain-bench.log"
    with tempfile.TemporaryDirectory(prefix="posttrain-bench-") as scratch, log_path.open("w") as log:
        for name in shapes:
            data = Path(scratch) / f"{name}.json"
            material = make(SHAPES[name], Path(scratch) / name, dtype, data, longest=SHORT if chosen.smoke else LONGEST)
            for planned in works(name, small=chosen.smoke):
                if "trl" in planned.peer.module and importlib.util.find_spec("trl") is None:
                    print(f"{planned.work}: skipped, trl is not installed (make bench-gpu installs it)")
                    continue
                outcome = duel.run(replace(planned, rounds=chosen.rounds), data, log, lambda line: print(f"  {line}", flush=True))
                rows += outcome.rows()
                if planned.ours.function == "sft" and peak is not None:
                    rows.append(utilisation(outcome, SHAPES[name], material, peak))
                if not chosen.smoke:
                    results.save(rows, chosen.results, {"base": "Llama shapes, random weights", "dtype": dtype})
    print(results.table(rows))


def works(name: str, small: bool) -> list[Duel]:
    """What is measured for a shape."""
    train = {"rank": 16, "lr": 1e-4, "pack_tokens": 256 if small else 8192, "batch": 2 if small else 8, "records": "records"}
    # no record is cut on either side: a peer that drops the learned end of long records does other work
    padded = {"bf16": not small, "max_length": SHORT if small else LONGEST}
    packed = {**padded, "packing": True, "batch": 1 if small else 4}
    ours = Side("ours", "sft", train)
    new = 8 if small else 64
    duels = [
        Duel(f"SFT LoRA, {name}, padded peer", ours, Side("peer_trl", "sft", {**train, **padded}), "TRL, batches padded"),
        Duel(f"SFT LoRA, {name}, packed peer", ours, Side("peer_trl", "sft", {**train, **packed}), "TRL, packed"),
    ]
    for batch in (2,) if small else (1, 32):
        options = {"batch": batch, "prompt": 64, "new": new, "shared": False}
        duels.append(
            Duel(
                f"generate {new} tokens, {name}, batch {batch}",
                Side("ours", "generate", options),
                Side("peer_transformers", "generate", options),
                "transformers generate",
            )
        )
    return duels


def make(shape: Shape, base: Path, dtype: str, target: Path, longest: int, seed: int = 5) -> dict[str, Any]:
    """A base folder with random weights, and records of random tokens: lengths between a sixteenth of `longest` and `longest`, evenly in
    their logarithm, the last third learned."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from posttrain.policy import resolve_base

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.size, max_position_embeddings=8192,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(resolve_base("smollm2-135m")).save_pretrained(base)
    rng = random.Random(seed)
    records = []
    for _ in range(160):
        length = int(longest * 16 ** -rng.random())
        ids = [rng.randrange(100, 49000) for _ in range(length)]
        records.append({"ids": ids, "learned": [0] * (length - length // 3) + [1] * (length // 3)})
    windows = [[rng.randrange(100, 49000) for _ in range(160)] for _ in range(64)]
    material: dict[str, Any] = {"base": str(base), "dtype": dtype, "records": records, "windows": windows}
    target.write_text(json.dumps(material), "utf-8")
    return material


def utilisation(outcome: Outcome, shape: Shape, material: dict[str, Any], peak: float) -> dict[str, Any]:
    """Model FLOPs utilisation of both sides, from their tokens per second and the FLOPs of the records' mean token."""
    lengths = [len(record["ids"]) for record in material["records"]]
    learned = sum(sum(record["learned"]) for record in material["records"])
    per_token = shape.step_flops(lengths, learned) / sum(lengths)
    ours, peer = ([speed * per_token / (peak * 1e12) for speed in side] for side in outcome.speed)
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return {
        "work": outcome.duel.work, "peer_name": outcome.duel.peer_name, "metric": "MFU",
        "ours": round(statistics.median(ours), 4), "peer": round(statistics.median(peer), 4),
        "ratio": round(statistics.median(ratios), 3), "ratio_min": round(min(ratios), 3), "ratio_max": round(max(ratios), 3),
        "peak_tflops": peak, "flops_per_token": per_token,
    }  # fmt: skip


if __name__ == "__main__":
    main()
