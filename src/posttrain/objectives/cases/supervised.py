"""Cases of sections 0 to 2 and 7: supervised loss, packing, LoRA, NF4, memory."""

from __future__ import annotations

from posttrain.objectives import lora as adapters
from posttrain.objectives import memory as accounts
from posttrain.objectives import nf4 as quantisation
from posttrain.objectives import packing as packs
from posttrain.objectives import reductions, supervised
from posttrain.objectives.cases.values import Outputs, Values, gradient, integers, leaf, number, tensor


def sft_ce(inputs: Values, params: Values) -> Outputs:
    logits = leaf(inputs["logits"])
    logp, mask = supervised.token_logprobs(logits, integers(inputs["labels"]))
    loss, metrics = supervised.sft_ce(logp, mask)
    rows = reductions.supervised_rows(mask)
    return {
        "token_logps": logp,
        "loss_sum": metrics["loss_sum"],
        "n_tokens": metrics["tokens"],
        "loss_token_mean": loss,
        "loss_seq_mean_token_mean": reductions.seq_mean_token_mean(-logp, mask, normaliser=rows),
        "loss_seq_mean_token_sum": reductions.seq_mean(reductions.row_sums(-logp, mask), normaliser=rows),
        "grad_logits_token_mean": gradient(loss, logits),
    }


def sft_accum(inputs: Values, params: Values) -> Outputs:
    sums = [number(micro["loss_sum"]) for micro in inputs["micro"]]
    counts = [number(micro["n_tokens"]) for micro in inputs["micro"]]
    parts = supervised.scaled_micro_losses(sums, counts)
    means = [loss_sum / max(count, 1) for loss_sum, count in zip(sums, counts, strict=True)]
    return {"global_token_mean": sum(parts), "mean_of_micro_means": sum(means) / len(means), "micro_losses_scaled": parts}


def packing(inputs: Values, params: Values) -> Outputs:
    lengths = integers(inputs["lengths"])
    allowed = packs.packed_attention_mask(lengths)
    q, k, v = (tensor(inputs[name]) for name in ("q", "k", "v"))
    labels = packs.ignore_segment_starts(integers(inputs["labels"]), lengths)
    return {
        "segment_ids": packs.segment_ids(lengths),
        "position_ids": packs.packed_positions(lengths),
        "cu_seqlens": packs.cumulative_lengths(lengths),
        "max_seqlen": lengths.max(),
        "allowed": allowed,
        "attn_out": packs.attention(q, k, v, allowed),
        "attn_out_wrong_plain_causal": packs.attention(q, k, v, allowed.new_ones(allowed.shape).tril()),
        "labels_with_segment_starts_ignored": labels,
        "n_supervised": (labels != supervised.IGNORED).sum(),
    }


def left_pad_positions(inputs: Values, params: Values) -> Outputs:
    return {"position_ids": packs.left_pad_positions(integers(inputs["attention_mask"]))}


def lora(inputs: Values, params: Values) -> Outputs:
    weight, down, up = (tensor(inputs[name]) for name in ("W", "A", "B"))
    scale = adapters.scaling(number(params["alpha"]), len(down), rank_stabilised=bool(params.get("rslora", False)))
    adapter = adapters.Adapter(down, up, scale)
    full, trainable = adapters.parameter_counts(len(weight), len(weight.T), len(down))
    base = weight.bfloat16()
    cast_first = adapters.merge_cast_first(base, adapter)
    unmerged = adapters.merge_cast_first(cast_first, adapters.Adapter(down, up, -scale))
    return {
        "scaling": scale,
        "delta_W": adapter.delta(),
        "y": adapters.lora_forward(tensor(inputs["x"]), weight, adapter),
        "W_merged": adapters.merge(weight, adapter),
        "n_trainable": trainable,
        "n_full": full,
        "bf16_base": base,
        "bf16_merged_delta_cast_first": cast_first,
        "bf16_merged_sum_in_fp32": adapters.merge(base, adapter),
        "bf16_unmerged": unmerged,
        "bf16_unmerge_max_abs_residual": (unmerged.double() - base.double()).abs().max(),
    }


def lora_count(inputs: Values, params: Values) -> Outputs:
    full, trainable = adapters.parameter_counts(inputs["d"], inputs["k"], inputs["r"])
    return {"full": full, "lora": trainable, "ratio": full / trainable}


def multi_lora(inputs: Values, params: Values) -> Outputs:
    parts = [(tensor(part["A"]), tensor(part["B"]), number(part["alpha"])) for part in inputs["adapters"]]
    loaded = [adapters.Adapter(down, up, adapters.scaling(alpha, len(down))) for down, up, alpha in parts]
    return {"y": adapters.multi_lora_forward(tensor(inputs["x"]), tensor(inputs["W"]), loaded, integers(inputs["adapter_ids"]))}


def nf4(inputs: Values, params: Values) -> Outputs:
    quantised = quantisation.quantise(tensor(inputs["w"]), params.get("block", 64))
    return {
        "indices": quantised.indices,
        "absmax": quantised.absmax,
        "dequant": quantised.dequantised(),
        "packed": quantised.packed(),
    }


def nf4_code(inputs: Values, params: Values) -> Outputs:
    return {
        "levels": quantisation.derived_levels(number(params["offset"])) if "offset" in params else quantisation.derived_levels()
    }


def nf4_bits(inputs: Values, params: Values) -> Outputs:
    single, double = quantisation.bits_per_weight(params.get("block", 64), params.get("block2", 256))
    return {"single": single, "double": double}


def nf4_double_quant(inputs: Values, params: Values) -> Outputs:
    absmax = tensor(inputs["absmax"])
    scales = quantisation.quantise_scales(absmax, params.get("block2", 256))
    return {
        "offset": scales.offset,
        "codes": scales.codes,
        "absmax2": scales.absmax2,
        "absmax_reconstructed": scales.reconstructed(),
        "max_abs_err": (scales.reconstructed() - absmax).abs().max(),
    }


_COPIES = {
    "lora_frac": "lora_fraction",
    "critic_ratio": "critic_ratio",
    "reward_ratio": "reward_ratio",
    "ref": "reference",
    "critic": "critic",
    "reward": "reward",
    "precomputed_ref": "precomputed_reference",
}
_STATE = {name: name for name in ("weights", "gradients", "master", "optimiser", "frozen", "nf4_double_quant")}
_STATE |= {"w": "weights", "g": "gradients", "opt": "optimiser"}


def memory(inputs: Values, params: Values) -> Outputs:
    given = {name.removesuffix("_bytes").removeprefix("bytes_"): value for name, value in params.items()}
    copies = accounts.Copies(**{_COPIES[name]: value for name, value in given.items() if name in _COPIES})
    state = accounts.StateBytes(**{_STATE[name]: value for name, value in given.items() if name in _STATE})
    unknown = given.keys() - _COPIES.keys() - _STATE.keys()
    assert not unknown, f"unknown params {sorted(unknown)}"
    parameters = number(inputs["P"])
    account = accounts.training_memory(inputs["method"], parameters, copies, state)
    return {
        "bytes": {"policy": account.policy, "ref": account.reference, "critic": account.critic, "reward": account.reward},
        "total_bytes": account.total,
        "total_GB": account.total / 1e9,
        "bytes_per_policy_param": account.total / parameters,
    }


def kv_cache(inputs: Values, params: Values) -> Outputs:
    sizes = (inputs["layers"], inputs["kv_heads"], inputs["head_dim"])
    return {"bytes_per_token": accounts.kv_cache_bytes_per_token(*sizes, number(params.get("bytes", 2)))}
