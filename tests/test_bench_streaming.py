"""Cases of training steps over long rows: what they hold, that the ways beside ours do what they
say, and the GPU's cases at a tiny size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench import report
from bench.case import OURS
from bench.cases import all_cases
from bench.cases import streaming_baselines as ways
from bench.cases import streaming_models as models
from bench.runner import CheckFailed, _check
from torch import nn

import varstream as vs
from varstream.testing import relative_error

pytest.importorskip("transformers")
CPU = torch.device("cpu")
LENGTHS = (7, 1, 20, 17)
NEEDS_PEFT = pytest.mark.skipif(
    models.peers.module("peft")("cpu") is not None, reason="PEFT is not installed"
)


def tiny(name):
    return {**models.scaled(name), **models.TINY, "rank": 0}


def model_and_row(name="qwen3_8b", lengths=LENGTHS, dtype=torch.float32):
    sizes = tiny(name)
    model = ways.language_model(models._config(name, sizes), dtype, CPU, 0)
    return model, ways.Row.draw(lengths, sizes["classes"], CPU, 0)


def worst(found, expected):
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


# --- what the cases hold --------------------------------------------------------------------------


def test_the_grid_and_its_bars():
    cases = {case.name: case for case in models.CASES}
    shapes = ("qwen3_4b", "qwen3_8b", "llama_8b")
    modes = [f"{s}_{m}_{d}" for s in shapes for m in ("full", "lora") for d in models.DOCUMENTS]
    on_cpu = {f"stream/{m}_{n}k" for m in modes for n in (4, 8, 16, 32)}
    assert {n for n, c in cases.items() if c.devices == ("cpu",)} == on_cpu
    barred = {n: {b.metric: b.limit for b in c.bars} for n, c in cases.items() if c.bars}
    assert set(barred) == {f"stream/{m}_16k" for m in modes}
    for bars in barred.values():
        assert bars == {"memory/checkpointing": 1 / 6, "memory/tiled": 0.5, "time/tiled": 1.0}
    on_gpu = {n for n, c in cases.items() if c.devices == ("cuda",)}
    lengths = {n.rpartition("_")[2] for n in on_gpu}
    assert len(on_gpu | on_cpu) == len(cases) and lengths == {"8k", "16k", "32k", "64k", "128k"}
    assert cases.keys() <= all_cases().keys()


@pytest.mark.parametrize("name", models.REAL)
def test_a_scaled_shape_keeps_its_ratios(name):
    """Of widths and classes to the hidden width, and of queries to key heads."""
    real, small = {**models.REAL[name], **models.HEADS}, models.scaled(name)
    assert small["width"] in (512, 640) and small["layers"] == 4
    for key in ("inner", "classes"):
        assert small[key] * real["width"] == real[key] * small["width"]
    for heads in ("heads", "kv_heads"):
        wide, narrow = (s[heads] * s["head_dim"] / s["width"] for s in (real, small))
        assert wide == narrow
    assert small["tied"] == real["tied"] == (name == "qwen3_4b")


def test_a_model_has_the_sizes_of_its_case():
    model, _ = model_and_row("qwen3_4b")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert len(model.model.layers) == 2 and model.lm_head.weight is model.model.embed_tokens.weight
    assert attention.q_proj.weight.shape == (4 * 8, 32) and attention.k_proj.weight.shape[0] == 16
    assert hasattr(attention, "q_norm")
    assert mlp.up_proj.weight.shape == (48, 32) and model.lm_head.weight.shape == (97, 32)
    llama, _ = model_and_row("llama_8b", dtype=torch.bfloat16)
    assert type(llama).__name__ == "LlamaForCausalLM" and llama.dtype == torch.bfloat16
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight


def test_all_logits_must_fit():
    """The largest logits here, four times, in half of a machine's memory."""
    big = all_cases()["stream/qwen3_4b_full_packed_32k"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.peers._machine_bytes", lambda: 32 << 30)
        assert "needs 19 GiB" in big.availability("cpu")["checkpointing"]
        assert big.availability("cpu")["tiled"] is None
        patch.setattr("bench.peers._machine_bytes", lambda: 64 << 30)
        assert big.availability("cpu")["checkpointing"] is None


def test_a_row_of_documents():
    row = ways.Row.draw((3, 1, 2), 97, CPU, 0)
    assert row.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert (row.labels == -100).tolist() == [[True, False, False, True, True, False]]
    assert row.cu_seqlens.tolist() == [0, 3, 4, 6] and row.longest == 3
    assert row.documents and not ways.Row.draw((6,), 97, CPU, 0).documents


# --- the ways -------------------------------------------------------------------------------------


def test_the_models_of_all_ways_hold_the_same_tensors():
    model, _ = model_and_row()
    other = ways.sharing(model)
    assert other.model.layers[0] is not model.model.layers[0]
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), other.buffers(), strict=True))
    other.set_attn_implementation("eager")
    assert model.config._attn_implementation != "eager"


def test_a_step_leaves_no_gradients():
    """Also one that fails in its backward."""
    model, row = model_and_row()
    found = ways.tiled(model, 16, 16)(row)
    assert len(found) == 1 + len(list(model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ways.tiled(model, 16, 16)(row)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("tile", [5, 16, 45, 64])
def test_a_tiled_mlp_is_exact_and_sees_a_tile_at_a_time(tile):
    model, _ = model_and_row(dtype=torch.float64)
    mlp, seen = model.model.layers[0].mlp, []
    mlp.act_fn = nn.SiLU()
    mlp.act_fn.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    x = torch.randn(1, 45, 32, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    leaves = [x, *mlp.parameters()]
    plain, parts = mlp(x), ways._tiled_mlp(mlp, tile, x)
    expected = [plain, *torch.autograd.grad(plain, leaves, dy)]
    assert worst([parts, *torch.autograd.grad(parts, leaves, dy)], expected) < 1e-14
    sizes = [min(tile, 45 - at) for at in range(0, 45, tile)]
    assert seen == [45, *sizes, *sizes]  # the forward and once more in the backward


@pytest.mark.parametrize("lengths", [LENGTHS, (45,)], ids=["packed", "single"])
def test_documents_stay_apart_in_every_way(lengths):
    """Each way's gradients are the mean over all documents' tokens, run one by one."""
    model, row = model_and_row("llama_8b", lengths)
    runs = {
        "ours": ways.streamed(model, 16, 16),
        "checkpointing": ways.checkpointing(model, len(lengths) > 1),
        "tiled": ways.tiled(model, 16, 16),
    }
    losses = []
    for ids in row.ids[0].split(lengths):
        logits = model(ids[None]).logits[0, :-1]
        losses.append(nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
    loss = torch.stack(losses).sum() / (row.labels != -100).sum()
    expected = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    for name, way in runs.items():
        assert worst(way(row), expected) < 1e-5, name


def test_an_offloaded_step_keeps_the_layers_inputs_in_host_memory(monkeypatch):
    model, row = model_and_row()
    moved, real = [], torch.autograd.graph.save_on_cpu

    class Noted(real):
        def __init__(self, pin_memory):
            assert pin_memory is False  # pinned on CUDA only
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda t: moved.append(t) or pack(t)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Noted)
    expected = ways.tiled(model, 16, 16)(row)
    assert not moved
    inputs = []
    keep = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: inputs.append(args[0]) if hasattr(module, "self_attn") else None
    )
    with keep:
        found = ways.tiled(model, 16, 16, offload=True)(row)
    assert worst(found, expected) < 1e-6
    first_run = inputs[:2]  # of two layers; they run again in the backward
    assert all(any(x.data_ptr() == t.data_ptr() for t in moved) for x in first_run)
    assert sum(t.shape == (1, 45, 32) for t in moved) <= 5  # and the last norm's products


def test_torchs_varlen_operator_as_attention(monkeypatch):
    """Its kernel needs CUDA: here an operator of the same signature stands for it."""
    calls = []

    def stand_in(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert window_size == (-1, 0) and enable_gqa and scale == 8**-0.5  # causal
        calls.append((query.shape, key.shape))
        maxima = {"max_seqlen_q": max_q, "max_seqlen_k": max_k}
        return vs.varlen_attention(
            query, key, value, cu_q, cu_k, **maxima, causal=True, softmax_scale=scale
        )

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    model, row = model_and_row()
    expected = ways.tiled(model, 16, 16)(row)
    assert not calls
    monkeypatch.setattr(ways, "varlen", lambda device: ways.varlen_of_torch())
    assert worst(ways.tiled(model, 16, 16)(row), expected) < 1e-6
    assert calls and set(calls) == {((45, 4, 8), (45, 2, 8))}


# --- the GPU's cases ------------------------------------------------------------------------------

ON_GPU = {
    "full": "stream_gpu/qwen3_4b_full_packed_8k",
    "lora": "stream_gpu/llama_8b_lora_packed_8k",
    "single": "stream_gpu/qwen3_8b_lora_single_128k",
}


@NEEDS_PEFT
@pytest.mark.parametrize("name", ON_GPU.values(), ids=ON_GPU)
def test_a_case_of_the_gpu_is_right_at_its_small_shape(name, monkeypatch):
    """Every run, in float32; its memory isn't measured."""
    monkeypatch.setitem(models.DTYPE, "cuda", torch.float32)
    case = replace(all_cases()[name], memory=False)
    setup = case.build(case.sizes(quick=True), CPU, 0)
    assert {peer.name for peer in case.peers} | {OURS} == set(setup.runs)
    unavailable: dict[str, str] = {}
    checked = _check(case, setup, list(setup.runs), unavailable, CPU, lambda phase: None)
    assert not unavailable and max(checked.errors.values()) < 1e-4
    figures = setup.figures({OURS: 2 * 45 * 32 * 4 * 4}, checked.ours)
    documents = 1 if "single" in name else len(models.lengths.ragged(45, 0))
    assert figures == {"documents": documents, "layer_inputs_of_peak": 0.25}


def test_a_case_of_the_gpu_is_in_bfloat16():
    case = all_cases()[ON_GPU["full"]]
    setup = case.build(case.sizes(quick=True), CPU, 0)
    loss, *grads = setup.runs[OURS]()
    assert {g.dtype for g in grads} == {torch.bfloat16} and case.dtype == "bfloat16"
    assert worst([loss, *grads], setup.runs["tiled"]()) < case.tolerance


@NEEDS_PEFT
def test_adapters_are_all_that_is_trained():
    model, row = model_and_row()
    adapted = ways.with_adapters(model, 2, 0)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    gradients = ways.streamed(adapted, 16, 16)(row)[1:]
    assert len(gradients) == len(trained) and all(g.abs().max() > 0 for g in gradients)


def test_a_wrong_gradient_fails_a_case():
    """The comparison sees every parameter, the last norm's too."""
    case = all_cases()["stream/llama_8b_full_packed_4k"]
    setup = case.build(case.sizes(quick=True), CPU, 0)

    def off():
        found = setup.runs[OURS]()
        found[-2][3] *= 1.01
        return found

    wrong = models.Setup(runs={**setup.runs, OURS: off})
    with pytest.raises(CheckFailed, match="relative error"):
        _check(case, wrong, [OURS], {}, CPU, lambda phase: None)


def test_published_figures_stand_apart():
    """With their hardware, after everything that was measured."""
    page = report.markdown([])
    words = page[page.index("## Published by others, not measured here") :]
    assert "A800" in words and "arXiv 2506.03077" in words and "Other hardware" in words
    for line in (
        "| Qwen3-4B, backward | 18000 tokens | 14.7 s | 13.2 s | 0.898 |",
        "| Llama-3.1-8B, peak | 18000 tokens | 65.6 GB | 37.2 GB | 0.567 |",
        "| longest row | Qwen3-8B LoRA | 30.6 thousand tokens | 142.4 thousand tokens | 4.654 |",
    ):
        assert line in words.splitlines(), line
    assert words.count("\n## ") == 0
