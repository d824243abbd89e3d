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
        self._policy, self._several = policy, len(set(adapters)) > 1
        for name in adapters:
            policy.use(name)
        self._fast = policy.inference() if all(policy.mixes(name) for name in adapters) else None
        self._factors = {name: self._fast.factors(name) for name in set(adapters) if name is not None} if self._fast else {}

    def infer(
        self, ids: Tensor, positions: Tensor, context: AttentionContext, shares: Sequence[tuple[str | None, Tensor | None]]
    ) -> Tensor:
        """ids, positions [T] -> final hidden states [T, hidden]; `shares` as in `Policy.mixed`."""
        if self._fast is not None:
            own = [(self._factors[name], tokens) for name, tokens in shares if name is not None]
            return self._fast.infer(ids, positions, context, own)
        with self._policy.mixed(shares) if self._several else nullcontext():
            return self._policy.forward(ids.to(self._policy.device), positions.to(self._policy.device), context)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, V] float32."""
        return self._policy.head.logits(hidden, None if self._fast is None else self._fast.head)
