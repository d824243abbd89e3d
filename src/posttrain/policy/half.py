"""Tree attention in bfloat16 on CPUs, with gradients made of matrix products.

PyTorch's flash kernel for CPUs is fast forward and slow backward, in bfloat16 above all (docs/performance.md). But given the
log-sum-exps of the forward pass, every pair of a query and a key stands alone (Dao 2022, FlashAttention, appendix B.2):

    P = exp(s q k^T - lse),  dV = P^T dO,  dS = P * (dO V^T - rowsum(dO * O)),  dQ = s dS K,  dK = s dS^T Q

so the sums may run in any order. Here they run node by node, each as keys for all the queries that see it at once: a node's subtree is
one run of the pack. Nothing is joined, and a shared trunk's gradients are one product instead of a sum over its branches.

Products are rounded to bfloat16, and both brackets are small differences of large numbers. The subtraction is therefore made
inside the product, which sums in float32: two more columns hold what is taken away and what its rounding left.

oneDNN compiles each shape of a product anew, which takes as long as ten to thirty of these products, and nodes have ever other sizes. So a
product covers a few neighbours more, up to sizes that come again; what they add is set to 0 where probabilities are.

Axis letters: T tokens of the pack, H query heads, G key heads, R = H / G, D head size, n queries of a product, S keys of a node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from posttrain.policy.attention import TreeAttention

_PAIRS = 1 << 23  # of queries and keys whose probabilities are in memory at once
_STEP = 32  # tokens: queries and keys of a product are multiples of it


class HalfAttention(torch.autograd.Function):
    """q [1, H, T, D]; k, v [1, G, T, D], bfloat16 -> [1, H, T, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, tree: TreeAttention) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        parts = [
            flash(asking, keys, values, 0.0, mask is None, attn_mask=mask, scale=scale)
            for asking, keys, values, mask in tree.by_query(q, k, v, window)
        ]
        out, lse = (torch.cat(found, dim=2) for found in zip(*parts, strict=True))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.window, ctx.tree = scale, window, tree
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        scale, tree, kv_heads, repeat = ctx.scale, ctx.tree, k.shape[1], q.shape[1] // k.shape[1]
        less = lse / -scale, (gradients[0].float() * out).sum(-1).neg_()
        q_gnd, do_gnd, k_gtd, v_gtd = (_by_key_head(tensor, kv_heads) for tensor in (q, gradients[0], k, v))
        q_gnx, do_gnx = (
            _widened(rows, _by_key_head(x[..., None], kv_heads)) for rows, x in zip((q_gnd, do_gnd), less, strict=True)
        )
        ones = k.new_ones(*k_gtd.shape[:2], 2)
        k_gtx, v_gtx = torch.cat([k_gtd, ones], -1), torch.cat([v_gtd, ones], -1)
        dq, dk, dv = torch.zeros_like(q_gnd), torch.zeros_like(k_gtd), torch.zeros_like(k_gtd)
        for rows, keys, blind in tree.by_key(ctx.window, repeat, _PAIRS // q.shape[1]):
            asked, seen = rows.stop - rows.start, keys.stop - keys.start
            rows, keys = _rounded(rows, repeat * _STEP), _rounded(keys, _STEP)
            p = torch.baddbmm(ones[:1, :1, :1], q_gnx[:, rows], k_gtx[:, keys].mT, beta=0, alpha=scale).exp_()
            if blind is not None:
                p[:, : len(blind), :seen].masked_fill_(blind, 0)
            p[:, asked:].zero_()
            p[:, :, seen:].zero_()
            ds = torch.bmm(do_gnx[:, rows], v_gtx[:, keys].mT).mul_(p)
            dv[:, keys].baddbmm_(p.mT, do_gnd[:, rows])
            dk[:, keys].baddbmm_(ds.mT, q_gnd[:, rows], alpha=scale)
            dq[:, rows].baddbmm_(ds, k_gtd[:, keys], alpha=scale)
        count = q.shape[2]
        dq, dk, dv = dq[:, : count * repeat], dk[:, :count], dv[:, :count]
        dq = dq.reshape(kv_heads, count, -1, q.shape[3]).transpose(1, 2).reshape(q.shape)
        return dq, dk[None], dv[None], None, None, None


def _by_key_head(x: Tensor, kv_heads: int) -> Tensor:
    """[1, H, T, *] -> [G, (T + _STEP) R, *]: the heads that share keys as more queries of them, token by token, with zeros behind that
    the last product may cover."""
    count = x.shape[2]
    tokens = x[0].view(kv_heads, -1, *x.shape[2:]).transpose(1, 2)
    out = x.new_zeros(kv_heads, count + _STEP, *tokens.shape[2:])
    out[:, :count] = tokens
    return out.flatten(1, 2)


def _widened(rows: Tensor, less: Tensor) -> Tensor:
    """[G, n, D] and what to add to its products [G, n, 1] float32 -> [G, n, D + 2]."""
    rounded = less.to(rows.dtype)
    return torch.cat([rows, rounded, (less - rounded).to(rows.dtype)], -1)


def _rounded(run: slice, multiple: int) -> slice:
    """From the same start, up to a multiple of so many."""
    return slice(run.start, run.stop + (run.start - run.stop) % multiple)
