"""Memory of training by method: bytes of weights, gradients and optimiser states; activations and caches come on top."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.errors import DataError
from posttrain.objectives.nf4 import bits_per_weight

_ALGORITHMS = ("sft", "dpo", "orpo", "ppo", "grpo")
_KINDS = ("full", "lora", "qlora")


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes per parameter: bf16 weights and gradients, fp32 master copy, Adam's two fp32 moments, frozen bf16 weights."""

    weights: float = 2
    gradients: float = 2
    master: float = 4
    optimiser: float = 8
    frozen: float = 2
    nf4_double_quant: bool = True

    @property
    def trained(self) -> float:
        """Bytes of a parameter in training: 16 by default."""
        return self.weights + self.gradients + self.master + self.optimiser

    @property
    def nf4(self) -> float:
        """Bytes of a frozen NF4 parameter with its share of the scales."""
        return bits_per_weight()[1 if self.nf4_double_quant else 0] / 8


@dataclass(frozen=True, slots=True)
class Copies:
    """Which models are held beside the policy, and how large: critic and reward relative to the policy, LoRA's trainable share."""

    lora_fraction: float = 0.0
    critic_ratio: float = 1.0
    reward_ratio: float = 1.0
    reference: bool = True
    critic: bool = True
    reward: bool = True
    precomputed_reference: bool = False


@dataclass(frozen=True, slots=True)
class MemoryAccount:
    """Bytes by model."""

    policy: float
    reference: float
    critic: float
    reward: float

    @property
    def total(self) -> float:
        return self.policy + self.reference + self.critic + self.reward


def training_memory(
    method: str, parameters: float, copies: Copies | None = None, state: StateBytes | None = None
) -> MemoryAccount:
    """Bytes of one method, written ALGORITHM_KIND (`dpo_full`, `grpo_lora`) or `lora`, `qlora` for their SFT.

    A LoRA policy is its own reference with the adapter off; GRPO has no critic; SFT and ORPO have only the policy.
    Raises DataError for an unknown method.
    """
    copies, state = copies or Copies(), state or StateBytes()
    algorithm, kind = _parse(method)
    base = {"full": state.trained, "lora": state.frozen, "qlora": state.nf4}[kind]
    adapters = 0.0 if kind == "full" else copies.lora_fraction * state.trained
    has_reference = algorithm in ("dpo", "ppo", "grpo") and kind == "full" and copies.reference
    precomputed = copies.precomputed_reference and algorithm == "dpo"
    return MemoryAccount(
        policy=parameters * (base + adapters),
        reference=parameters * state.frozen if has_reference and not precomputed else 0.0,
        critic=parameters * copies.critic_ratio * state.trained if algorithm == "ppo" and copies.critic else 0.0,
        reward=parameters * copies.reward_ratio * state.frozen if algorithm in ("ppo", "grpo") and copies.reward else 0.0,
    )


def kv_cache_bytes_per_token(layers: int, kv_heads: int, head_dim: int, bytes_per_value: float = 2) -> float:
    """Keys and values of one token: 2 * layers * kv_heads * head_dim * bytes."""
    return 2 * layers * kv_heads * head_dim * bytes_per_value


def _parse(method: str) -> tuple[str, str]:
    algorithm, _, kind = method.rpartition("_")
    algorithm = algorithm or "sft"
    if algorithm not in _ALGORITHMS or kind not in _KINDS:
        raise DataError(
            "an unknown method", where="memory", value=method, remedy=f"write ALGORITHM_KIND with {_ALGORITHMS} and {_KINDS}"
        )
    return algorithm, kind
