"""What the contract makes of a record: token ids, a learning weight per token, and which message each token came from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """One rendered conversation.

    ids      [T] int32    token ids
    weights  [T] float32  m_t of completion-only loss: weight of *predicting* token t (0 = read, not learned); weights[0] is 0
    origin   [T] int16    index of the message the token belongs to, -1 for the preamble
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    origin: NDArray[np.int16]

    def __post_init__(self) -> None:
        assert self.ids.shape == self.weights.shape == self.origin.shape and self.ids.ndim == 1
        assert len(self.ids) == 0 or self.weights[0] == 0, "the first token has no predecessor that could predict it"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learned(self) -> int:
        """Number of tokens with a positive weight."""
        return int((self.weights > 0).sum())


class SequenceBuilder:
    """Appends runs of tokens with one weight and one origin; `build` freezes them."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._weights: list[float] = []
        self._origin: list[int] = []

    def add(self, ids: list[int], *, weight: float, origin: int) -> None:
        self._ids += ids
        self._weights += [weight] * len(ids)
        self._origin += [origin] * len(ids)

    def build(self) -> Sequence:
        return Sequence(
            np.asarray(self._ids, dtype=np.int32),
            np.asarray(self._weights, dtype=np.float32),
            np.asarray(self._origin, dtype=np.int16),
        )
