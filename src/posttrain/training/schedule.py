"""Learning-rate schedule: linear warm-up, then cosine to a floor."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OptimiserOptions:
    """AdamW (Loshchilov & Hutter 2019) with warm-up, cosine decay and global gradient-norm clipping.

    lr is the peak rate; warmup and floor are shares of the total steps and of the peak rate. lora_plus multiplies the rate of LoRA's
    B, which starts at zero and should move faster than A (LoRA+, Hayou 2024); 1 is plain LoRA.
    """

    lr: float = 1e-3
    warmup: float = 0.05
    floor: float = 0.05
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    eps: float = 1e-8
    lora_plus: float = 1.0


def learning_rate(options: OptimiserOptions, step: int, total: int) -> float:
    """Rate of step `step` (0-based) of `total`."""
    warmup = max(1, round(options.warmup * total))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return options.lr * (options.floor + (1 - options.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
