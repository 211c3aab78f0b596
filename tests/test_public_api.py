"""Every public name on the CPU in float32, float64 and bfloat16: finite results and gradients, and
results that are those of float64 to the dtype's rounding.

Whether results are right is tested by topic; here are the names that would fail in some dtype only,
and those that nobody added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from encoder_models import FIRST_KEPT, batch, make
from models import VOCAB, make_model
from torch import Tensor

import varstream as vs
from varstream import batching, objectives, parallel
from varstream.integrations import byte_transformer, flash_attn, flash_attn_3, liger, trl
from varstream.integrations import transformers as hf

LENGTHS, N, D, V, HEADS = [3, 4], 7, 8, 11, 4
CU = torch.tensor([0, 3, 7], dtype=torch.int32)
TARGET = torch.arange(N) % V
MASK = torch.tensor([0, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
REF = -torch.linspace(0.5, 3.0, N, dtype=torch.float64)
SIGNS = torch.tensor([1.0, -0.5])
# Reached by what is called here, or tested where TRL may be imported.
NOT_CALLED = {
    "CrossEntropyMetrics",
    "MemoryPlan",
    "Packed",
    "TokenStats",
    "UnsupportedModelError",
    "__version__",
    "nn",
    "objectives",
    "batching.Balance",
    "batching.Bins",
    "batching.Packing",
    "batching.Prefill",
    "batching.PrefillRow",
    "transformers.RowMask",
    "trl.UnsupportedTRLError",
    "trl.install",
    "trl.installed",
    "trl.uninstall",
}


class Leaves:
    """Makes tensors that want a gradient, the same values in every dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.made: list[Tensor] = []

    def __call__(self, *shape: int) -> Tensor:
        values = torch.randn(shape, dtype=torch.float64) / 2
        self.made.append(values.to(self.dtype).requires_grad_())
        return self.made[-1]

    def model(self, model: torch.nn.Module) -> Any:
        model = model.to(self.dtype)
        self.made += [p for p in model.parameters() if p.requires_grad]
        return model


Case = Callable[[Leaves], Any]
CASES: dict[str, Case] = {}


def case(*names: str) -> Callable[[Case], Case]:
    def register(run: Case) -> Case:
        CASES[" ".join(names)] = run
        return run

    return register


def qkv(new: Leaves, *rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return new(*rows, HEADS, D), new(*rows, 2, D), new(*rows, 2, D)


# --- packed batches, attention --------------------------------------------------------------------


@case("pack", "unpack", "cu_seqlens")
def _(new):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    packed = vs.pack(new(2, 4, D), mask)
    assert torch.equal(packed.cu_seqlens, vs.cu_seqlens(LENGTHS))
    return vs.unpack(packed), vs.unpack(packed, packed.values * 2, fill=1.0)


@case("varlen_attention", "merge_attention")
def _(new):
    q, k, v = qkv(new, N)
    options = {"causal": True, "softcap": 5.0, "return_lse": True}
    a = vs.varlen_attention(q, k, v, CU, sinks=new(HEADS), window=(2, 0), **options)
    b = vs.varlen_attention(q, k, v, CU, alibi_slopes=torch.rand(HEADS), **options)
    return *a, *vs.merge_attention([a[0], b[0]], [a[1], b[1]])


@case("varlen_attention_backward")
def _(new):
    with torch.no_grad():
        q, k, v = (t.detach() for t in qkv(new, N))
        new.made.clear()
        out, lse = vs.varlen_attention(q, k, v, CU, causal=True, return_lse=True)
        acc = torch.float64 if new.dtype == torch.float64 else torch.float32
        dk, dv = torch.zeros_like(k, dtype=acc), torch.zeros_like(v, dtype=acc)
        dq = vs.varlen_attention_backward(out, q, k, v, out, lse, CU, causal=True, dk=dk, dv=dv)
    return dq, dk, dv


# --- head, objectives -----------------------------------------------------------------------------


@case("linear_cross_entropy", "nn.LinearCrossEntropy", "nn.LinearCrossEntropyLoss")
def _(new):
    x, weight, bias = new(N, D), new(V, D), new(V)
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}
    loss, metrics = vs.linear_cross_entropy(
        x, weight, TARGET, linear_bias=bias, return_metrics=True, **options
    )
    module = new.model(vs.nn.LinearCrossEntropyLoss(D, V, bias=True, dtype=torch.float64))
    assert metrics.argmax.shape == (N,)
    return loss, vs.nn.LinearCrossEntropy(**options)(x, weight, TARGET), module(x, TARGET)


@case("token_logprobs", "nn.TokenLogProbs")
def _(new):
    x, weight = new(N, D), new(V, D)
    pair = vs.token_logprobs(x, weight, TARGET, temperature=0.7, return_entropy=True)
    return *pair, vs.nn.TokenLogProbs(softcap=5.0)(x, weight, TARGET)


POLICY = {"advantages": SIGNS, "old_logp": REF, "ref_logp": REF, "beta": 0.1}


@case("parallel.linear_cross_entropy", "parallel.token_logprobs")
def _(new):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x, weight, bias = new(N, D), new(V, D), new(V)
        options = {"linear_bias": bias, "softcap": 5.0}
        loss = parallel.linear_cross_entropy(x, weight, TARGET, label_smoothing=0.1, **options)
        pair = parallel.token_logprobs(x, weight, TARGET, return_entropy=True, **options)
        # The backward of log-probabilities communicates: here, while there is a group.
        sum(part.double().square().sum() for part in pair).backward()
        return loss, *(part.detach() for part in pair)
    finally:
        dist.destroy_process_group()


OBJECTIVES: dict[str, dict[str, Any] | None] = {
    "sft": None,
    "dft": None,
    "dpo": {"ref_logp": REF},
    "ipo": {"ref_logp": REF},
    "simpo": {},
    "cpo": {},
    "orpo": {},
    "kto": {"ref_logp": REF, "labels": torch.tensor([True, False]), "kl": 0.1},
    "grpo": POLICY,
    "dapo": POLICY,
    "dr_grpo": POLICY | {"max_length": 5},
    "cispo": POLICY,
    "gspo": POLICY,
}


@case(*(f"objectives.{name}" for name in OBJECTIVES))
def _(new):
    logp = new(N)
    for name, options in OBJECTIVES.items():
        function = getattr(objectives, name)
        near = logp - 1.0 - logp.detach() + REF.to(logp)  # log-probabilities, near the reference's
        yield function(near, MASK) if options is None else function(near, MASK, CU, **options)


@case("objectives.distillation", "objectives.kl", "objectives.jsd")
def _(new):
    student, teacher = (new(N, D), new(V, D)), (torch.randn(N, 5), torch.randn(V, 5))
    operands = *student, *(t.to(new.dtype) for t in teacher), MASK
    yield objectives.distillation(*operands, beta=0.3, temperature=2.0)
    yield objectives.kl(*operands, reverse=True)
    yield objectives.jsd(*operands)


@case("objectives.contrastive", "objectives.cached_embeddings")
def _(new):
    weight, x = new(D, V), torch.randn(2 * N, V, dtype=torch.float64).to(new.dtype)
    rows = objectives.cached_embeddings(lambda part: part @ weight.T, x.split(4), params=[weight])
    yield objectives.contrastive(rows[:N], rows[N:], temperature=0.5)
    yield objectives.contrastive(new(N, D), rows[:N], temperature=0.5, symmetric=True)


# --- streaming, planner, encoder ------------------------------------------------------------------


@case("stream", "unstream", "plan_memory")
def _(new):
    model = make_model("qwen3")
    ids = torch.randint(VOCAB, (2, 9))
    vs.stream(new.model(model), chunk_size=4, head_chunk_size=5)
    assert vs.plan_memory(model, 18).dtype == str(new.dtype).removeprefix("torch.")
    yield model(input_ids=ids, labels=ids).loss
    vs.unstream(model)
    yield model(input_ids=ids, labels=ids).loss


@case("stream_layer")
def _(new):
    wk, wq = new(16, D), new(HEADS * D, D)

    def kv(x, pos):
        k = (x @ wk.T).unflatten(1, (2, D))
        return k, k.tanh()

    def rest(x, pos, attend):
        return x + attend((x @ wq.T).unflatten(1, (HEADS, D))).sum(1)

    return vs.stream_layer(kv, rest, new(N, D), CU, params=(wk, wq), chunk_size=3, window=(2, 0))


@case("padding_free", "restore_padding")
def _(new):
    model, inputs = new.model(make("BertForMaskedLM")), batch(FIRST_KEPT)
    labels = inputs["input_ids"].masked_fill(FIRST_KEPT == 0, -100)
    yield vs.padding_free(model)(**inputs, labels=labels).loss
    yield vs.restore_padding(model)(**inputs, labels=labels).loss


@case("pooling.cls_pool", "pooling.max_pool", "pooling.mean_pool")
def _(new):
    packed = vs.pack(new(2, 4, D), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    return tuple(getattr(vs.encoder.pooling, name)(packed) for name in vs.encoder.pooling.__all__)


@case("ops.bias_residual_layer_norm", "ops.linear_bias_gelu")
def _(new):
    x = new(N, D)
    h = vs.ops.bias_residual_layer_norm(x, new(D), new(N, D), new(D), new(D), 1e-12)
    return h, vs.ops.linear_bias_gelu(h, new(V, D), new(V)), vs.ops.linear_bias_gelu(h, new(V, D))


@case("ops.relative_attention")
def _(new):
    q, k, v = (new(N, HEADS, D) for _ in range(3))
    wide = {name: new(3, HEADS, D) for name in ("key_table", "query_table")}
    buckets = torch.arange(7) // 3
    return vs.ops.relative_attention(q, k, v, CU, buckets, table=new(3, HEADS), **wide)


# --- batching -------------------------------------------------------------------------------------


@case(
    *(
        f"batching.{name}"
        for name in (
            "best_fit_decreasing",
            "first_fit_decreasing",
            "lpfhp",
            "next_fit",
            "balance",
            "attention_cost",
            "PackedCollator",
            "prefill",
        )
    )
)
def _(new):
    for packer in (
        batching.best_fit_decreasing,
        batching.first_fit_decreasing,
        batching.lpfhp,
        batching.next_fit,
    ):
        yield torch.tensor(packer(LENGTHS, 7).fill)
    cost = batching.attention_cost(LENGTHS, hidden=D)
    yield torch.from_numpy(batching.balance(LENGTHS, 2, cost, "karmarkar_karp").loads)
    advantages = [torch.linspace(0, 1, n, dtype=torch.float64).numpy() for n in LENGTHS]
    examples = [
        {"input_ids": list(range(n)), "advantages": a}
        for n, a in zip(LENGTHS, advantages, strict=True)
    ]
    yield batching.PackedCollator(extra=["advantages"])(examples)["advantages"]
    prompts = batching.prefill(lengths=LENGTHS)
    rows = new(N, D)
    yield prompts.last_tokens(rows)
    yield prompts.unpack(rows)


# --- faces ----------------------------------------------------------------------------------------


@case("flash_attn.flash_attn_func", "flash_attn_3.flash_attn_func")
def _(new):
    for face in (flash_attn, flash_attn_3):
        yield from face.flash_attn_func(
            *qkv(new, 2, 3), causal=True, softcap=5.0, return_attn_probs=True
        )[:2]


@case("flash_attn.flash_attn_varlen_func", "flash_attn_3.flash_attn_varlen_func")
def _(new):
    for face in (flash_attn, flash_attn_3):
        yield from face.flash_attn_varlen_func(
            *qkv(new, N), CU, CU, 4, 4, window_size=(1, 0), return_attn_probs=True
        )[:2]


@case(
    "flash_attn.flash_attn_qkvpacked_func",
    "flash_attn.flash_attn_kvpacked_func",
    "flash_attn.flash_attn_varlen_qkvpacked_func",
    "flash_attn.flash_attn_varlen_kvpacked_func",
)
def _(new):
    slopes = torch.rand(HEADS)
    yield flash_attn.flash_attn_qkvpacked_func(new(2, 3, 3, HEADS, D), alibi_slopes=slopes)
    yield flash_attn.flash_attn_kvpacked_func(new(2, 3, HEADS, D), new(2, 4, 2, 2, D))
    yield flash_attn.flash_attn_varlen_qkvpacked_func(new(N, 3, HEADS, D), CU, 4)
    yield flash_attn.flash_attn_varlen_kvpacked_func(
        new(N, HEADS, D), new(N, 2, 2, D), CU, CU, 4, 4
    )


@case(
    *(
        f"flash_attn.{name}"
        for name in ("unpad_input", "pad_input", "index_first_axis", "index_put_first_axis")
    )
)
def _(new):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    x = new(2, 4, D)
    rows, indices, *_ = flash_attn.unpad_input(x, mask)
    yield flash_attn.pad_input(rows, indices, 2, 4)
    yield flash_attn.index_first_axis(x.flatten(0, 1), indices)
    yield flash_attn.index_put_first_axis(rows, indices, 9)


@case(
    "transformers.varstream_attention",
    "transformers.varstream_mask",
    "transformers.fuse_head",
    "transformers.unfuse_head",
)
def _(new):
    model = make_model("qwen3")
    model.set_attn_implementation("varstream")
    hf.fuse_head(new.model(model))
    ids, mask = torch.randint(VOCAB, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    output = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    yield output.loss
    yield output.logits[mask != 0]
    yield hf.unfuse_head(model)(input_ids=ids, attention_mask=mask).logits[mask != 0]
    rows = hf.varstream_mask(2, 3, 3)
    q, k, v = (t.transpose(1, 2) for t in qkv(new, 2, 3))
    yield hf.varstream_attention(model.model.layers[0].self_attn, q, k, v, rows)[0]


@case(
    *(
        f"liger.{name}"
        for name in (
            "LigerForCausalLMLoss",
            "LigerFusedLinearCrossEntropyLoss",
            "liger_fused_linear_cross_entropy",
            "CrossEntropyOutput",
        )
    )
)
def _(new):
    x, weight = new(N, D), new(V, D)
    result = liger.liger_fused_linear_cross_entropy(
        x, weight, TARGET, lse_square_scale=1e-2, return_z_loss=True, use_token_scaling=True
    )
    assert isinstance(result, liger.CrossEntropyOutput)
    yield result.loss
    yield liger.LigerFusedLinearCrossEntropyLoss(softcap=5.0)(weight, x, TARGET)
    yield liger.LigerForCausalLMLoss(x[None], weight, TARGET[None], D, num_items_in_batch=3)


@case("byte_transformer.bert_transformer", "byte_transformer.BertTransformer")
def _(new):
    h, mask = HEADS * D, torch.tensor([[1, 1, 0], [1, 1, 1]])[:, None].expand(-1, 3, -1)
    shapes = (h, 3 * h), (3 * h,), (h, h), (h,), (h,), (h,), (h, V), (V,), (V, h), (h,), (h,), (h,)
    weights = [new(*shape) for shape in shapes]
    yield byte_transformer.bert_transformer(HEADS, D, *weights, new(2, 3, h), mask)
    layer = byte_transformer.BertTransformer(HEADS, D, *(w.detach() for w in weights))
    yield new.model(layer)(new(2, 3, h), mask)


@case("trl.LogProbs")
def _(new):
    return trl.LogProbs.apply(new(N, D), new(V, D), new(V), TARGET, 0.7, 64)[:2]


# --- the tests ------------------------------------------------------------------------------------


def results(run: Case, dtype: torch.dtype) -> list[Tensor]:
    """What a case returns, after its backward."""
    torch.manual_seed(0)
    new = Leaves(dtype)
    found = run(new)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    assert outputs and all(output.isfinite().all() for output in outputs)
    roots = [output.double().square().sum() for output in outputs if output.requires_grad]
    if new.made:
        torch.stack(roots).sum().backward()
    for leaf in new.made:
        assert leaf.grad is not None and leaf.grad.dtype == dtype and leaf.grad.isfinite().all()
    assert not new.made or any(leaf.grad.any() for leaf in new.made)
    return [output.detach().double() for output in outputs]


TOLERANCE = {torch.float64: 0.0, torch.float32: 1e-4, torch.bfloat16: 0.1}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("names", CASES)
def test_in_every_dtype(names, dtype):
    got, want = results(CASES[names], dtype), results(CASES[names], torch.float64)
    for ours, exact in zip(got, want, strict=True):
        assert (ours - exact).norm() <= TOLERANCE[dtype] * (exact.norm() + 1e-3)


def test_no_public_name_is_missing():
    spaces = {
        "": vs.__all__,
        "nn.": vs.nn.__all__,
        "ops.": vs.ops.__all__,
        "objectives.": objectives.__all__,
        "batching.": batching.__all__,
        "parallel.": parallel.__all__,
        "pooling.": vs.encoder.pooling.__all__,
        "flash_attn.": flash_attn.__all__,
        "flash_attn_3.": flash_attn_3.__all__,
        "transformers.": hf.__all__,
    }
    public = {space + name for space, names in spaces.items() for name in names}
    for module in (byte_transformer, liger, trl):
        own = [
            n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__
        ]
        space = module.__name__.rpartition(".")[2]
        public |= {f"{space}.{name}" for name in own if not name.startswith("_")}
    called = {name for names in CASES for name in names.split()}
    assert called | NOT_CALLED == public and not called & NOT_CALLED
