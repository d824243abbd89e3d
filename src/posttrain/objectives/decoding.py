"""What constrained decoding and retrieval do to probabilities.

Sources: Willard & Louf 2023, Park et al. 2024 (masking against conditioning); Lewis et al. 2020, section 2 (RAG); Schick et al.
2023, section 2 (Toolformer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.errors import GrammarError
from posttrain.objectives.tensors import same_shape, wide


def constrained_step(logits_v: Tensor, allowed_v: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """q(v) = p(v) [v in A] / Z with p = softmax(logits / temperature), Z = p(A) -> (q [..., V], log Z [...]).

    Forbidden tokens get -inf before temperature, hence probability exactly 0. log Z is a health signal: a very small legal mass
    means the model wanted something else. Raises GrammarError if nothing is allowed: an argmax over nothing is never taken.
    """
    same_shape(logits_v, allowed_v)
    if not bool(allowed_v.any(dim=-1).all()):
        raise GrammarError(
            "no token is allowed here", where="constrained decoding", remedy="the grammar has a dead end: report its schema"
        )
    scaled = wide(logits_v) / temperature
    legal = scaled.masked_fill(~allowed_v, -torch.inf)
    return legal.softmax(-1), legal.logsumexp(-1) - scaled.logsumexp(-1)


@dataclass(frozen=True, slots=True)
class TwoStepBias:
    """What masking token by token samples, against what conditioning on the legal set would."""

    legal_mass: float
    exact: dict[str, float]
    masked: dict[str, float]


def constrained_sequence(
    first: Mapping[str, float], second: Mapping[str, Mapping[str, float]], legal: Sequence[str]
) -> TwoStepBias:
    """Two-token strings a + b with p(a), p(b | a): exact p(y | legal), and prod p(y_t) / Z_t of local masking, which differs."""
    pairs = {a + b: (a, b) for a in first for b in second.get(a, {}) if a + b in set(legal)}
    joint = {y: first[a] * second[a][b] for y, (a, b) in pairs.items()}
    total = sum(joint.values())
    if total <= 0:
        raise GrammarError("the legal set has no probability", where="constrained decoding", value=list(legal))
    openings = {a for a, _ in pairs.values()}
    z1 = sum(first[a] for a in openings)
    z2 = {a: sum(second[a][b] for c, b in pairs.values() if c == a) for a in openings}
    masked = {y: first[a] / z1 * (second[a][b] / z2[a] if z2[a] > 0 else 0.0) for y, (a, b) in pairs.items()}
    return TwoStepBias(total, {y: p / total for y, p in joint.items()}, masked)


def rag_sequence(doc_logp_k: Tensor, token_logp_kt: Tensor) -> Tensor:
    """log sum_z p(z|x) prod_t p(y_t | x, z, y_<t), one document for the whole answer. [K], [K, T] -> []."""
    same_shape(doc_logp_k, token_logp_kt[:, 0], rank=1)
    return (wide(doc_logp_k) + wide(token_logp_kt).sum(dim=1)).logsumexp(0)


def rag_token(doc_logp_k: Tensor, token_logp_kt: Tensor) -> Tensor:
    """log prod_t sum_z p(z|x) p(y_t | x, z, y_<t), a document per token. [K], [K, T] -> []. Equal to `rag_sequence` for T = 1."""
    same_shape(doc_logp_k, token_logp_kt[:, 0], rank=1)
    return (wide(doc_logp_k)[:, None] + wide(token_logp_kt)).logsumexp(0).sum()


@dataclass(frozen=True, slots=True, eq=False)
class ToolGain:
    """Weighted losses of the text after a call; `gain` = min(without call, call without result) - with result."""

    weights_n: Tensor
    with_result: Tensor
    without_call: Tensor
    without_result: Tensor

    @property
    def baseline(self) -> Tensor:
        return torch.minimum(self.without_call, self.without_result)

    @property
    def gain(self) -> Tensor:
        return self.baseline - self.with_result


def toolformer_gain(with_result_n: Tensor, without_call_n: Tensor, without_result_n: Tensor) -> ToolGain:
    """L(z) = -sum_t w_t log p(x_{i+t} | z, ...), w_t = max(0, 1 - 0.2 t) normalised over the tokens there are. [n] each.

    Keep a call iff gain >= tau. z is a prefix before the text; the second baseline stops calls that merely prime the model.
    """
    same_shape(with_result_n, without_call_n, without_result_n, rank=1)
    weights_n = (1 - 0.2 * torch.arange(len(with_result_n), dtype=with_result_n.dtype)).clamp(min=0)
    weights_n = weights_n / weights_n.sum()
    losses = [
        -torch.where(weights_n > 0, weights_n * logp_n, 0.0).sum() for logp_n in (with_result_n, without_call_n, without_result_n)
    ]
    return ToolGain(weights_n, *losses)
