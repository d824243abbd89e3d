"""The in-process engine: continuous batching over a key/value cache with shared trunks.

What an adapter's prompts all start with (tools and system text) is prefilled once and its attention is computed once for all of them;
so is the whole prompt of a group of samples. Finished rows leave, waiting requests take their place, and rows of several adapters
decode together. Under a grammar, runs of tokens that leave no choice are appended without running the model for each. Inside a session
an episode's next turn runs only what is new in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from posttrain.grammar.matcher import GrammarEngine
from posttrain.policy.policy import Policy
from posttrain.sampling.prefixes import Prefixes
from posttrain.sampling.protocol import Sample, SampleRequest
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
        self._session: dict[str | None, Prefixes] | None = None

    @contextmanager
    def session(self) -> Iterator[None]:
        """See `Sampler.session`."""
        before, self._session = self._session, {}
        try:
            yield
        finally:
            self._session = before

    @torch.inference_mode()
    def sample(self, requests: Sequence[SampleRequest], progress: Callable[[int], None] | None = None) -> list[Sample]:
        """One Sample per request, in order. `progress` is told the number of tokens drawn since its last call."""
        results: dict[int, Sample] = {}
        by_adapter: dict[str | None, dict[int, SampleRequest]] = {}
        for index, request in enumerate(requests):
            check_prompt(request, f"requests[{index}]")
            by_adapter.setdefault(request.adapter, {})[index] = request
        together = self.policy.packs and len(by_adapter) > 1 and all(self.policy.mixes(adapter) for adapter in by_adapter)
        for asked in [dict(enumerate(requests))] if together else by_adapter.values():
            rows, refill = min(self.options.max_rows, len(asked)), self.options.refill
            if self.policy.packs:
                run: Run = TreeRun(self.policy, self._drawing, rows, refill, progress, self._session)
            else:
                (adapter,) = {request.adapter for request in asked.values()}
                run = RowRun(self.policy, adapter, self._drawing, rows, refill, progress)
            run.expect(asked)
            results.update(run.decode())
        return [results[index] for index in range(len(requests))]

    def open(self, rows: int) -> LocalStream:
        """See `StreamSampler.open`."""
        return LocalStream(self.policy, self._drawing, min(rows, self.options.max_rows))

    @property
    def _drawing(self) -> Drawing:
        return Drawing(self.end_of_turn, self.grammar, self.options)
