"""A tokenizer trained in-process and random models of a few thousand parameters: what the hermetic tests run on.

Also imported by the subprocess that the kill tests start, so nothing here needs pytest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from posttrain.contract import Sequence

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "system user assistant tool\n",
    "The balance of account 1001 is 12.50 and it was paid on 2024-03-01.",
    '<tool_call>{"name":"lookup","arguments":{"account":"1001","limit":3}}</tool_call>',
    '{"decision":"answer","summary":"the invoice is open","figures":[{"name":"due","amount":"880.00"}]}',
    "What is due? Who owes it? Please say which invoices are open, and propose an entry.",
    "查询现金余额，发票已付款。",
] * 4

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # ten times the usual: attention and logits must depend on what they read
}
WINDOW = 11
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "gemma3": (
        Gemma3TextConfig,
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
}


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 400 tokens with ChatML's special tokens, and the tool-call markers as ordinary text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


def tiny_model(family: str = "llama", vocabulary: int = 97, seed: int = 0, **overrides: Any) -> Any:
    """A random float32 model in eval mode; Python's, numpy's and torch's global generators are left as they were."""
    config_class, extra = FAMILIES[family]
    config = config_class(**{**SIZES, "vocab_size": vocabulary, **extra, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).float().eval()


def stored(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model with its parameters rounded to bfloat16, the stored type, and computing in `dtype`. Buffers stay: loading a folder
    keeps the rotary frequencies in float32 too, which Module.bfloat16() would not."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(dtype)
    return model


def sequence(ids: Seq[int], learned: Seq[int] | slice = slice(1, None), weight: float = 1.0) -> Sequence:
    """A rendered sequence of the given ids that learns the tokens at the given places."""
    weights = np.zeros(len(ids), np.float32)
    weights[learned if isinstance(learned, slice) else list(learned)] = weight
    return Sequence(np.asarray(ids, np.int32), weights, np.zeros(len(ids), np.int16))


def random_ids(count: int, rng: random.Random, vocabulary: int = 97) -> list[int]:
    return [rng.randrange(3, vocabulary) for _ in range(count)]


def logprobs_of_row(model: Any, ids: Seq[int]) -> torch.Tensor:
    """log softmax of a plain transformers forward pass over one unpadded row: [T, V]. Only for models no policy has taken over."""
    logits: torch.Tensor = model(torch.tensor([list(ids)])).logits[0]
    return logits.float().log_softmax(-1)
