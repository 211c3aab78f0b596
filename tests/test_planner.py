"""The memory planner: predictions against measured peaks, descriptions, arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, make_model
from planner_cases import BF16, build, measure, packed, padded, sizes
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
)

import varstream as vs
from varstream.planner import MemoryPlan, plan_memory
from varstream.planner.choose import Job
from varstream.planner.memory import Step
from varstream.planner.plan import make_plan
from varstream.planner.report import size_words
from varstream.planner.shapes import Mode, ModelShape, describe, describe_config
from varstream.testing import peak_memory

CONTRACT = 1.1  # times the measured peak, at most
CLOSE = 1.05  # where attention's temporaries are not the peak


def check(model: Any, batch: dict[str, Any], plan: MemoryPlan, **options: Any) -> None:
    """A prediction lies above the measured peak, and close to it."""
    peak = measure(model, batch, plan.chunk_size, head_chunk_size=plan.head_chunk_size, **options)
    rough = "attention" in plan.moment or plan.moment in ("forward", "packing")
    most = (CONTRACT if rough else CLOSE) * peak
    assert peak <= plan.step_bytes <= most, f"{plan.step_bytes / peak:.3f}\n{plan}"


# --- predictions ----------------------------------------------------------------------------------

# config, lengths of packed documents, dtype, chunk, the moment of the peak
CASES = {
    "llama, deep and narrow": (
        LlamaConfig(**sizes(64, 128, 8, 2, 1, 500)), [700], torch.float32, 256, "backward"
    ),
    "llama, small chunks of a wide model": (
        LlamaConfig(**sizes(384, 1024, 2, 6, 6, 500)), [700], torch.float32, 128, "backward"
    ),
    "qwen2, large vocabulary": (
        Qwen2Config(**sizes(128, 256, 1, 4, 2, 40000)), [512], BF16, "auto", "head"
    ),
    "qwen2, tied, few tokens": (
        Qwen2Config(**sizes(128, 256, 1, 4, 2, 40000), tie_word_embeddings=True),
        [20], torch.float32, "auto", "embedding gradient",
    ),
    "qwen2, window": (
        Qwen2Config(
            **sizes(64, 128, 2, 8, 2, 500),
            use_sliding_window=True, sliding_window=200, max_window_layers=0,
        ),
        [512], torch.float32, 256, "attention's backward",
    ),
    "qwen3, wide attention": (
        Qwen3Config(**sizes(64, 96, 2, 8, 4, 500), head_dim=64),
        [1200], torch.float32, 256, "attention's backward",
    ),
    "qwen3, bfloat16, many documents": (
        Qwen3Config(**sizes(256, 512, 2, 8, 4, 500), head_dim=32),
        [128] * 4, BF16, 256, "backward",
    ),
    "gemma 2, softcap": (
        Gemma2Config(**sizes(128, 512, 2, 4, 2, 1000), head_dim=32, sliding_window=100),
        [512], torch.float32, 256, "attention's backward",
    ),
    "gemma 3, two rotary tables": (
        Gemma3TextConfig(**sizes(128, 512, 6, 4, 2, 1000), head_dim=32, sliding_window=100),
        [512], BF16, 256, "attention's backward",
    ),
    "gpt-2, dropout": (
        GPT2Config(n_embd=128, n_head=8, n_layer=1, vocab_size=500), [512], torch.float32, 256,
        "attention's backward",
    ),
    "phi-3, fused projections": (
        Phi3Config(**sizes(128, 384, 2, 4, 2, 1000)), [512], torch.float32, 256, "backward"
    ),
    "granite": (
        GraniteConfig(**sizes(128, 384, 2, 4, 2, 300)), [512], BF16, 256, "backward"
    ),
    "olmo 2, norms after": (
        Olmo2Config(**sizes(128, 384, 2, 4, 2, 1000)), [512], torch.float32, 256, "backward"
    ),
    "mixtral, experts": (
        MixtralConfig(**sizes(128, 256, 2, 4, 2, 1000), num_local_experts=4),
        [512], torch.float32, 256, "backward",
    ),
    "qwen3-moe, router losses": (
        Qwen3MoeConfig(
            **sizes(64, 128, 2, 4, 2, 500), head_dim=16, output_router_logits=True,
            moe_intermediate_size=32, num_experts=64, num_experts_per_tok=2,
        ),
        [300, 212], torch.float32, 256, "backward",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_predicted_peak_is_the_measured_one(name):
    config, lengths, dtype, chunk, moment = CASES[name]
    model = build(config, dtype)
    options = {"chunk_size": chunk, "longest": max(lengths), "optimizer": "none"}
    plan = plan_memory(model, sum(lengths), **options)
    assert plan.moment.endswith(moment), plan
    check(model, packed(lengths, config.vocab_size), plan)


PADDED = {
    "ragged": ([600, 350, 500, 20], 600, "backward"),
    "mostly padding": ([300] + [5] * 30, 2000, "backward"),
    "almost only padding": ([10] + [1] * 63, 8192, "packing"),
}


@pytest.mark.parametrize("name", PADDED)
def test_padded_batches(name):
    lengths, width, moment = PADDED[name]
    model = build(LlamaConfig(**sizes(64, 192, 2, 4, 2, 500)))
    batch = padded(lengths, width, 500)
    plan = padded_plan(describe(model), batch["attention_mask"])
    assert plan.moment.endswith(moment)
    check(model, batch, plan)


def padded_plan(shape: ModelShape, mask: torch.Tensor) -> MemoryPlan:
    """What ``vs.stream`` plans for a padded batch."""
    lengths = mask.sum(1)
    step = Step(int(lengths.sum()), int(lengths.max()), padded=mask.numel())
    return make_plan(Job(shape, step, "none", "auto", "auto", None))


def test_a_backbone_alone_returns_padded_rows():
    """(B, S, d) for few real tokens: more than everything else together."""
    model = build(LlamaConfig(**sizes(64, 192, 2, 4, 2, 500)))
    batch = padded([300] + [5] * 7, 4000, 500)
    mask = batch["attention_mask"]
    plan = padded_plan(describe(model, head=False), mask)
    vs.stream(model)
    weights = torch.randn(*mask.shape, 64)

    def run() -> None:
        hidden = model.model(batch["input_ids"], attention_mask=mask)[0]
        torch.sum(weights * hidden).backward()  # the product is gone before the gradient is there

    peak = peak_memory(run)
    assert peak <= plan.step_bytes <= CLOSE * peak


def test_a_budget_of_the_predicted_peak_is_kept():
    """To the byte: the prediction has to lie above what is measured."""
    for lengths in ([400], [1] * 100, [90] * 4):
        model = build(Qwen3Config(**sizes(64, 256, 3, 4, 2, 500), head_dim=16))
        weights = sum(p.numel() * 4 for p in model.parameters())
        plan = plan_memory(model, sum(lengths), longest=max(lengths), optimizer="none")
        batch = packed(lengths, 500)
        peak = measure(model, batch, memory_budget=plan.peak_bytes, optimizer="none")
        assert weights + peak <= plan.peak_bytes


@pytest.mark.parametrize("trained", ["lm_head", "layers.1", "layers", "down_proj"])
def test_frozen_parameters(trained):
    config = LlamaConfig(**sizes(256, 512, 3, 4, 2, 3000))
    model = build(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    plan = plan_memory(model, 512, chunk_size=256)
    assert describe_config(config, None, Mode("frozen", parts=[trained])) == describe(model)
    check(model, packed([512], 3000), plan)


ADAPTED = {
    "llama, bfloat16, float32 adapters": (
        LlamaConfig(**sizes(128, 384, 3, 4, 2, 1000)), BF16, "all-linear"
    ),
    "qwen3, queries and values": (
        Qwen3Config(**sizes(128, 384, 3, 4, 2, 1000), head_dim=32),
        torch.float32, ["q_proj", "v_proj"],
    ),
    "gpt-2, transposed weights": (
        GPT2Config(n_embd=128, n_head=2, n_layer=2, vocab_size=1000, resid_pdrop=0, embd_pdrop=0,
                   attn_pdrop=0),
        torch.float32, "all-linear",
    ),
    "llama, adapter on the head": (
        LlamaConfig(**sizes(128, 256, 1, 4, 2, 20000)), torch.float32, ["lm_head", "q_proj"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters(name):
    """Described by a config with none built as PEFT builds them, and predicted as measured."""
    peft = pytest.importorskip("peft")
    config, dtype, targets = ADAPTED[name]
    wanted = peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build(config, dtype), wanted).train()
    names = [targets] if isinstance(targets, str) else targets
    mode = Mode("lora", 8, names[0] if names == ["all-linear"] else names)
    assert describe_config(config, dtype, mode) == describe(model)
    plan = plan_memory(model, 500, chunk_size=256, optimizer="none")
    given = plan_memory(
        config, 500, chunk_size=256, dtype=dtype, optimizer="none",
        mode="lora", lora_rank=8, lora_targets=targets,
    )  # fmt: skip
    assert (given.parts, given.mode, plan.mode) == (plan.parts, "lora", "model")
    check(model, packed([500], config.vocab_size), plan)


def test_gradients_kept_from_an_earlier_backward():
    model = build(LlamaConfig(**sizes(256, 512, 2, 4, 2, 3000)))
    measure(model, packed([10], 3000))
    plan = plan_memory(model, 500, accumulate=True, optimizer="none")
    check(model, packed([500], 3000), plan)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert plan.peak_bytes == plan.step_bytes + 2 * weights


def test_optimizer_states_and_step():
    """A model so wide and tokens so few that the optimizer's own step is the peak."""
    model = build(LlamaConfig(**sizes(256, 512, 2, 4, 2, 20000)))
    weights = sum(p.numel() * 4 for p in model.parameters())
    plan = plan_memory(model, 1)
    assert plan.moment == "optimizer step"
    assert plan.parts["optimizer states"] == 2 * weights
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    temporaries = peak_memory(optimizer.step)
    assert plan.parts["optimizer temporaries"] == pytest.approx(temporaries, rel=0.1)
    assert plan_memory(model, 1, optimizer="sgd").parts.get("optimizer states") is None


def test_states_wider_than_weights():
    config = LlamaConfig(**sizes(64, 128, 2, 4, 2, 500), dtype="bfloat16")
    weights = describe_config(config).weights
    parts = plan_memory(config, 10).parts
    wide = plan_memory(config, 10, optimizer_dtype=torch.float32).parts
    assert parts["optimizer states"] == 2 * weights.bytes == 4 * weights.elements
    assert wide["optimizer states"] == 8 * weights.elements
    assert parts["weights"] == wide["weights"] == weights.bytes


# --- descriptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_model_are_described_alike(family):
    model = make_model(family).train()
    assert describe_config(model.config) == describe(model) == describe(vs.stream(model))


def test_nothing_of_the_model_changes():
    """The trace runs on a twin: no hook fires, no gradient, no random number is drawn."""
    model = vs.stream(build(GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=50)))
    before = [dict(vars(module)) for module in model.modules()]
    state, fired = torch.get_rng_state(), []
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda *_: fired.append(1))
    plan_memory(model, 100)
    handle.remove()
    assert not fired and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and not p.is_meta for p in model.parameters())
    assert [dict(vars(module)) for module in model.modules()] == before


def test_dtype():
    config = LlamaConfig(**sizes(64, 128, 2, 4, 2, 500), dtype="bfloat16")
    assert plan_memory(config, 10).dtype == "bfloat16"
    assert plan_memory(config, 10, dtype=torch.float64).dtype == "float64"
    config.dtype = None
    assert plan_memory(config, 10).dtype == "float32"
    assert plan_memory(config, 10, device="cuda").dtype == "bfloat16"


def test_plan_is_readable():
    plan = plan_memory(LlamaConfig(**sizes(64, 128, 2, 4, 2, 500)), 5000, 100 << 20, longest=900)
    text = str(plan)
    for words in ("5,000 tokens", "longest 900", "layer inputs", plan.reason, "100 MiB, fits"):
        assert words in text
    assert sum(plan.parts.values()) == plan.peak_bytes == max(plan.moments.values())
    assert [size_words(n) for n in (0, 1023, 1536, 3 << 30)] == [
        "0 B",
        "1,023 B",
        "1.5 KiB",
        "3 GiB",
    ]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"tokens": 0}, ValueError, "tokens must be >= 1"),
        ({"tokens": 1.5}, TypeError, "tokens must be an int"),
        ({"longest": 11}, ValueError, r"longest must be at most tokens \(10\), got 11"),
        ({"budget_bytes": 0}, ValueError, "budget_bytes must be >= 1"),
        (
            {"budget_bytes": "1GiB"},
            TypeError,
            "budget_bytes must be an int, got '1GiB'; give a number of bytes such as 16 << 30",
        ),
        ({"budget_bytes": "much"}, TypeError, "budget_bytes must be an int, got str$"),
        ({"chunk_size": "big"}, TypeError, 'chunk_size must be an int or "auto"'),
        ({"head_chunk_size": 0}, ValueError, "head_chunk_size must be at least 1"),
        ({"dtype": torch.int8}, ValueError, "dtype must be a floating torch.dtype"),
        ({"optimizer": "lion"}, ValueError, "optimizer must be one of adamw, sgd, none"),
        ({"optimizer_dtype": "float32"}, ValueError, "optimizer_dtype must be a floating"),
        ({"accumulate": 1}, TypeError, "accumulate must be a bool"),
        ({"mode": "dora"}, ValueError, "mode must be one of full, lora, frozen, got 'dora'"),
        ({"mode": "lora", "lora_rank": 0}, ValueError, "lora_rank must be >= 1"),
        (
            {"mode": "lora", "lora_targets": ["c_attn"]},
            ValueError,
            "lora_targets names no linear layer: 'c_attn'; the model has down_proj, gate_proj, k_",
        ),
        ({"mode": "lora", "lora_targets": 3}, TypeError, "lora_targets must be a name or a list"),
        ({"mode": "lora", "lora_targets": []}, ValueError, "lora_targets must name something"),
        ({"mode": "frozen", "trained": "tail"}, ValueError, "trained names no parameter.*'tail'"),
        ({"config_or_model": make_model(), "mode": "lora"}, ValueError, "mode is for configs"),
        ({"gpu": "voodoo2"}, ValueError, "gpu must be a number of bytes or one of h200, h100"),
        ({"gpu": 0}, ValueError, "gpu must be >= 1"),
        ({"config_or_model": {}}, TypeError, "must be a Hugging Face config or model, got dict"),
        ({"config_or_model": T5Config()}, ValueError, "the config makes no t5 model"),
        (
            {"config_or_model": LlamaConfig(quantization_config={"quant_method": "gptq"})},
            ValueError,
            "config.quantization_config is set",
        ),
        ({"config_or_model": nn.Linear(2, 2)}, ValueError, "Linear .model type None."),
        (
            {"config_or_model": make_model(), "dtype": torch.bfloat16},
            ValueError,
            "dtype must be the model's float32",
        ),
    ],
)
def test_bad_arguments(options, kind, message):
    arguments = {"config_or_model": LlamaConfig(**sizes(64, 128, 2, 4, 2, 500)), "tokens": 10}
    with pytest.raises(kind, match=message):
        plan_memory(**(arguments | options))
