"""Fixtures of every room: hermetic, small, and made once where nothing changes them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: threads only cost
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a defect
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if TYPE_CHECKING:  # torch and transformers load when a fixture needs them: the light rooms' tests start at once
    from transformers import PreTrainedTokenizerFast

    from posttrain.contract import Contract
    from posttrain.policy import Policy


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tiny_models import train_tokenizer

    return train_tokenizer()


@pytest.fixture(scope="session")
def contract(tiny_tokenizer: PreTrainedTokenizerFast) -> Contract:
    from posttrain.contract import Contract

    return Contract(tiny_tokenizer)


@pytest.fixture
def tiny_policy(contract: Contract) -> Policy:
    """A fresh random Llama over the tiny tokenizer's vocabulary, padded as real ones are."""
    from posttrain.policy import Policy
    from tiny_models import tiny_model

    return Policy(tiny_model("llama", vocabulary=contract.vocabulary_size + 12))
