"""Passes of a sampler through a policy, whichever way computes them fastest there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor

from posttrain.policy.attention import AttentionContext
from posttrain.policy.policy import Policy


class Decoder:
    """Passes without gradients over tokens of these adapters, as they are now: through arranged weights where those fit, else through
    the model itself. It is good until an adapter is trained or another is made active."""

    def __init__(self, policy: Policy, adapters: Sequence[str | None]) -> None:
        """BindingError for an adapter that the policy does not hold."""
        self._policy, self._adapters = policy, list(dict.fromkeys(adapters))
        for name in self._adapters:
            policy.use(name)
        self._fast = policy.inference() if all(policy.mixes(name) for name in self._adapters) else None
        self._factors = {name: self._fast.factors(name) for name in self._adapters if name is not None} if self._fast else {}

    def add(self, name: str | None) -> None:
        """Take another adapter in: the only one, or one whose tokens may share a pass (`Policy.mixes`). BindingError as above."""
        if name in self._adapters:
            return
        self._policy.use(name)
        self._adapters.append(name)
        if not self._policy.mixes(name):
            self._fast = None
        if self._fast is not None and name is not None:
            self._factors[name] = self._fast.factors(name)

    def activate(self) -> None:
        """Make the adapter the policy's active one where passes rely on that, after somebody else used the policy."""
        if self._fast is None and len(self._adapters) == 1:
            self._policy.use(self._adapters[0])

    def infer(
        self, ids: Tensor, positions: Tensor, context: AttentionContext, shares: Sequence[tuple[str | None, Tensor | None]]
    ) -> Tensor:
        """ids, positions [T] -> final hidden states [T, hidden]; `shares` as in `Policy.mixed`."""
        if self._fast is not None:
            own = [(self._factors[name], tokens) for name, tokens in shares if name is not None]
            return self._fast.infer(ids, positions, context, own)
        with self._policy.mixed(shares) if len(self._adapters) > 1 else nullcontext():
            return self._policy.forward(ids.to(self._policy.device), positions.to(self._policy.device), context)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, V] float32."""
        return self._policy.head.logits(hidden, None if self._fast is None else self._fast.head)
