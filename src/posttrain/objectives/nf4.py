"""NF4 block quantisation and double quantisation, as published code stores them.

Sources: Dettmers et al. 2023, section 3; bitsandbytes functional.py and backends/default/ops.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# fmt: off
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """Level index [n] 0..15 of every weight and the scale [ceil(n / block)] of every block; the last block may be short."""

    indices: Tensor
    absmax: Tensor
    block: int

    def dequantised(self) -> Tensor:
        """level[index] * absmax, [n]."""
        levels = torch.tensor(LEVELS, dtype=self.absmax.dtype)
        scale: Tensor = self.absmax.repeat_interleave(self.block)[: len(self.indices)]
        return levels[self.indices] * scale

    def packed(self) -> Tensor:
        """Two indices per byte, the first in the high nibble; an odd last one is followed by 0. [ceil(n / 2)] uint8."""
        even: Tensor = torch.nn.functional.pad(self.indices, (0, len(self.indices) % 2)).view(-1, 2)
        return (even[:, 0] * 16 + even[:, 1]).to(torch.uint8)


def quantise(weights_n: Tensor, block: int = 64) -> Quantised:
    """index = argmin_k |w / absmax - level_k| per block; a tie goes to the lower index, an all-zero block to exact zeros."""
    assert weights_n.ndim == 1 and block > 0, f"expected [n] and a positive block, got {tuple(weights_n.shape)}, {block}"
    absmax = _block_max(weights_n, block)
    scale = torch.where(absmax > 0, absmax, 1.0).repeat_interleave(block)[: len(weights_n)]
    return Quantised(_nearest(weights_n / scale, torch.tensor(LEVELS, dtype=weights_n.dtype)), absmax, block)


def derived_levels(offset: float = 0.9677083) -> Tensor:
    """The 16 levels from normal quantiles: 8 positive, 7 negative and 0, divided by the largest. [16] float64."""
    positive: Tensor = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels: Tensor = torch.cat([negative, positive, positive.new_zeros(1)]).sort().values
    return levels / positive.max()


def bits_per_weight(block: int = 64, block2: int = 256) -> tuple[float, float]:
    """(single, double): 4 bits plus one fp32 scale per block, or plus an 8-bit scale and one fp32 per block2 scales."""
    return 4 + 32 / block, 4 + 8 / block + 32 / (block * block2)


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedScales:
    """Second level: absmax ~ map[code] * absmax2 + offset, codes [n] 0..255, absmax2 per block of scales."""

    codes: Tensor
    absmax2: Tensor
    offset: Tensor
    block: int

    def reconstructed(self) -> Tensor:
        levels = dynamic_map().to(self.absmax2.dtype)
        scale: Tensor = self.absmax2.repeat_interleave(self.block)[: len(self.codes)]
        return levels[self.codes] * scale + self.offset


def quantise_scales(absmax_n: Tensor, block2: int = 256) -> QuantisedScales:
    """8-bit codes of absmax minus its mean, per block. [n] -> codes [n]. Ties go to the lower code."""
    assert absmax_n.ndim == 1 and len(absmax_n), f"expected [n], got {tuple(absmax_n.shape)}"
    offset = absmax_n.mean()
    centred = absmax_n - offset
    absmax2 = _block_max(centred, block2)
    scale = torch.where(absmax2 > 0, absmax2, 1.0).repeat_interleave(block2)[: len(absmax_n)]
    return QuantisedScales(_nearest(centred / scale, dynamic_map().to(absmax_n.dtype)), absmax2, offset, block2)


def dynamic_map() -> Tensor:
    """The signed dynamic 8-bit map: for i = 0..6 the 2^i midpoints of linspace(0.1, 1, 2^i + 1) times 10^(i-6), both signs,
    plus 0 and 1, sorted. [256] float64."""
    parts = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        parts += [middles, -middles]
    levels: Tensor = torch.cat(parts).sort().values
    return levels


def _block_max(values_n: Tensor, block: int) -> Tensor:
    padded = torch.nn.functional.pad(values_n.abs(), (0, -len(values_n) % block))
    return padded.view(-1, block).amax(dim=1)


def _nearest(values_n: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(values_n, (levels[1:] + levels[:-1]) / 2)
