"""The arithmetic of the GPU benchmark, and that it says so where there is no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu import SHAPES, Shape, peak_tflops


def test_a_steps_flops_are_those_torch_counts_in_a_step_without_weight_gradients() -> None:
    shape = Shape(64, 160, 3, 4, 2, 16, 500)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.size, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    length = 40
    inputs = model.get_input_embeddings()(torch.arange(length)[None]).requires_grad_(True)
    with FlopCounterMode(display=False) as counted:
        model(inputs_embeds=inputs).logits.sum().backward()
    # torch's eager attention computes every key of a row, the formula those that a query sees
    seen, computed = length * (length + 1) / 2, length * length
    attention = 12 * shape.layers * shape.heads * shape.size
    want = shape.step_flops([length], learned=length) + attention * (computed - seen)
    assert counted.get_total_flops() == pytest.approx(want, rel=0.01)


def test_the_named_shapes_have_the_sizes_in_their_names() -> None:
    embeddings = {name: shape.vocabulary * shape.hidden for name, shape in SHAPES.items()}
    assert SHAPES["1b"].block_parameters + embeddings["1b"] == pytest.approx(1.236e9, rel=0.01)
    assert SHAPES["3b"].block_parameters + embeddings["3b"] == pytest.approx(3.213e9, rel=0.01)


def test_a_devices_peak_is_that_of_the_longest_name_that_fits() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops("NVIDIA L40S") == 362


def test_a_device_of_a_similar_name_has_no_peak() -> None:
    for name in ("Intel(R) Xeon(R) Processor", "NVIDIA L40", "NVIDIA GH200 480GB", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert peak_tflops(name) is None, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and done.stderr.strip() == "torch sees no CUDA device here: run this on one, or with --smoke"


@pytest.mark.slow
def test_the_whole_script_runs_on_a_tiny_shape() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--rounds", "1", "--peak-tflops", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "generate 8 tokens, tiny, batch 2" in done.stdout
