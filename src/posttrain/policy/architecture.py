"""What packs rest on in an architecture: which layers mix tokens, and whether what is computed here is what the model computes itself."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from posttrain.contract.sequence import Sequence, SequenceBuilder
from posttrain.errors import BaseModelError
from posttrain.policy.attention import TreeAttention
from posttrain.policy.pack import MIN_SHARED, Pack

# layers that mix tokens outside attention cannot run a tree: their sequences run one by one
_TREE_UNSAFE = ("mamba", "rwkv", "recurrent", "conv", "ssm", "linear_attention", "hybrid")

_OWN = 4  # tokens of each probe row behind what both share
# Nats. In float32 what is right differs by less than 1e-5. In bfloat16 rounding alone gave 0.09 on a trained model of 30 layers, as much as
# two of transformers' own kernels differ, while a neighbour seen or a position missed gave more than 1.
_EXACT, _ROUNDED = 1e-2, 0.5


def body_of(model: Any) -> Any:
    """The module that holds the blocks of the text's decoder as `layers`, whatever is wrapped around it (a model that also sees, say).
    BaseModelError where there is none."""
    for body in (model.get_decoder(), model.base_model):
        if hasattr(body, "layers"):
            return body
    raise BaseModelError(
        "the blocks of this architecture are not known",
        where="model",
        value=type(model).__name__,
        remedy="leave out what asks for single blocks: recompute, adapter.top, adapter.base: nf4, distillation",
    )


def blocks_of(model: Any) -> Any:
    """The text decoder's blocks, in order; see `body_of`."""
    return body_of(model).layers


def beside_text(model: Any) -> str | None:
    """A pattern of the names of a model's modules that are not below its text decoder; None where there is nothing beside it."""
    decoder = model.get_decoder()
    if decoder is model or decoder is model.base_model:
        return None
    return rf"(?!{re.escape(name_of(model, decoder))}\.).*"


def name_of(model: Any, module: Any) -> str:
    """What a model calls one of its modules; empty: itself."""
    return next(str(name) for name, found in model.named_modules() if found is module)


def mixing_layers(config: Any) -> list[str]:
    """Kinds of layers that are not attention over tokens, by the names their configuration gives them."""
    text = config.get_text_config()
    kinds = [str(kind) for kind in getattr(text, "layer_types", None) or [getattr(text, "model_type", "")]]
    return sorted({kind for kind in kinds if any(word in kind for word in _TREE_UNSAFE)})


def steady_length(config: Any) -> int | None:
    """Up to which length a sequence's positions are encoded the same whatever runs beside or before it; None: at any length. Dynamic
    and long RoPE choose the frequencies of all tokens of a pass by the longest sequence in it."""
    text = config.get_text_config()
    found: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    limits = []
    for rope in [found] if "rope_type" in found else [kind for kind in found.values() if isinstance(kind, dict)]:
        if rope.get("rope_type") == "longrope":
            limits.append(int(rope.get("original_max_position_embeddings") or text.max_position_embeddings))
        elif "dynamic" in str(rope.get("rope_type")):
            limits.append(int(text.max_position_embeddings))
    return min(limits, default=None)


_proven: set[str] = set()  # the model classes and configurations whose packs this process found right: a run loads one many times


@torch.no_grad()
def own_logprobs(model: Any) -> Tensor | None:
    """[2, T, V] float32: the log-probabilities of two short rows that fork, as a plain transformers model gives them. None where `prove`
    need not ask again."""
    if _kind(model) in _proven:
        return None
    rows = torch.tensor(_probe(model), device=model.device)
    logits: Tensor = model(input_ids=rows, use_cache=False).logits
    return logits.float().log_softmax(-1)


def prove(policy: Any, wanted: Tensor | None) -> str:
    """Hold a policy's log-probabilities against those of its model (`own_logprobs`). Where a pack differs, the policy is left running row
    by row and the difference is returned; empty: it does not. BaseModelError where rows one by one differ, too."""
    if wanted is None:
        return ""
    found = _difference(policy, wanted)
    if not found:
        _proven.add(_kind(policy.base))
        return ""
    if policy.packs:
        policy.run_row_by_row()
        alone = _difference(policy, wanted)
        if not alone:
            return found
        found = alone
    raise BaseModelError(
        f"this architecture is not supported: {found}",
        where=str(policy.folder),
        value=type(policy.base).__name__,
        remedy="use a model of a supported architecture (docs/architecture.md)",
    )


def check_length(pack: Pack, steady: int | None) -> None:
    """BaseModelError for a pack with a sequence longer than positions hold steady (`steady_length`)."""
    if steady is not None and max(pack.lengths) > steady:
        raise BaseModelError(
            "a sequence is longer than the model encodes positions without regard to its neighbours",
            where="pack",
            value=max(pack.lengths),
            remedy=f"keep sequences to {steady} tokens: lower max_tokens, or shorten the records",
        )


@torch.no_grad()
def probe_logprobs(policy: Any) -> Tensor:
    """`own_logprobs` as a policy computes them."""
    pack = Pack.of([_unlearned(row) for row in _probe(policy.base)])
    if policy.packs:  # node by node: what is asked is the architecture's, not a kernel's, which would be compiled first
        tree = TreeAttention(pack, flex=False)
        hidden = policy.forward(pack.ids.to(policy.device), pack.positions.to(policy.device), tree)
    else:
        hidden = policy.hidden(pack)
    return torch.stack([policy.head.logits(hidden[pack.sequence_rows(b)]) for b in range(2)]).log_softmax(-1)


def nats_apart(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> float | None:
    """How far log-probabilities of the probe rows are from those wanted, in nats: what is expected under these, mean over a row's own
    tokens, of the worse row. None where the computing type's rounding explains it."""
    nats = float((wanted.exp() * (got - wanted).abs()).sum(-1)[:, -_OWN:].mean(-1).max())
    return None if nats <= (_EXACT if dtype == torch.float32 else _ROUNDED) else nats


def _difference(policy: Any, wanted: Tensor) -> str:
    """What tells a policy's log-probabilities on the probe rows from those wanted; empty: nothing but rounding."""
    try:
        nats = nats_apart(probe_logprobs(policy), wanted, policy.dtype)
    except BaseModelError as error:
        return error.what
    except Exception as error:  # whatever model code raises that was not written for packs
        return f"a pass raised {type(error).__name__}: {error}"
    return "" if nats is None else f"log-probabilities are {nats:.3g} nats from transformers' own on two short rows"


def _kind(model: Any) -> str:
    return f"{type(model).__name__} {model.dtype} {model.config.to_json_string()}"


def _probe(model: Any) -> list[list[int]]:
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = [7919 * place % size for place in range(1, MIN_SHARED + 2 * _OWN + 1)]
    return [ids[: MIN_SHARED + _OWN], ids[:MIN_SHARED] + ids[MIN_SHARED + _OWN :]]


def _unlearned(ids: list[int]) -> Sequence:
    made = SequenceBuilder()
    made.add(ids, weight=0.0, origin=0)
    return made.build()
