"""The memory planner: predictions against measured peaks, chunks for a budget, properties."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, family_classes, make_model, packed_row
from torch import nn
from transformers import GPT2Config, LlamaConfig

import varstream as vs
from varstream.planner import MemoryPlan, plan_memory
from varstream.planner.choose import LARGEST_CHUNK, SMALLEST_CHUNK, Job, choose
from varstream.planner.memory import Step
from varstream.planner.plan import make_plan, size_words
from varstream.planner.shapes import (
    ITEMSIZE,
    LayerGradients,
    ModelShape,
    describe,
    describe_config,
)
from varstream.testing import peak_memory

MIB = 1 << 20
CLOSE = 0.06  # of the measured peak; the contract is 0.15


def sizes(d: int, f: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, int]:
    return {
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
    }


def make(family: str, shape: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    cls, config, _ = family_classes(family)
    return cls(config(**shape)).to(dtype).train()


def measure(model: Any, lengths: list[int], chunk_size: Any = "auto", **options: Any) -> int:
    """Measured peak of one step over packed documents."""
    vs.stream(model, chunk_size=chunk_size, **options)
    batch = packed_row(lengths)
    return peak_memory(lambda: model(**batch).loss.backward())


# --- predictions ----------------------------------------------------------------------------------

BF16 = torch.bfloat16
CASES = {
    "deep and narrow: layer inputs": (
        ("llama", sizes(64, 128, 8, 2, 1, 500)),
        [4096],
        "MLP",
    ),
    "wide, MHA": (("llama", sizes(512, 1376, 2, 8, 8, 1000)), [1500], "MLP"),
    "large vocabulary: head": (("qwen2", sizes(128, 256, 2, 4, 2, 40000)), [1024], "head"),
    "wide attention, one document": (
        ("qwen3", sizes(128, 192, 2, 8, 4, 1000) | {"head_dim": 64}),
        [3000],
        "attention",
    ),
    "many documents": (
        ("qwen3", sizes(128, 384, 3, 4, 2, 1000) | {"head_dim": 32}),
        [300] * 10,
        "MLP",
    ),
    "bfloat16": (
        ("qwen3", sizes(256, 512, 2, 8, 4, 4000) | {"head_dim": 64}, BF16),
        [2600],
        "attention",
    ),
    "bfloat16, large vocabulary": (
        ("llama", sizes(128, 256, 1, 4, 2, 40000), BF16),
        [1024],
        "head",
    ),
    "window": (
        (
            "qwen2",
            sizes(64, 128, 2, 8, 2, 500)
            | {"use_sliding_window": True, "sliding_window": 200, "max_window_layers": 0},
        ),
        [1500],
        "attention",
    ),
    "tied, few tokens: embedding": (
        ("qwen2", sizes(128, 256, 1, 4, 2, 40000) | {"tie_word_embeddings": True}),
        [20],
        "embedding gradient",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_predicted_peak_is_the_measured_one(name):
    given_model, lengths, moment = CASES[name]
    model = make(*given_model)
    plan = plan_memory(model, sum(lengths), longest=max(lengths), optimizer="none")
    assert plan.moment.endswith(moment)
    peak = measure(model, lengths)
    assert peak <= 1.01 * plan.step_bytes
    assert plan.step_bytes == pytest.approx(peak, rel=CLOSE)


def test_small_chunks():
    """Many chunks of a wide model: its gradient sums weigh more than a chunk's activations."""
    shape = sizes(384, 1024, 2, 6, 6, 500)
    model = make("llama", shape)
    plan = plan_memory(model, 700, chunk_size=128)
    assert plan.step_bytes == pytest.approx(measure(model, [700], 128), rel=CLOSE)
    model.zero_grad(set_to_none=True)
    assert plan.step_bytes == pytest.approx(measure(model, [700], 128), rel=0.15)


PADDED = {
    "ragged": ([600, 350, 500, 20], 600, "MLP"),
    "mostly padding": ([300] + [5] * 30, 2000, "MLP"),
    "almost only padding": ([10] + [1] * 63, 8192, "packing"),
}


@pytest.mark.parametrize("name", PADDED)
def test_padded_batches(name):
    lengths, width, moment = PADDED[name]
    model = make("llama", sizes(64, 192, 2, 4, 2, 500))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(500, mask.shape)
    labels = ids.masked_fill(mask == 0, -100)
    plan = padded_plan(describe(model), mask)
    assert plan.moment.endswith(moment)
    vs.stream(model)
    peak = peak_memory(
        lambda: model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    )
    assert peak <= plan.step_bytes == pytest.approx(peak, rel=0.1)


def padded_plan(shape: ModelShape, mask: torch.Tensor) -> MemoryPlan:
    """What ``vs.stream`` plans for a padded batch."""
    lengths = mask.sum(1)
    step = Step(int(lengths.sum()), int(lengths.max()), padded=mask.numel())
    return make_plan(Job(shape, step, "none", "auto", "auto", None))


def test_a_backbone_alone_returns_padded_rows():
    """(B, S, d) for few real tokens: more than everything else together."""
    model = make("llama", sizes(64, 192, 2, 4, 2, 500))
    mask = (torch.arange(4000) < torch.tensor([300] + [5] * 7)[:, None]).long()
    ids = torch.randint(500, mask.shape)
    plan = padded_plan(describe(model, head=False), mask)
    vs.stream(model)
    weights = torch.randn(*mask.shape, 64)

    def run() -> None:
        hidden = model.model(ids, attention_mask=mask)[0]
        torch.sum(weights * hidden).backward()  # the product is gone before the gradient is there

    peak = peak_memory(run)
    assert peak <= plan.step_bytes == pytest.approx(peak, rel=CLOSE)


def test_a_budget_of_the_predicted_peak_is_kept():
    """To the byte: the prediction has to lie above what is measured."""
    for lengths in ([700], [1] * 500, [90] * 11):
        model = make("qwen3", sizes(64, 256, 3, 4, 2, 500) | {"head_dim": 16})
        weights = sum(p.numel() * 4 for p in model.parameters())
        plan = plan_memory(model, sum(lengths), longest=max(lengths), optimizer="none")
        peak = measure(model, lengths, memory_budget=plan.peak_bytes, optimizer="none")
        assert weights + peak <= plan.peak_bytes


@pytest.mark.parametrize("trained", ["lm_head", "layers.1", "layers"])
def test_frozen_parameters(trained):
    model = make("llama", sizes(256, 512, 3, 4, 2, 3000))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    plan = plan_memory(model, 1500)
    assert plan.step_bytes == pytest.approx(measure(model, [1500]), rel=0.1)


def test_gradients_kept_from_an_earlier_backward():
    model = make("llama", sizes(256, 512, 2, 4, 2, 3000))
    measure(model, [10])
    plan = plan_memory(model, 1500, accumulate=True, optimizer="none")
    assert plan.step_bytes == pytest.approx(measure(model, [1500]), rel=CLOSE)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert plan.peak_bytes == plan.step_bytes + 2 * weights


def test_optimizer_states_and_step():
    """A model so wide and tokens so few that the optimizer's own step is the peak."""
    model = make("llama", sizes(256, 512, 2, 4, 2, 20000))
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


# --- descriptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_model_are_described_alike(family):
    model = make_model(family)
    assert describe_config(model.config) == describe(model) == describe(vs.stream(model))


def test_dtype():
    config = LlamaConfig(**sizes(64, 128, 2, 4, 2, 500), dtype="bfloat16")
    assert plan_memory(config, 10).dtype == "bfloat16"
    assert plan_memory(config, 10, dtype=torch.float64).dtype == "float64"
    config.dtype = None
    assert plan_memory(config, 10).dtype == "float32"


def test_plan_is_readable():
    plan = plan_memory(LlamaConfig(**sizes(64, 128, 2, 4, 2, 500)), 5000, 100 * MIB, longest=900)
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
        ({"accumulate": 1}, TypeError, "accumulate must be a bool"),
        ({"device": "cuda"}, ValueError, 'device must be "cpu"'),
        ({"config_or_model": {}}, TypeError, "must be a Hugging Face config or model, got dict"),
        ({"config_or_model": GPT2Config()}, ValueError, "model type 'gpt2' is not supported"),
        (
            {"config_or_model": LlamaConfig(quantization_config={"quant_method": "gptq"})},
            ValueError,
            "config.quantization_config is set",
        ),
        ({"config_or_model": nn.Linear(2, 2)}, ValueError, "Linear has model type None"),
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


# --- chunks ---------------------------------------------------------------------------------------


def test_default_chunk_of_the_streaming_benchmark_is_1024():
    config = LlamaConfig(**sizes(512, 1376, 4, 8, 8, 16000))
    plan = plan_memory(config, 16384)
    assert (plan.chunk_size, plan.head_chunk_size) == (1024, 512)
    assert plan.reason == "Chunks of 1,024 rows are the default."


def test_chunks_grow_where_they_cost_little():
    config = LlamaConfig(**sizes(64, 128, 2, 4, 2, 20000))
    plan = plan_memory(config, 16384, longest=200)
    assert plan.chunk_size == LARGEST_CHUNK and "cost little" in plan.reason
    fixed = plan_memory(config, 16384, longest=200, chunk_size=1024)
    assert plan.peak_bytes <= fixed.peak_bytes * 1.125


def budgeted(model: Any, **options: Any) -> Any:
    return vs.stream(copy.deepcopy(model), optimizer="sgd", **options)


def test_budget_makes_chunks_smaller_and_is_kept():
    torch.manual_seed(0)
    model = make("qwen3", sizes(128, 512, 2, 4, 2, 4000) | {"head_dim": 32})
    weights = sum(p.numel() * 4 for p in model.parameters())
    batch = packed_row([1500, 700])
    roomy, tight = (plan_memory(model, 2200, b, longest=1500, optimizer="sgd") for b in (None, 1))
    budget = (roomy.peak_bytes + 3 * tight.peak_bytes) // 4
    plan = plan_memory(model, 2200, budget, longest=1500, optimizer="sgd")
    assert plan.fits and SMALLEST_CHUNK <= plan.chunk_size < roomy.chunk_size
    assert "would pass the budget" in plan.reason
    losses, peaks = [], []
    for streamed in (budgeted(model), budgeted(model, memory_budget=budget)):

        def run(streamed: Any = streamed) -> None:
            loss = streamed(**batch).loss
            loss.backward()
            losses.append(loss.item())

        peaks.append(weights + peak_memory(run))
    assert peaks[1] <= budget < peaks[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_budget_too_small_is_refused_before_anything_runs():
    model = vs.stream(make_model(), memory_budget=50_000)
    ran = []
    model.model.embed_tokens.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(
        ValueError, match=r"memory_budget is too small: 40 tokens need .* of 48.8 K"
    ):
        model(**packed_row([40]))
    assert not ran and all(p.grad is None for p in model.parameters())
    with torch.no_grad():  # nothing is streamed then, so nothing is planned
        model(**packed_row([40]))


def test_budget_in_words_is_refused_with_a_number_to_give():
    with pytest.raises(TypeError, match="memory_budget must be an int, got '1GiB'; .* 16 << 30"):
        vs.stream(make_model(), memory_budget="1GiB")  # type: ignore[arg-type]


def test_budget_names_the_length_that_fits():
    model = make_model()
    budget = plan_memory(model, 5000, 1).peak_bytes
    streamed = vs.stream(model, memory_budget=budget)
    longest = plan_memory(model, 1, budget).max_tokens
    with pytest.raises(ValueError, match=f"pass at most {longest:,} tokens a step"):
        streamed(**packed_row([longest + 1]))


def test_backbone_alone_is_planned_without_the_head():
    model = make_model(vocab_size=5000)
    ids = torch.randint(5000, (1, 30))
    whole = plan_memory(model, 30, 1, optimizer="none").peak_bytes
    vs.stream(model, memory_budget=whole - 1, optimizer="none")
    with pytest.raises(ValueError, match="memory_budget is too small"):
        model(ids, labels=ids)
    model.model(ids).last_hidden_state.sum().backward()


def test_kept_gradients_count():
    model = make_model()
    budget = plan_memory(model, 40, 1, optimizer="none").peak_bytes
    vs.stream(model, memory_budget=budget, optimizer="none")
    batch = packed_row([40])
    model(**batch).loss.backward()
    with pytest.raises(ValueError, match="memory_budget is too small"):
        model(**batch)
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()


# --- properties -----------------------------------------------------------------------------------


@st.composite
def shapes(draw: Any) -> ModelShape:
    kv_heads = draw(st.integers(1, 8))
    heads, head_dim = kv_heads * draw(st.integers(1, 8)), draw(st.sampled_from([8, 64, 128]))
    d, f, vocab = (
        draw(st.integers(8, 4096)),
        draw(st.integers(8, 8192)),
        draw(st.integers(2, 10**5)),
    )
    layer = LayerGradients(2 * d * kv_heads * head_dim, 2 * d * heads * head_dim, 2 * d * f, d * f)
    frozen = LayerGradients(0, 0, 0, 0)
    layers = tuple(draw(st.lists(st.sampled_from([layer, frozen]), min_size=1, max_size=6)))
    embedding, head = draw(st.sampled_from([0, vocab * d])), draw(st.sampled_from([0, vocab * d]))
    trained = embedding + head + d + sum(part.all for part in layers)
    return ModelShape(
        model_type="llama",
        dtype=draw(st.sampled_from(list(ITEMSIZE))),
        hidden=d,
        intermediate=f,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=draw(st.sampled_from([0, vocab])),
        qk_norm=draw(st.booleans()),
        tied=False,
        window=draw(st.sampled_from([None, 100, 5000])),
        full_attention=draw(st.booleans()),
        max_length=8192,
        weights=2 * vocab * d + len(layers) * layer.all + d,
        trained=trained,
        largest=max(embedding, head, d, f * d),
        embedding=embedding,
        norm=d,
        head=head,
        layers=layers,
    )


@st.composite
def jobs(draw: Any) -> Job:
    tokens = draw(st.integers(1, 100_000))
    longest = draw(st.just(tokens) | st.integers(1, tokens))
    flags = {name: draw(st.booleans()) for name in ("accumulate", "reverse")}
    shape = draw(shapes())
    return Job(
        shape,
        Step(tokens, longest, draw(st.sampled_from([1, 16])), **flags),
        draw(st.sampled_from(["adamw", "sgd", "none"])),
        draw(st.just("auto") | st.integers(1, 5000)),
        draw(st.just("auto") | st.integers(1, 5000)),
        draw(st.none() | st.integers(1, 1 << 36)),
    )


@settings(max_examples=150, deadline=None)
@given(jobs(), st.integers(1, 200_000))
def test_peak_grows_with_tokens(job, other):
    chunks = [job.chunk_size, job.head_chunk_size]
    fixed = [1024 if size == "auto" else size for size in chunks]
    job = Job(job.shape, job.step, job.optimizer, fixed[0], fixed[1], None)
    few, many = sorted((job.step.tokens, other))
    peaks = [make_plan(job.at(tokens)) for tokens in (few, many)]
    assert peaks[0].peak_bytes <= peaks[1].peak_bytes
    assert peaks[0].step_bytes <= peaks[1].step_bytes


@settings(max_examples=100, deadline=None)
@given(jobs())
def test_a_plan_keeps_its_word(job):
    plan = make_plan(job)
    if job.chunk_size == "auto":
        assert SMALLEST_CHUNK <= plan.chunk_size <= LARGEST_CHUNK
    else:
        assert plan.chunk_size == job.chunk_size
    if job.head_chunk_size == "auto":
        assert 64 <= plan.head_chunk_size <= 512
    else:
        assert plan.head_chunk_size == job.head_chunk_size
    assert sum(plan.parts.values()) == plan.peak_bytes
    assert plan.step_bytes <= plan.peak_bytes
    assert MemoryPlan(**json.loads(json.dumps(plan.as_json()))) == plan
    if job.budget is None:
        assert plan.fits and plan.max_tokens is None
        return
    assert plan.fits == (plan.peak_bytes <= job.budget)
    assert plan.fits == (job.step.tokens <= plan.max_tokens) or job.step.longest < job.step.tokens
    assert not choose(job.at(plan.max_tokens + 1)).fits
    if plan.max_tokens:
        assert choose(job.at(plan.max_tokens)).fits
