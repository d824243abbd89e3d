"""`python -m benchmarks.serving`: how long clients of one server wait for answers of different lengths.

Each of several clients sends its next request as soon as it has its answer; they start one after the other. Requests go through the
server's queue to the model, without HTTP. The line that is printed says seconds to answer (mean, median, 95th percentile; of the
shorter half of the answers also the mean) and tokens per second. Two source trees are compared by running it under each in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time

from posttrain.pipeline.runtime import prepare_process
from posttrain.policy import Policy, resolve_base
from posttrain.policy.weights import fast_dtype
from posttrain.sampling import LocalSampler, SampleOptions, SampleRequest
from posttrain.serving.batcher import Batcher
from posttrain.serving.completions import SamplerEngine
from posttrain.serving.requests import Limits

_VOCABULARY = 20_000  # prompts are random tokens below this
_PREAMBLE, _OWN = 64, 32  # tokens of a prompt that all share, and that none shares


async def _client(batcher: Batcher, requests: list[SampleRequest], delay: float, told: list[tuple[int, float]]) -> None:  # type: ignore[type-arg]
    await asyncio.sleep(delay)
    for request in requests:
        start = time.perf_counter()
        sample = await batcher.complete(request)
        told.append((len(sample.ids), time.perf_counter() - start))


async def _serve(batcher: Batcher, clients: list[list[SampleRequest]], stagger: float) -> list[tuple[int, float]]:  # type: ignore[type-arg]
    told: list[tuple[int, float]] = []
    batcher.start()
    await asyncio.gather(*(_client(batcher, requests, i * stagger, told) for i, requests in enumerate(clients)))
    await batcher.stop()
    return told


def _clients(count: int, each: int, seed: int) -> list[list[SampleRequest]]:
    rng = random.Random(seed)
    preamble = [rng.randrange(100, _VOCABULARY) for _ in range(_PREAMBLE)]
    return [
        [
            SampleRequest(
                (*preamble, *(rng.randrange(100, _VOCABULARY) for _ in range(_OWN))),
                rng.randrange(2**31),
                SampleOptions(rng.choice((8, 16, 32, 96)), 1.0),
            )
            for _ in range(each)
        ]
        for _ in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--stagger", type=float, default=0.2, help="seconds between the starts of two clients")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    prepare_process(None)
    policy = Policy.load(resolve_base(chosen.base), fast_dtype())
    sampler = LocalSampler(policy, end_of_turn=-1)
    engine = SamplerEngine(policy, sampler, end_of_turn=-1, context=2048)
    sampler.sample(_clients(1, 1, 1)[0])  # arranges the weights
    start = time.perf_counter()
    told = asyncio.run(_serve(Batcher(engine, Limits()), _clients(chosen.clients, chosen.requests, chosen.seed), chosen.stagger))
    seconds = time.perf_counter() - start
    waits = sorted(wait for _, wait in told)
    short = [wait for tokens, wait in told if tokens <= 16]
    figures = {
        "answers": len(told),
        "mean": statistics.mean(waits),
        "median": statistics.median(waits),
        "p95": waits[int(0.95 * (len(waits) - 1))],
        "short_mean": statistics.mean(short) if short else None,
        "tokens_per_second": sum(tokens for tokens, _ in told) / seconds,
    }
    print(json.dumps({name: value if value is None else round(value, 2) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
