"""The forward pass of decoding on a CPU: the same layers with fewer calls and weights laid out for few rows.

A decoding step multiplies a handful of rows with every weight. There the general forward pass spends as long between its products as
in them, and a product spends more time arranging the weight than multiplying. Here queries, keys and values are one product, and
so are the two halves of a gated MLP; each weight is arranged once (MKL's packed products in float32, oneDNN's blocked layouts in
bfloat16), and adapters stay apart from it as thin products of their own (Chen 2023, Punica), so that one arrangement serves every adapter
and outlives its training.

It knows the Llama family (Llama, Mistral, Qwen2, Qwen3). `Inference.of` is None for other architectures and devices, whose passes go
through the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.policy.attention import AttentionContext
from posttrain.policy.fused import is_lora, is_simple
from posttrain.policy.head import evened

_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_ROWS = 256  # rows an arrangement is made for; it is right for any number
_FEW = 8  # rows up to which thin products are computed in float32
_FINE, _COARSE = 8, 32  # rows that bfloat16 products are rounded up to, up to 64 rows and beyond

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Group:
    """Linear layers that read the same input, as one product: their names in `parent`, whose members adapters replace, and where each
    one's outputs are."""

    product: Product
    parent: Any
    names: tuple[str, ...]
    places: tuple[slice, ...]

    @classmethod
    def of(cls, parent: Any, *names: str) -> _Group:
        plain = [_plain(getattr(parent, name)) for name in names]
        sizes = [layer.weight.shape[0] for layer in plain]
        weight = torch.cat([layer.weight.detach() for layer in plain]) if len(plain) > 1 else plain[0].weight.detach()
        bias = None if plain[0].bias is None else torch.cat([layer.bias.detach() for layer in plain])
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return cls(_arranged(weight, bias), parent, names, tuple(slice(e - size, e) for e, size in zip(ends, sizes, strict=True)))


@dataclass(frozen=True, slots=True)
class _Layer:
    before: Tensor  # norm weights [hidden]
    after: Tensor
    eps: float
    qkv: _Group
    out: _Group
    gate_up: _Group
    down: _Group
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None
    heads: int
    kv_heads: int
    size: int
    window: int | None

    @property
    def groups(self) -> tuple[_Group, ...]:
        return (self.qkv, self.out, self.gate_up, self.down)


@dataclass(frozen=True, slots=True)
class _Thin:
    """An adapter's part in a group: the A of its adapted members side by side, transposed [in, sum r], and their s B transposed
    [sum r, out], each in its own rows and columns and 0 elsewhere, which costs less than a product into each one's part of the output.
    Once as the model computes, once in float32: for a few rows such products take a third of bfloat16's time."""

    a: Tensor
    b: Tensor
    a_float: Tensor
    b_float: Tensor

    def add_to(self, out: Tensor, x: Tensor, tokens: Tensor | None) -> None:
        """Add s B A x to the outputs of its tokens (None: all). x [T, in], out [T, out]."""
        if len(x) <= _FEW:
            a, b, x = self.a_float, self.b_float, x.float()
        else:
            a, b = self.a, self.b
        if tokens is not None:
            own = x[tokens]
            added = torch.mm(torch.mm(_rounded(own), a), b)[: len(own)]
            out.index_add_(0, tokens, added.to(out.dtype))
        elif out.dtype == b.dtype:
            out.addmm_(torch.mm(x, a), b)
        else:
            out += torch.mm(torch.mm(x, a), b)


Factors = list[list[_Thin | None]]  # [layer][group]; None: a group that the adapter leaves alone
Share = tuple[Factors, Tensor | None]  # an adapter and the indices of its tokens (None: all)


class Inference:
    """The body and head of a policy's base, arranged: `infer` is a pass through the body."""

    def __init__(self, base: Any) -> None:
        body, config = base.base_model, base.config.get_text_config()
        self._embedding, self._rotary, self._norm = body.embed_tokens.weight, body.rotary_emb, body.norm
        self._layers = [_layer(layer, config) for layer in body.layers[: config.num_hidden_layers]]
        self._weights = list(base_weights(base))
        self._written = self._writes()
        head = base.get_output_embeddings()
        self._head = _arranged(head.weight.detach(), None if head.bias is None else head.bias.detach())

    @classmethod
    def of(cls, base: Any) -> Inference | None:
        """None where this pass does not fit the model."""
        layers: list[Any] = list(getattr(base.base_model, "layers", []))
        fits = len(layers) > 0 and all(_fits(layer) for layer in layers)
        weight = base.get_output_embeddings().weight
        fits = fits and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
        # all of a head's dimensions turn
        fits = fits and 2 * base.base_model.rotary_emb.inv_freq.numel() == layers[0].self_attn.head_dim
        return cls(base) if fits else None

    @property
    def stale(self) -> bool:
        """Whether a weight was written to since it was arranged."""
        return self._writes() != self._written

    def _writes(self) -> list[tuple[int, int]]:
        return [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in self._weights]

    def factors(self, name: str) -> Factors:
        """A plain LoRA adapter's thin factors as they are now."""
        return [[_thin(group, name) for group in layer.groups] for layer in self._layers]

    def head(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, V], the product with the head's weight."""
        return self._head(_rounded(hidden))[: len(hidden)]

    @torch.no_grad()
    def infer(self, ids: Tensor, positions: Tensor, context: AttentionContext, shares: Sequence[Share]) -> Tensor:
        """One pass over flat tokens: ids, positions [T] -> final hidden states [T, hidden]."""
        count = len(ids)
        x = _rounded(F.embedding(ids, self._embedding))
        more = len(x) - count
        cos, sin = self._rotary(x[None], F.pad(positions, (0, more))[None])
        half = cos.shape[-1] // 2
        cos, sin = cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous()
        for index, layer in enumerate(self._layers):
            thin = [[(factors[index][group], tokens) for factors, tokens in shares] for group in range(4)]
            h = F.rms_norm(x, x.shape[-1:], layer.before, layer.eps)
            q, k, v = _turned(layer, _multiply(layer.qkv, h, thin[0]), cos, sin)
            q, k, v = (tensor[:, :, :count] for tensor in (q, k, v))
            mixed = context.attend(index, q, k, v, layer.size**-0.5, layer.window)
            x += _multiply(layer.out, F.pad(mixed[0].transpose(0, 1).reshape(count, -1), (0, 0, 0, more)), thin[1])
            h = F.rms_norm(x, x.shape[-1:], layer.after, layer.eps)
            gate, up = _multiply(layer.gate_up, h, thin[2]).chunk(2, dim=-1)
            x += _multiply(layer.down, F.silu(gate).mul_(up), thin[3])
        return F.rms_norm(x, x.shape[-1:], self._norm.weight, self._norm.variance_epsilon)[:count]


def base_weights(base: Any) -> Sequence[Tensor]:
    """Every weight of the base, without adapters."""
    return [parameter for name, parameter in base.named_parameters() if ".lora_" not in name]


def _fits(layer: Any) -> bool:
    if type(layer).__name__ not in _LAYERS or type(layer.mlp.act_fn).__name__ not in ("SiLUActivation", "SiLU"):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    linear = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    plain = [_plain(module) for module in linear]
    same = len({m.bias is None for m in plain[:3]}) == 1 and len({m.bias is None for m in plain[4:6]}) == 1
    return all(type(m) is nn.Linear for m in plain) and same


def _plain(module: Any) -> Any:
    return module.base_layer if is_lora(module) else module


def _layer(layer: Any, config: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    size, norms = int(attention.head_dim), [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    # Mistral's layers all have the window of the configuration, Qwen's say whether they have it, Llama's have none
    window = config.sliding_window if type(layer).__name__.startswith("Mistral") else getattr(attention, "sliding_window", None)
    return _Layer(
        before=layer.input_layernorm.weight.detach(),
        after=layer.post_attention_layernorm.weight.detach(),
        eps=float(layer.input_layernorm.variance_epsilon),
        qkv=_Group.of(attention, "q_proj", "k_proj", "v_proj"),
        out=_Group.of(attention, "o_proj"),
        gate_up=_Group.of(mlp, "gate_proj", "up_proj"),
        down=_Group.of(mlp, "down_proj"),
        q_norm=None if norms[0] is None else norms[0].weight.detach(),
        k_norm=None if norms[1] is None else norms[1].weight.detach(),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        size=size,
        window=window,
    )


def _turned(layer: _Layer, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (H + 2 Hkv) D] -> rotated queries [1, H, T, D], rotated keys and values [1, Hkv, T, D]; cos, sin [T, 1, D / 2]."""
    parts = qkv.view(len(qkv), -1, layer.size)
    both, heads = layer.heads + layer.kv_heads, layer.heads
    qk = parts[:, :both]
    if layer.q_norm is not None and layer.k_norm is not None:
        shape = (layer.size,)
        qk = torch.cat(
            [
                F.rms_norm(qk[:, :heads], shape, layer.q_norm, layer.eps),
                F.rms_norm(qk[:, heads:], shape, layer.k_norm, layer.eps),
            ],
            1,
        )
    first, second = qk.chunk(2, dim=-1)
    turned = torch.empty_like(qk, memory_format=torch.contiguous_format)
    low, high = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=low)
    low.addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high)
    high.addcmul_(first, sin)
    q, k, v = turned[:, :heads], turned[:, heads:], parts[:, both:]
    return q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]


# -- products ----------------------------------------------------------------------------------------------------------


def _multiply(group: _Group, x: Tensor, thin: list[tuple[_Thin | None, Tensor | None]]) -> Tensor:
    """x [T, in] -> [T, out], with each adapter's s B A x added to its tokens."""
    out = group.product(x)
    for own, tokens in thin:
        if own is not None:
            own.add_to(out, x, tokens)
    return out


def _rounded(rows: Tensor) -> Tensor:
    """`evened` up to numbers that come again: forced runs make steps of ever other sizes. A few rows stay as they are."""
    return rows if len(rows) <= _FEW else evened(rows, _FINE if len(rows) <= 64 else _COARSE)


def _thin(group: _Group, name: str) -> _Thin | None:
    """See `Factors`."""
    downs, ups = [], []
    for member, place in zip(group.names, group.places, strict=True):
        module = getattr(group.parent, member)
        if not is_lora(module) or name not in module.lora_A:
            continue
        assert is_simple(module, name), "ask Policy.mixes first"
        a, b = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
        up = b.new_zeros(b.shape[1], group.places[-1].stop)
        up[:, place] = (b * module.scaling[name]).t()
        downs.append(a)
        ups.append(up)
    if not downs:
        return None
    down, up = torch.cat(downs).t().contiguous(), torch.cat(ups)
    return _Thin(down, up, down.float(), up.float())


def _arranged(weight: Tensor, bias: Tensor | None) -> Product:
    """x -> x W^T + bias for x [T, in], by an arrangement of W [out, in] where the build of torch has one that gives the same."""
    for make in (_mkl, _onednn):
        product = make(weight, bias)
        if product is not None and _agrees(product, weight, bias):
            return product
    return lambda x: F.linear(x, weight, bias)


def _mkl(weight: Tensor, bias: Tensor | None) -> Product | None:
    if weight.dtype != torch.float32:
        return None
    try:
        multiply, packed = torch.ops.mkl._mkl_linear, torch.ops.mkl._mkl_reorder_linear_weight(weight, _ROWS)
    except (AttributeError, RuntimeError):
        return None
    shape = weight.new_empty(1, 1).expand(weight.shape)  # only its shape is read
    return lambda x: multiply(x, packed, shape, bias, len(x))  # type: ignore[no-any-return]


def _onednn(weight: Tensor, bias: Tensor | None) -> Product | None:
    if weight.dtype != torch.bfloat16:
        return None
    try:
        multiply, packed = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight(weight, None)
    except (AttributeError, RuntimeError):
        return None
    return lambda x: multiply(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


def _agrees(product: Product, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a product gives F.linear's numbers up to rounding, for one row and for several."""
    rtol = 1e-4 if weight.dtype == torch.float32 else 3e-2
    x = torch.linspace(-1, 1, 5 * weight.shape[1], dtype=torch.float32).view(5, -1).to(weight.dtype)
    for rows in (x, x[:1]):
        try:
            got, want = product(rows), F.linear(rows, weight, bias)
        except RuntimeError:
            return False
        if got.shape != want.shape or not torch.allclose(got, want, rtol=rtol, atol=rtol * float(want.abs().max() + 1e-6)):
            return False
    return True
