"""The planner's choices: chunks for a budget, the largest length, properties over random shapes."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_model, packed_row
from planner_cases import BF16, build, measure, packed, padded, sizes
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MixtralConfig, Qwen3Config

import varstream as vs
from varstream.planner import MemoryPlan, plan_memory
from varstream.planner.choose import LARGEST_CHUNK, SMALLEST_CHUNK, Job, choose, knee_of
from varstream.planner.devices import CPU, GPUS
from varstream.planner.knee import Product
from varstream.planner.memory import Step
from varstream.planner.plan import make_plan
from varstream.planner.shapes import (
    ITEMSIZE,
    NOTHING,
    HeadShape,
    LayerShape,
    ModelShape,
    Size,
    describe,
)
from varstream.planner.trace import (
    ATTENTION,
    ATTENTION_BACKWARD,
    BACKWARD,
    FORWARD,
    AttentionShape,
    Line,
    Trace,
)
from varstream.testing import peak_memory


def test_default_chunk_of_the_streaming_benchmark_is_1024():
    config = LlamaConfig(**sizes(512, 1376, 4, 8, 8, 16000))
    plan = plan_memory(config, 16384)
    assert (plan.chunk_size, plan.head_chunk_size) == (1024, 512)
    assert plan.reason == "Chunks of 1,024 rows are the default." and not plan.below_knee


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
    model = build(Qwen3Config(**sizes(64, 512, 2, 4, 2, 1000), head_dim=32))
    weights = sum(p.numel() * 4 for p in model.parameters())
    batch = packed([900, 400], 1000)
    roomy, tight = (plan_memory(model, 1300, b, longest=900, optimizer="sgd") for b in (None, 1))
    budget = (roomy.peak_bytes + 3 * tight.peak_bytes) // 4
    plan = plan_memory(model, 1300, budget, longest=900, optimizer="sgd")
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


LARGEST = {
    "one document": (LlamaConfig(**sizes(64, 192, 2, 4, 2, 500)), torch.float32, None),
    "documents, bfloat16": (
        Qwen3Config(**sizes(128, 256, 2, 4, 2, 500), head_dim=32), BF16, 100
    ),
    "softcap, window": (
        Gemma2Config(**sizes(64, 192, 2, 4, 2, 500), head_dim=16, sliding_window=100),
        torch.float32, None,
    ),
    "experts": (
        MixtralConfig(**sizes(64, 96, 2, 4, 2, 500), num_local_experts=4), torch.float32, 300
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_length_fits_when_it_is_run(name):
    config, dtype, longest = LARGEST[name]
    model = build(config, dtype)
    resident = sum(p.numel() * p.element_size() for p in model.parameters())
    budget = plan_memory(model, 500, longest=longest, chunk_size=128, optimizer="none").peak_bytes
    plan = plan_memory(model, 400, budget, longest=longest, optimizer="none")
    most = plan.max_tokens
    each = longest or most
    lengths = [each] * (most // each) + ([most % each] if most % each else [])
    peak = measure(model, packed(lengths, 500), memory_budget=budget, optimizer="none")
    assert most >= 400 and resident + peak <= budget
    with pytest.raises(ValueError, match="memory_budget is too small"):
        model(**packed([*lengths, 1] if longest else [most + 1], 500))


def test_a_padded_batch_of_the_largest_length_fits():
    model = build(LlamaConfig(**sizes(64, 192, 2, 4, 2, 500)))
    resident = sum(p.numel() * 4 for p in model.parameters())
    batch = padded([500, 300, 200], 700, 500)
    step = Step(1000, 500, padded=2100)
    budget = make_plan(Job(describe(model), step, "none", 256, "auto", None)).peak_bytes
    peak = measure(model, batch, memory_budget=budget, optimizer="none")
    assert resident + peak <= budget


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


def test_a_streamed_model_warns_once_of_chunks_below_the_knee():
    model = build(LlamaConfig(**sizes(256, 1024, 1, 4, 4, 100)))
    vs.stream(model, chunk_size=8, memory_budget=1 << 34)
    with pytest.warns(UserWarning, match="Chunks of 8 rows are below the roofline knee"):
        model(**packed([40], 100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**packed([40], 100))
        vs.stream(model, memory_budget=1 << 34)(**packed([40], 100))


def test_what_depends_on_values_cannot_be_planned():
    config = MixtralConfig(**sizes(32, 48, 1, 2, 2, 100), num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with pytest.raises(ValueError, match="MixtralDecoderLayer can't be planned: .*eager"):
        plan_memory(model, 100)
    vs.stream(model)(**packed([40], 100)).loss.backward()  # with the chunks of a model unknown
    with pytest.raises(ValueError, match="can't be planned"):
        vs.stream(model, memory_budget=1 << 34)(**packed([40], 100))


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
def attentions(draw: Any) -> AttentionShape:
    kv_heads = draw(st.integers(1, 8))
    head_dim = draw(st.sampled_from([8, 64, 128]))
    return AttentionShape(
        heads=kv_heads * draw(st.integers(1, 8)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        window=draw(st.sampled_from([-1, 100, 5000])),
        softcap=draw(st.sampled_from([0.0, 50.0])),
        dropout=draw(st.sampled_from([0.0, 0.1])),
    )


@st.composite
def layers(draw: Any, d: int, size: int) -> LayerShape:
    """A layer whose trace is like a real one's: sums first, then gradients while activations go."""
    attention = draw(attentions())
    elements = d * draw(st.integers(8, 8192)) * draw(st.integers(0, 1))
    width, kv = draw(st.integers(1, 40)) * d * size, attention.kv_width * size
    own = elements * 4

    def backward(sums: int, row: float, chunk: float) -> tuple[Line, ...]:
        return (
            Line(BACKWARD, sums, row, chunk),
            Line(BACKWARD, sums + elements * size, row, chunk / 2),
            Line(ATTENTION_BACKWARD, sums + elements * size, row, chunk / 3),
        )

    flow = d * size + 3 * kv
    trace = Trace(
        forward=(Line(FORWARD, 0, kv, width / 3), Line(ATTENTION, 0, kv, width / 4)),
        single=backward(own // 2, flow + width, 0)[:1],
        later=backward(own, flow, width),
        attention=attention,
    )
    trained = Size(elements, elements * size)
    return LayerShape(trained, trace, (Product(d, 64, size, elements > 0),))


@st.composite
def shapes(draw: Any) -> ModelShape:
    dtype = draw(st.sampled_from(list(ITEMSIZE)))
    size = ITEMSIZE[dtype]
    d, vocab = draw(st.integers(8, 4096)), draw(st.integers(2, 10**5))
    stack = tuple(draw(st.lists(layers(d, size), min_size=1, max_size=4)))
    whole = Size(vocab * d, vocab * d * size)
    embedding, projection = (draw(st.sampled_from([NOTHING, whole])) for _ in range(2))
    norm = LayerShape(
        Size(d, d * size),
        Trace((), (Line(BACKWARD, 0, 6 * d, 0),), (Line(BACKWARD, 8 * d, d, 5 * d),)),
    )
    head = HeadShape(
        vocab,
        projection,
        tied=False,
        softcap=draw(st.booleans()),
        rank=draw(st.sampled_from([0, 8])),
    )
    with_head = draw(st.booleans())
    parts = [embedding, norm.trained, *(layer.trained for layer in stack)]
    parts += [projection] if with_head else []
    trained = Size(*(sum(column) for column in zip(*parts, strict=True)))
    return ModelShape(
        model_type="llama",
        dtype=dtype,
        hidden=d,
        max_length=8192,
        weights=Size(trained.elements + 10**6, trained.bytes + 10**6 * size),
        trained=trained,
        largest=max(parts, key=lambda part: part.bytes),
        embedding=embedding,
        layers=stack,
        norm=norm,
        head=head if with_head else None,
        row_bytes=float(draw(st.integers(8, 4096))),
        input_gradient=draw(st.booleans()),
    )


@st.composite
def jobs(draw: Any) -> Job:
    tokens = draw(st.integers(1, 100_000))
    longest = draw(st.just(tokens) | st.integers(1, tokens))
    threads, accumulate = draw(st.sampled_from([1, 16])), draw(st.booleans())
    device = draw(st.sampled_from([CPU, GPUS["h100"], GPUS["3090"]]))
    return Job(
        draw(shapes()),
        Step(tokens, longest, threads, accumulate, 0, device),
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
        most = max(LARGEST_CHUNK, 2 * knee_of(job.shape, job.step))
        assert SMALLEST_CHUNK <= plan.chunk_size <= most
    else:
        assert plan.chunk_size == job.chunk_size
    if job.head_chunk_size != "auto":
        assert plan.head_chunk_size == job.head_chunk_size
    elif not job.step.device.cuda:
        assert 64 <= plan.head_chunk_size <= 512
    assert sum(plan.parts.values()) == plan.peak_bytes
    assert plan.step_bytes <= plan.peak_bytes
    assert MemoryPlan(**json.loads(json.dumps(plan.as_json()))) == plan
    assert bool(plan.below_knee) == (plan.chunk_size < min(plan.knee, plan.tokens))
    assert plan.below_knee in plan.reason or not plan.fits
    if job.budget is None:
        assert plan.fits and plan.max_tokens is None
        return
    assert plan.fits == (plan.peak_bytes <= job.budget)
    assert plan.fits == (job.step.tokens <= plan.max_tokens) or job.step.longest < job.step.tokens
    assert not choose(job.at(plan.max_tokens + 1)).fits
    if plan.max_tokens:
        assert choose(job.at(plan.max_tokens)).fits
