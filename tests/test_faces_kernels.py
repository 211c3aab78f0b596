"""The faces, padding-free encoders and the demo through the CUDA kernels, emulated in bfloat16."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from attention_models import DECODERS, ENCODERS, build, padded
from cases import TILE_LENGTH_PAIRS, cu_seqlens
from encoder_models import FIRST_KEPT, MASK, batch, make
from kernels_only import kernels_only
from torch._subclasses.fake_tensor import FakeTensorMode

import varstream as vs
from varstream.encoder.layer import Rows
from varstream.integrations import flash_attn, flash_attn_3
from varstream.integrations.transformers import varstream_attention
from varstream.integrations.transformers.masks import Pattern, rows_of_padding
from varstream.ops import attention_call
from varstream.reference.philox import keep_scale
from varstream.testing import assert_error_ratio, dense_attention

HEADS, KV_HEADS, DIM = 4, 2, 16


@pytest.fixture
def operators():
    with kernels_only() as operators:
        yield operators


# --- FlashAttention -------------------------------------------------------------------------------

CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "softcap": {"softcap": 1.0, "causal": True},
    "alibi": {"alibi_slopes": torch.linspace(0.1, 1.0, HEADS)},
    "dropout": {"dropout_p": 0.3, "causal": True},
}


def dense(tensors, cu, case, keep):
    renamed = {"window": case["window_size"]} if "window_size" in case else {}
    taken = {"causal", "softcap", "alibi_slopes"} & case.keys()
    rest = {name: case[name] for name in taken}
    return dense_attention(*tensors, *cu, keep=keep, **renamed, **rest)[0]


def assert_face(operators, face, tensors, cu, case, keep=None):
    """Output and gradients of ``face(q, k, v)`` against dense attention in bfloat16 and float64."""
    leaves = [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out = face(*leaves)
    forward = operators.instruction_count("mma")
    plain, exact = (dense(t, cu, case, keep) for t in (leaves, wide))
    dout = torch.randn(exact.shape).bfloat16()
    results = []
    for result, inputs in ((out, leaves), (plain, leaves), (exact, wide)):
        grads = torch.autograd.grad(result, inputs, dout.to(result.dtype).view_as(result))
        results.append([result.view_as(exact), *grads])
    assert operators.instruction_count("mma") > 2 * forward > 0
    gradient = 3.0 if "softcap" in case else 2.0
    for name, *values in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_error_ratio(*values, 2.0 if name == "out" else gradient, name)


def packed(lq, lk, layout="compact"):
    """q, k, v (n, heads, DIM) in bfloat16; "strided": made as (n, DIM, heads)."""
    made = []
    for n, heads in ((sum(lq), HEADS), (sum(lk), KV_HEADS), (sum(lk), KV_HEADS)):
        if layout == "strided":
            made.append(torch.randn(n, DIM, heads).bfloat16().transpose(1, 2))
        elif layout == "odd_rows":  # rows of 4 values more than a whole number of 16-byte words
            rows = torch.randn(n, heads * DIM + 4).bfloat16()[:, 4:]
            made.append(rows.unflatten(1, (heads, DIM)))
        else:
            made.append(torch.randn(n, heads, DIM).bfloat16())
    return made


@pytest.mark.emulated
@pytest.mark.parametrize("pair", ["prefix", "more_queries"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_flash_attn_varlen(operators, case, pair):
    lq, lk = TILE_LENGTH_PAIRS[pair]
    cu, keep = (cu_seqlens(lq), cu_seqlens(lk)), None
    tensors = packed(lq, lk)
    if p := case.get("dropout_p"):
        torch.manual_seed(3)  # what the face draws from it is the dropout's state
        state = torch.randint(2**62, (2,))
        keep = [
            keep_scale(state, p, b, torch.arange(HEADS), torch.arange(n) + m - n, torch.arange(m))
            if n and m
            else torch.ones(HEADS, n, m)
            for b, (n, m) in enumerate(zip(lq, lk, strict=True))
        ]

    def face(q, k, v):
        torch.manual_seed(3)
        return flash_attn.flash_attn_varlen_func(q, k, v, *cu, max(lq), max(lk), **case)

    assert_face(operators, face, tensors, cu, case, keep)


@pytest.mark.emulated
@pytest.mark.parametrize("layout", ["strided", "odd_rows"])
@pytest.mark.parametrize("version", [2, 3])
def test_faces_take_any_strides(operators, version, layout):
    """As FlashAttention does, where varlen_attention refuses by name."""
    lq, lk = TILE_LENGTH_PAIRS["prefix"]
    cu, tensors = (cu_seqlens(lq), cu_seqlens(lk)), packed(lq, lk, layout)
    face = flash_attn if version == 2 else flash_attn_3

    def attend(*leaves):
        views = [m.copy_(leaf) for m, leaf in zip(packed(lq, lk, layout), leaves, strict=True)]
        assert views[0].stride() == tensors[0].stride() != leaves[0].stride()
        with pytest.raises(RuntimeError, match="q must .*contiguous"):
            vs.varlen_attention(*views, *cu)
        operators.clear_instruction_counts()
        return face.flash_attn_varlen_func(*views, *cu, max(lq), max(lk), causal=True)

    assert_face(operators, attend, tensors, cu, {"causal": True})


@pytest.mark.emulated
@pytest.mark.parametrize("version", [2, 3])
def test_flash_attn_of_one_length(operators, version):
    """Cut out of a fused projection (B, S, Hq + 2 Hkv, D)."""
    rows, count = 37, 3
    cu = (cu_seqlens([rows] * count),) * 2
    face = flash_attn if version == 2 else flash_attn_3

    def attend(*leaves):
        heads = torch.cat(leaves, 1).unflatten(0, (count, rows)).split([HEADS, 2, 2], 2)
        assert not heads[0].is_contiguous()
        return face.flash_attn_func(*heads, causal=True)

    tensors = packed([rows] * count, [rows] * count)
    assert_face(operators, attend, tensors, cu, {"causal": True})


@pytest.mark.emulated
def test_qkvpacked(operators):
    lengths = [70, 1, 20]
    cu = cu_seqlens(lengths)

    def attend(q, k, v):
        qkv = torch.stack([q, k, v], 1)
        return flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 70, causal=True)

    tensors = [torch.randn(91, HEADS, DIM).bfloat16() for _ in range(3)]
    assert_face(operators, attend, tensors, (cu, cu), {"causal": True})


# --- transformers ---------------------------------------------------------------------------------


def assert_models(operators, ours, plain, exact, inputs, real, keep=lambda out: out[0], ratio=2.0):
    """Results at real positions and gradients, by the error-ratio rule."""
    results, weight = [], None
    operators.clear_instruction_counts()
    for model in (ours, plain, exact):
        out = keep(model(**inputs))[real]
        forward = operators.instruction_count("mma")
        weight = torch.randn(out.shape).bfloat16() if weight is None else weight
        (out * weight.to(out.dtype)).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((out, grads))
        if model is ours:
            assert operators.instruction_count("mma") > 2 * forward > 0
    assert_error_ratio(*(out for out, _ in results), 2.0)
    few = []
    for name, exact_grad in results[2][1].items():
        values = [grads[name] for _, grads in results]
        if name.endswith("self.key.bias"):
            continue  # zero in exact arithmetic
        if exact_grad.numel() < 64:  # few numbers are right by luck: judged together
            few.append([g.double() / exact_grad.norm() for g in values])
        else:
            assert_error_ratio(*values, ratio, name)
    if few:
        together = [torch.cat([g.flatten() for g in column]) for column in zip(*few, strict=True)]
        assert_error_ratio(*together, ratio, "sinks, biases and norms")


@pytest.mark.emulated
@pytest.mark.parametrize("kind", ["left", "right", "none"])
@pytest.mark.parametrize("name", ["llama", "llama_bidirectional", "qwen2", "gemma2", "gpt_oss"])
def test_decoders(operators, name, kind):
    """GQA; gemma2 with softcap, gpt_oss with sinks, both and qwen2 with windows."""
    inputs = padded(kind) | {"use_cache": False}
    models = [
        build(DECODERS[name], how, dtype=torch.bfloat16)
        for how in ("varstream", "oracle", "oracle")
    ]
    models[2].double()  # of rounded weights
    ratio = 3.0 if name == "gemma2" else 2.0
    assert_models(operators, *models, inputs, inputs["attention_mask"].bool(), ratio=ratio)


@pytest.mark.emulated
@pytest.mark.parametrize("rows", [1, 2])
def test_decoding_with_a_cache(operators, rows):
    """The cache's keys are (B, H, S, D): strided for one sequence, copied for more."""
    models = [
        build(DECODERS["llama"], how, dtype=torch.bfloat16)
        for how in ("varstream", "oracle", "oracle")
    ]
    models[2].double()
    ids = torch.randint(1, 61, (rows, 9))
    results = []
    with torch.no_grad():
        for model in models:
            step = model(input_ids=ids[:, :6], use_cache=True)
            logits = [step.logits]
            for i in range(6, 9):
                step = model(
                    input_ids=ids[:, i : i + 1],
                    past_key_values=step.past_key_values,
                    use_cache=True,
                )
                logits.append(step.logits)
            results.append(torch.cat(logits, 1))
    assert operators.instruction_count("mma") > 0
    assert_error_ratio(*results)


@pytest.mark.emulated
def test_strided_heads_of_one_sequence(operators):
    """(B, H, D, S) read as (B, H, S, D): with one sequence nothing copies it on the way."""
    module = torch.nn.Module()
    module.is_causal = True

    def attend(*leaves):
        views = [t.permute(1, 2, 0).contiguous().transpose(1, 2)[None] for t in leaves]
        assert views[0].stride(3) != 1
        return varstream_attention(module, *views, None)[0][0]

    cu = (cu_seqlens([37]),) * 2
    assert_face(operators, attend, packed([37], [37]), cu, {"causal": True})


@pytest.mark.emulated
def test_encoder_through_transformers(operators):
    inputs = padded("both")
    models = [
        build(ENCODERS["modernbert"], how, transformers_auto(), dtype=torch.bfloat16)
        for how in ("varstream", "oracle", "oracle")
    ]
    models[2].double()
    assert_models(operators, *models, inputs, inputs["attention_mask"].bool())


def transformers_auto():
    import transformers

    return transformers.AutoModel


# --- padding-free encoders ------------------------------------------------------------------------


@pytest.mark.emulated
@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
def test_padding_free(operators, name):
    pooler = {"pooler": False} if name == "BertModel" else {}
    plain = make(name, torch.bfloat16, **pooler)
    ours = vs.padding_free(copy.deepcopy(plain))
    exact = copy.deepcopy(plain).double()
    assert_models(operators, ours, plain, exact, batch(MASK, name), MASK.bool())


@pytest.mark.emulated
def test_padding_free_with_dropout(operators):
    model = vs.padding_free(make("BertModel", torch.bfloat16, attention_probs_dropout_prob=0.5))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        inputs = {name: t.clone() for name, t in DROPOUT_BATCH.items()}
        model.zero_grad()
        out = model(**inputs).last_hidden_state
        out.square().sum().backward()
        found.append((out, model.encoder.layer[0].attention.self.value.weight.grad.clone()))
    assert operators.instruction_count("mma") > 0
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert not torch.equal(found[0][0], found[2][0])


DROPOUT_BATCH = batch(FIRST_KEPT)


@pytest.mark.emulated
def test_padding_free_is_repeatable_where_torch_asks_for_it(operators, monkeypatch):
    """The flag must reach the backward's kernels, once a layer."""
    seen = []
    called = operators.varlen_attention_bwd

    def watched(*args):
        seen.append(args[7 + attention_call.Call._fields.index("deterministic")])
        return called(*args)

    monkeypatch.setattr(operators, "varlen_attention_bwd", watched)
    model = vs.padding_free(make("BertModel", torch.bfloat16, pooler=False))
    for asked in (False, True):
        torch.use_deterministic_algorithms(asked)
        model(**batch(MASK)).last_hidden_state.sum().backward()
    assert seen == [False] * 2 + [True] * 2


# --- the demo -------------------------------------------------------------------------------------


@pytest.mark.emulated
def test_demo(operators, tmp_path):
    """All of it as on a GPU: bfloat16 weights, the kernels for attention."""
    pytest.importorskip("matplotlib")
    from rich.console import Console

    from varstream.demo.progress import Report
    from varstream.demo.run import run
    from varstream.demo.settings import Settings
    from varstream.demo.store import Store

    data = tmp_path / "texts"
    data.mkdir()
    for i in range(8):
        (data / f"{i}.txt").write_text(" ".join(f"word{j % 17} is {j}" for j in range(2 + i * i)))
    settings = replace(
        Settings(data=data, out=tmp_path / "out").quick(),
        steps=4,
        max_length=96,
        row_tokens=128,
        compared_tokens=400,
        length_step=64,
        length_cap=128,
        dtype="bfloat16",
    )
    run(settings, Store(settings.out), Report(Console(quiet=True)))
    assert operators.instruction_count("mma") > 0
    training = json.loads((settings.out / "training.json").read_text())
    assert training["loss"][-1] < training["loss"][0] and training["model"].endswith(", bfloat16")
    results = json.loads((settings.out / "comparison.json").read_text())
    differences = {
        name: method["worst_gradient_difference"] for name, method in results["methods"].items()
    }
    plain = differences["padded"]
    assert 1e-4 < plain < 0.2  # bfloat16, not float32
    assert all(difference <= 2.0 * plain for difference in differences.values())
    assert results["varstream_float64_gradient_difference"] < 1e-10


def test_the_demos_dtype_follows_the_device():
    from varstream.demo.model import describe, make_model, weight_dtype
    from varstream.demo.settings import Settings

    tiny = Settings().quick()
    assert weight_dtype(tiny, torch.device("cuda")) == torch.bfloat16
    assert weight_dtype(tiny, torch.device("cpu")) == torch.float32
    assert describe(make_model(tiny, 64, torch.device("cpu"))).endswith(", float32")
    model = make_model(replace(tiny, dtype="bfloat16"), 64, torch.device("cpu"))
    assert describe(model).endswith(", bfloat16")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


# --- nothing is read on the host, and compiled calls stay whole -----------------------------------


def meta(*shape, dtype=torch.bfloat16):
    """A tensor without values: reading one is an error, as it would be a wait on CUDA."""
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("version", [2, 3])
def test_flash_attn_reads_no_value(version):
    q, k = meta(9, HEADS, DIM).requires_grad_(), meta(9, KV_HEADS, DIM)
    cu = meta(3, dtype=torch.int32)
    if version == 2:
        out = flash_attn.flash_attn_varlen_func(q, k, k, cu, cu, 5, 5, dropout_p=0.1, causal=True)
        out = out + flash_attn.flash_attn_func(q[None], k[None], k[None])[0]
    else:
        used = meta(2, dtype=torch.int32)
        out = flash_attn_3.flash_attn_varlen_func(q, k, k, cu, cu, 5, 5, used, used)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_transformers_attention_reads_no_value():
    """With a mask that was made before, as a model makes it once for all its layers."""
    rows = rows_of_padding(Pattern(True, (-1, 0)), 2, 5, 5, None, device="meta")
    rows = replace(rows, indices_q=meta(7, dtype=torch.int64), indices_k=meta(7, dtype=torch.int64))
    q = meta(2, HEADS, 5, DIM).requires_grad_()
    k = meta(2, KV_HEADS, 5, DIM)
    out, _ = varstream_attention(torch.nn.Module(), q, k, k, rows, dropout=0.1)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_an_encoder_layer_reads_no_value():
    model = vs.padding_free(make("BertModel", torch.bfloat16).to("meta"))
    x = meta(9, 24).requires_grad_()
    y = model.encoder.layer[0](x, rows=Rows(meta(3, dtype=torch.int32), 5))
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("face", [False, True], ids=["operator", "face"])
def test_calls_on_cuda_compile_whole(monkeypatch, face):
    """Fake CUDA tensors take Python's way of checking them; no device is needed for it."""
    monkeypatch.setattr(attention_call, "KERNELS_COMPILED", True)

    def step(q, k, cu):
        if face:
            return flash_attn.flash_attn_varlen_func(q, k, k, cu, cu, 5, 5, causal=True)
        return vs.varlen_attention(q, k, k, cu, max_seqlen_q=5, causal=True)

    with FakeTensorMode(), torch.no_grad():
        q = torch.empty(9, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(9, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
        cu = torch.empty(3, dtype=torch.int32, device="cuda")
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        assert compiled(q, k, cu).shape == q.shape
