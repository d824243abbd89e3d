"""A model in memory, ready to sample and to score: policy, contract, grammar engine and sampler over one weights folder."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain.contract import Contract
from posttrain.grammar.matcher import GrammarEngine
from posttrain.policy.device import find_device
from posttrain.policy.heap import give_memory_back, keep_heap
from posttrain.policy.policy import Policy
from posttrain.sampling import LocalSampler


@dataclass(frozen=True, slots=True, eq=False)
class Runtime:
    """Everything a stage, a suite or a server needs of one set of base weights."""

    policy: Policy
    contract: Contract
    sampler: LocalSampler

    @classmethod
    def of(cls, policy: Policy, contract: Contract) -> Runtime:
        vocabulary = policy.head.vocabulary
        grammar = GrammarEngine(contract.tokenizer, vocabulary, contract.end_of_turn)
        return cls(policy, contract, LocalSampler(policy, contract.end_of_turn, grammar))

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Runtime:
        """Contract first: a wrong lock is refused before any weight is read. `device` None: see `find_device`."""
        give_memory_back()
        contract = Contract.load(folder)
        return cls.of(Policy.load(folder, dtype, device or find_device()), contract)


def prepare_process(threads: int | None) -> int:
    """Once per process: threads for matrix products (the recipe's number, else POSTTRAIN_THREADS, else all cores), and a C heap
    that keeps what it has. Returns the number of threads."""
    keep_heap()
    # PEFT reads an attribute that transformers renames; nothing a user could act on
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it; it then asks for a kernel that is not used here
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    return set_threads(threads)


def set_threads(count: int | None) -> int:
    """Threads for matrix products; returns what is in force."""
    named = os.environ.get("POSTTRAIN_THREADS")
    wanted = count or (int(named) if named and named.isdigit() else os.cpu_count() or 1)
    torch.set_num_threads(wanted)
    return torch.get_num_threads()


def parse_dtype(name: str) -> torch.dtype | None:
    """'auto' -> None (measured on this machine when the weights are loaded)."""
    return {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}[name]
