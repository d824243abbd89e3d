"""The policy room: bases, adapters, prefix-tree packs and the chunked head."""

from posttrain.policy.base import EMBEDDED, fetch_base, resolve_base
from posttrain.policy.head import Head
from posttrain.policy.pack import Node, Pack, fill_packs
from posttrain.policy.policy import LoraOptions, Policy
from posttrain.policy.weights import cut_layers, fast_dtype, fingerprint, merge_adapter, save_dense

__all__ = [
    "EMBEDDED",
    "Head",
    "LoraOptions",
    "Node",
    "Pack",
    "Policy",
    "cut_layers",
    "fast_dtype",
    "fetch_base",
    "fill_packs",
    "fingerprint",
    "merge_adapter",
    "resolve_base",
    "save_dense",
]
