"""Rows one by one, each with the model's own cache: for architectures whose layers mix tokens outside attention (state spaces,
convolutions), where neither a shared trunk nor a batch of unlike lengths would be exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from posttrain.policy.policy import Policy
from posttrain.sampling.run import Drawing, Row, Run


class RowRun(Run):
    """Every row has a cache of its own, made and kept by the model."""

    def __init__(
        self,
        policy: Policy,
        adapter: str | None,
        drawing: Drawing,
        capacity: int,
        refill: float,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Every request must be one for this adapter. BindingError for one that the policy does not hold."""
        super().__init__(drawing, capacity, refill, progress)
        self.policy, self.adapter = policy, adapter
        self._caches: list[Any] = []
        self.activate()

    def activate(self) -> None:
        """Make the run's adapter the policy's active one, after another run had its turn."""
        self.policy.use(self.adapter)

    def admit(self, rows: list[Row]) -> None:
        """See `Run.admit`: the whole prompt is pending, and the next step runs it."""
        for row in rows:
            row.pending = list(row.request.prompt)
            self.rows.append(row)
            self._caches.append(None)

    def step(self) -> Tensor:
        """See `Run.step`."""
        last = []
        for place, row in enumerate(self.rows):
            hidden, self._caches[place] = self.policy.go_on(torch.tensor(row.pending), self._caches[place])
            last.append(hidden[-1])
            row.pending.clear()
        return self.policy.head.logits(torch.stack(last))

    def leave(self, place: int) -> None:
        """See `Run.leave`."""
        self._caches[place] = self._caches[-1]
        self._caches.pop()
