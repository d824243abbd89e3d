"""The in-process engine: continuous batching over a key/value cache with shared trunks.

What an adapter's prompts all start with (tools and system text) is prefilled once and its attention is computed once for all of them;
so is the whole prompt of a group of samples. Finished rows leave, waiting requests take their place, and rows of several adapters
decode together. Under a grammar, runs of tokens that leave no choice are appended without running the model for each. A conversation's
next turn runs only what is new in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from posttrain.errors import PosttrainError
from posttrain.grammar.matcher import GrammarEngine
from posttrain.policy.policy import Policy
from posttrain.sampling.protocol import Sample, SampleRequest, Then
from posttrain.sampling.rows import RowRun
from posttrain.sampling.run import Drawing, EngineOptions, Run, check_prompt
from posttrain.sampling.stream import LocalStream
from posttrain.sampling.tree import TreeRun


class LocalSampler:
    """Samples from a policy in this process. Implements `Sampler`."""

    def __init__(
        self, policy: Policy, end_of_turn: int, grammar: GrammarEngine | None = None, options: EngineOptions | None = None
    ) -> None:
        self.policy, self.end_of_turn, self.grammar = policy, end_of_turn, grammar
        self.options = options or EngineOptions()

    @torch.inference_mode()
    def sample(self, requests: Sequence[SampleRequest], progress: Callable[[int], None] | None = None) -> list[Sample]:
        """One Sample per request, in order. `progress` is told the number of tokens drawn since its last call."""
        results: dict[int, Sample] = {}
        by_adapter: dict[str | None, dict[int, SampleRequest]] = {}
        for index, request in enumerate(requests):
            check_prompt(request, f"requests[{index}]", self.policy.steady)
            by_adapter.setdefault(request.adapter, {})[index] = request
        together = self.policy.packs and len(by_adapter) > 1 and all(self.policy.mixes(adapter) for adapter in by_adapter)
        for asked in [dict(enumerate(requests))] if together else by_adapter.values():
            rows, refill = min(self.options.max_rows, len(asked)), self.options.refill
            if self.policy.packs:
                run: Run = TreeRun(self.policy, self._drawing, rows, refill, progress)
            else:
                (adapter,) = {request.adapter for request in asked.values()}
                run = RowRun(self.policy, adapter, self._drawing, rows, refill, progress)
            run.expect(asked)
            results.update(run.decode())
        return [results[index] for index in range(len(requests))]

    def converse(self, requests: Sequence[SampleRequest], then: Then) -> None:
        """See `Sampler.converse`."""
        for index, request in enumerate(requests):
            check_prompt(request, f"requests[{index}]", self.policy.steady)
        rows = min(self.options.max_rows, len(requests))
        stream = LocalStream(self.policy, self._drawing, rows, at_once=None)
        talking: dict[int, int] = {}  # by ticket, which conversation
        fresh, asked = deque(enumerate(requests)), dict[int, SampleRequest]()
        while fresh or asked or talking:
            # no more than have a row each: so a next turn finds its last one still in memory
            while fresh and len(talking) + len(asked) < rows:
                asked.update([fresh.popleft()])
            talking.update(zip(stream.admit(list(asked.values())), asked, strict=True))
            asked.clear()
            for ticket, found in stream.step().items():
                if isinstance(found, PosttrainError):
                    raise found
                conversation = talking.pop(ticket)
                following = then(conversation, found)
                if following is not None:
                    asked[conversation] = following

    def open(self, rows: int) -> LocalStream:
        """See `StreamSampler.open`."""
        return LocalStream(self.policy, self._drawing, min(rows, self.options.max_rows))

    @property
    def _drawing(self) -> Drawing:
        return Drawing(self.end_of_turn, self.grammar, self.options)
