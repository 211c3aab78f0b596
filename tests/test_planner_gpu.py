"""Plans for GPUs: devices, the roofline knee, what is counted there and what is assumed."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import make_model
from planner_cases import sizes
from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

from varstream.planner import knee, plan_memory
from varstream.planner.attention_memory import cuda_backward
from varstream.planner.choose import CUBLAS_WORKSPACE, CUDA_CONTEXT, FRAGMENTED
from varstream.planner.devices import (
    CPU,
    DEFAULT_GPU,
    GPUS,
    Device,
    device_of,
    gpu_named,
    gpu_of_size,
)
from varstream.planner.knee import Product, attention_knee, product_knee, words_below
from varstream.planner.memory import TILES, Step, layer_moments
from varstream.planner.shapes import describe_config
from varstream.planner.trace import ATTENTION_BACKWARD

WIDE = LlamaConfig(**sizes(4096, 14336, 3, 32, 8, 32000), dtype="bfloat16")  # layers of an 8B
QWEN_4B = Qwen3Config(
    **sizes(2560, 9728, 36, 32, 8, 151936), head_dim=128, tie_word_embeddings=True, dtype="bfloat16"
)
EXPERTS = Qwen3MoeConfig(
    **sizes(2048, 6144, 2, 32, 4, 1000), head_dim=128, moe_intermediate_size=768,
    num_experts=128, num_experts_per_tok=8, dtype="bfloat16",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("h100", "h100"),
        ("H100-PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("rtx4090", "4090"),
        ("NVIDIA H200", "h200"),
        ("GTX 1080", None),
        ("", None),
    ],
)
def test_names(name, device):
    found = gpu_named(name)
    assert (found and found.name) == device


def test_sizes_and_devices():
    assert gpu_of_size(80 * 10**9).peak == GPUS["h100"].peak
    assert gpu_of_size(24 << 30).balance == GPUS["a10"].balance
    assert gpu_of_size(10**12).memory == 10**12  # no such GPU: an H100's ratios
    assert gpu_of_size(10**12).balance == DEFAULT_GPU.balance
    assert device_of("cpu") is CPU
    if not torch.cuda.is_available():
        assert device_of("cuda") is DEFAULT_GPU


# --- the knee -------------------------------------------------------------------------------------


def seconds_a_row(product: Product, rows: float, device: Device) -> float:
    """The roofline written down once more: products of a chunk, weights read, gradients summed."""
    k, m, es = product.inner, product.outer, product.itemsize
    met = rows * product.share
    times = 3 if product.trained else 2
    work = times * 2 * met * k * m / device.peak
    moved = times * met * (k + m) * es + 2 * k * m * es
    if product.trained:
        moved += k * m * (es + es + 4 + 4)  # dW written and read, its sum read and written
    return max(work, moved / device.bandwidth) / met


@pytest.mark.parametrize("device", [CPU, GPUS["h100"], GPUS["a100"], GPUS["3090"]])
@pytest.mark.parametrize(
    "product",
    [
        Product(4096, 1024, 2, True),
        Product(4096, 14336, 2, False),
        Product(4096, 16, 4, True),
        Product(64, 64, 4, True),
        Product(2048, 768, 2, True, 8 / 128),
    ],
)
def test_at_the_knee_a_product_takes_a_quarter_longer_than_its_limit(product, device):
    rows = product_knee(product, device)
    limit = seconds_a_row(product, 1e12, device)
    assert seconds_a_row(product, rows, device) <= 1.25 * limit * (1 + 1e-9)
    if rows > 20:
        assert seconds_a_row(product, 0.9 * rows, device) > 1.25 * limit


def test_the_smallest_dimension_and_few_heads_ask_for_the_longest_chunks():
    h100 = GPUS["h100"]
    wide, narrow = Product(4096, 4096, 2, True), Product(4096, 1024, 2, True)
    assert product_knee(narrow, h100) > product_knee(wide, h100)
    assert knee.knee((Product(64, 64, 2, True),), 32, h100) == 128 * 5  # in the cache
    one_of_many = Product(1024, 512, 2, True, 1 / 64)  # all of them are not
    assert knee.knee((one_of_many,), 32, h100) == product_knee(one_of_many, h100) > 128 * 5
    assert product_knee(wide, h100) > product_knee(wide._replace(trained=False), h100)
    assert attention_knee(32, h100) == 128 * 5  # 132 multiprocessors, 5 blocks of 32 heads
    assert attention_knee(2, h100) == 128 * 66
    assert attention_knee(2, CPU) == 1
    assert knee.knee((wide, narrow), 2, h100) == 128 * 66


def test_rows_of_an_expert_are_what_counts():
    shape = describe_config(EXPERTS)
    shares = {product.share for layer in shape.layers for product in layer.products}
    assert shares == {1.0, 8 / 128}
    plan = plan_memory(EXPERTS, 100_000, gpu="h100", dtype=torch.bfloat16)
    assert plan.knee > 10_000 and plan.chunk_size >= plan.knee and not plan.below_knee


def test_a_chunk_below_the_knee_is_never_silent():
    plan = plan_memory(WIDE, 50_000, mode="lora", gpu="h100", chunk_size=128)
    assert plan.knee > 128 and f"{plan.knee:,} rows" in plan.below_knee
    assert plan.reason.endswith(plan.below_knee) and "below the knee" in str(plan)
    assert not plan_memory(WIDE, 50_000, mode="lora", gpu="h100").below_knee
    assert not plan_memory(WIDE, 100, mode="lora", gpu="h100", chunk_size=128).below_knee
    # Made small by a budget, not by the caller.
    roomy = plan_memory(WIDE, 50_000, device="cuda", optimizer="none")
    tight = plan_memory(WIDE, 50_000, 1, device="cuda", optimizer="none").peak_bytes
    plan = plan_memory(WIDE, 50_000, tight, device="cuda", optimizer="none")
    assert plan.fits and plan.chunk_size < roomy.chunk_size
    assert plan.below_knee and plan.below_knee in plan.reason
    assert words_below(128, 129, 128, CPU) == "" and words_below(128, 129, 129, CPU)


def test_the_warning_comes_once():
    words = "Chunks of 3 rows, a text of this test's own."
    with pytest.warns(UserWarning, match="this test's own"):
        knee.warn_once(words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        knee.warn_once(words)
        knee.warn_once("")


# --- what is counted ------------------------------------------------------------------------------


def test_a_gpus_parts():
    plan = plan_memory(QWEN_4B, 65536, device="cuda", optimizer="none", mode="lora")
    cpu = plan_memory(QWEN_4B, 65536, chunk_size=4096, optimizer="none", mode="lora")
    assert plan.parts["CUDA context, workspaces"] == CUDA_CONTEXT + CUBLAS_WORKSPACE
    before = plan.parts["weights"] + CUDA_CONTEXT + CUBLAS_WORKSPACE
    step = plan.peak_bytes - before
    assert plan.parts["fragmentation"] == pytest.approx(
        step * FRAGMENTED / (1 + FRAGMENTED), rel=1e-6
    )
    for name in ("layer inputs", "K, V of a layer", "dK, dV of a layer"):
        assert plan.parts[name] == cpu.parts[name]
    assert (plan.dtype, plan.device, plan.measured, cpu.measured) == (
        "bfloat16",
        "h100",
        False,
        True,
    )
    assert ("status", "predicted, not yet measured on a GPU") in plan.summary()
    assert (
        plan.budget_bytes is None
        and plan_memory(QWEN_4B, 10, gpu="a100").budget_bytes == 80 * 10**9
    )


def test_attention_kernels_buffers():
    """dQ summed in float32, two statistics a row and head, dO copied; work lists are small."""
    (layer,) = {layer.trace.attention for layer in describe_config(QWEN_4B).layers}
    rows, heads, width = 4096, 32, 32 * 128
    buffers = rows * (4 * width + 8 * heads + 2 * width)
    assert buffers <= cuda_backward(layer, rows) <= 1.01 * buffers


def test_lengths_of_published_runs_are_within_reach():
    """A Qwen3-4B on 80 GB: full training at 200k tokens and adapters of rank 32 at 247k have been
    done with K and V projected again in each chunk (StreamBP, arXiv 2506.03077, table 3)."""
    full = plan_memory(QWEN_4B, 200_000, gpu="a100")
    lora = plan_memory(QWEN_4B, 247_000, gpu="a100", mode="lora", lora_rank=32)
    assert full.fits and lora.fits
    assert lora.max_tokens > full.max_tokens


def test_float32_on_a_gpu_is_composed():
    """Scores in blocks instead of the kernels' buffers."""
    shape, step = describe_config(WIDE, torch.float32), Step(4096, 4096, device=DEFAULT_GPU)
    lines = [m for m in layer_moments(shape, step, 512) if m.name.endswith(ATTENTION_BACKWARD)]
    blocks = 5 * 32 * 256 * 512 * 4
    assert lines and all(blocks < line.parts[TILES] < 1.2 * blocks for line in lines)


def test_a_model_on_the_cpu_is_planned_for_a_gpu():
    model = make_model()
    plan = plan_memory(model, 100, device="cuda")
    assert (plan.mode, plan.device, plan.dtype) == ("model", "h100", "float32")
