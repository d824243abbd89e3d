"""Learning-rate schedule: linear warm-up, then cosine to a floor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from posttrain.ranges import NonNegative, Positive, Share

Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, slots=True)
class OptimiserOptions:
    """AdamW (Loshchilov & Hutter 2019) with warm-up, cosine decay and global gradient-norm clipping.

    lr is the peak rate; warmup and floor are shares of the total steps and of the peak rate. lora_plus multiplies the rate of LoRA's
    B, which starts at zero and should move faster than A (LoRA+, Hayou 2024); 1 is plain LoRA.
    """

    lr: Positive = 1e-3
    warmup: Share = 0.05
    floor: Share = 0.05
    clip: Positive = 1.0
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    weight_decay: NonNegative = 0.0
    eps: Positive = 1e-8
    lora_plus: Positive = 1.0


def learning_rate(options: OptimiserOptions, step: int, total: int) -> float:
    """Rate of step `step` (0-based) of `total`."""
    warmup = max(1, round(options.warmup * total))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return options.lr * (options.floor + (1 - options.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
