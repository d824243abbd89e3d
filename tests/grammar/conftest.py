"""Tokenizers trained in-process, and a random walk that only the mask guides."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.grammar import Grammar, GrammarEngine

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    '{"name":"query_erp","arguments":{"account":"1001","amount":"12.50"}}',
    "<tool_call></tool_call> the balance of account 1001 is 12.50 and it was paid on 2024-03-01",
    '{"decision":"answer","summary":"the invoice is open","figures":[{"name":"due","amount":"880.00"}],"sources":[]}',
    "查询现金余额，发票已付款。凭证编号 JV-1002",
] * 4


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """The SentencePiece kind: spaces are a letter of their own, unknown characters fall apart into <0xNN>."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    return Tokenizer.from_str(json.dumps(state))


@pytest.fixture(scope="session", params=[byte_level, byte_fallback], ids=["byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=request.param(), pad_token="<|pad|>", eos_token="<|im_end|>")


@pytest.fixture(scope="session")
def engine(tokenizer: PreTrainedTokenizerFast) -> GrammarEngine:
    padded = -(-(len(tokenizer) + 1) // 64) * 64
    return GrammarEngine(tokenizer, padded, tokenizer.convert_tokens_to_ids("<|im_end|>"))


Walk = Callable[[Grammar, int], str]


@pytest.fixture
def walk(engine: GrammarEngine, tokenizer: PreTrainedTokenizerFast) -> Walk:
    """Draws tokens at random under the mask until the turn ends; the closing ones more often, so that it does end."""
    closing = np.ones(engine.vocab_size)
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if '"' in text or text.strip(" ") in ("}", "]", "}}"):
            closing[token] = 40.0
    closing[engine.eos_id] = 400.0

    def draw(grammar: Grammar, seed: int) -> str:
        rng, matcher, ids = random.Random(seed), engine.matcher(grammar), []
        for _ in range(2000):
            allowed = np.flatnonzero(bits(engine.fill([matcher])[0]))
            token = rng.choices(allowed.tolist(), closing[allowed].tolist())[0]
            if token == engine.eos_id:
                assert matcher.is_accepting
                return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            matcher.consume(token)
            ids.append(token)
        raise AssertionError("the walk did not end")

    return draw


def bits(row: np.ndarray) -> np.ndarray:
    return np.unpackbits(row.view(np.uint8), bitorder="little")
