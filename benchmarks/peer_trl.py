"""TRL's side: its trainers as their documentation has them, told when to take a step. Nothing is saved or reported."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from benchmarks.side import Turns, finish_device

Material = dict[str, Any]
Options = dict[str, Any]


class _Told(TrainerCallback):  # type: ignore[misc]
    """Takes a step when told; a step's time ends with its update, before the trainer logs it."""

    def __init__(self, turns: Turns, tokens: Callable[[], float]) -> None:
        self._turns, self._tokens, self._started, self._seconds = turns, tokens, 0.0, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._turns.say(ready=1)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._turns.wait()
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        finish_device()
        self._seconds = time.perf_counter() - self._started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            self._turns.say(seconds=self._seconds, loss=float(logs["loss"]), tokens=self._tokens())


def _common(options: Options, batch: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(prefix="posttrain-bench-"),
        "per_device_train_batch_size": batch,
        "max_steps": 1000,
        "learning_rate": options["lr"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": bool(options.get("bf16", False)),
        "disable_tqdm": True,
        "gradient_checkpointing": bool(options.get("gradient_checkpointing", False)),
        "seed": 0,
    }


def _parts(material: Material, options: Options) -> dict[str, Any]:
    rank, dtype = options["rank"], getattr(torch, material["dtype"])
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    quantised = {"quantization_config": nf4} if options.get("base") == "nf4" else {}
    return {
        "model": AutoModelForCausalLM.from_pretrained(material["base"], dtype=dtype, **quantised),
        "processing_class": AutoTokenizer.from_pretrained(material["base"]),
        "peft_config": LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    }


def sft(material: Material, turns: Turns, options: Options) -> None:
    seen: list[float] = [0.0]

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            seen[0] = float(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    rows = [{"input_ids": r["ids"], "completion_mask": r["learned"]} for r in material[options["records"]]]
    args = SFTConfig(
        **_common(options, options["batch"]),
        max_length=options.get("max_length", 1024),
        packing=bool(options.get("packing", False)),
        completion_only_loss=True,
    )
    trainer = InOrder(args=args, train_dataset=Dataset.from_list(rows), **_parts(material, options))
    trainer.add_callback(_Told(turns, lambda: seen[0]))
    trainer.train()


def dpo(material: Material, turns: Turns, options: Options) -> None:
    seen: list[float] = [0.0]

    class InOrder(DPOTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            seen[0] = float(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = DPOConfig(**_common(options, options["batch"]), beta=options["beta"], max_length=1024)
    trainer = InOrder(args=args, train_dataset=Dataset.from_list(material["pairs"]), **_parts(material, options))
    trainer.add_callback(_Told(turns, lambda: seen[0]))
    trainer.train()


def grpo(material: Material, turns: Turns, options: Options) -> None:
    group, prompts = options["group"], options["prompts"]

    def variety(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [len(set(ids)) / len(ids) for ids in completion_ids]

    args = GRPOConfig(
        **_common(options, group * prompts),
        num_generations=group,
        max_completion_length=options["max_tokens"],
        generation_kwargs={"min_new_tokens": options["max_tokens"]},
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        shuffle_dataset=False,
    )
    rows = [{"prompt": text} for text in material["prompts"]]
    trainer = GRPOTrainer(reward_funcs=variety, args=args, train_dataset=Dataset.from_list(rows), **_parts(material, options))
    trainer.add_callback(_Told(turns, lambda: float(group * prompts * options["max_tokens"])))
    trainer.train()
