"""Streamed Hugging Face models against the dense ones: losses and every gradient, in float64
twins."""

import copy

import pytest
import torch
import transformers
from cases import CHUNKS, DOCUMENTS
from models import FAMILIES, SIZES, VOCAB, loss_and_gradients, make_model, make_twin, packed_row

import varstream as vs
from varstream.testing import assert_exact, float64_twin, relative_error, worst_gradient
from varstream.testing.float64 import exact_routers

B, S = 4, 19


def compare(model, inputs, tolerance=1e-12, **options):
    """Stream a copy and compare loss and gradients with the dense model's.

    transformers sees packed documents in position_ids only while it has no cache.
    """
    streamed = vs.stream(copy.deepcopy(model), **options)
    with exact_routers(model):
        loss, grads = loss_and_gradients(model, **inputs, use_cache=False)
        got, got_grads = loss_and_gradients(streamed, **inputs)
    assert relative_error(got, loss) <= tolerance
    name, error = worst_gradient(got_grads.items(), grads)
    assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["packed", "padded"])
def test_families(family, form):
    if form == "packed":
        inputs = packed_row([n for n in DOCUMENTS if n])
    else:
        inputs = padded("right_padding")
    compare(make_twin(family), inputs, chunk_size=7, head_chunk_size=5)


PARTS = {
    "Nemotron": {"head_dim": 8},
    "DeepseekV2": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **{"kv_lora_rank": 16, "q_lora_rank": None, "num_key_value_heads": 4},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    },
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
}


@pytest.mark.parametrize("prefix", PARTS)
def test_parts_known_by_their_class_names(prefix):
    config = getattr(transformers, f"{prefix}Config")(**SIZES | PARTS[prefix])
    model = float64_twin(getattr(transformers, f"{prefix}ForCausalLM")(config))
    compare(model, padded("right_padding"), chunk_size=7)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_chunk_sizes(chunk_size):
    inputs = packed_row([n for n in DOCUMENTS if n])
    options = {"chunk_size": chunk_size, "head_chunk_size": chunk_size}
    compare(make_twin(), inputs, **options)


def padded(case):
    """Every mask of the field's list: what is trained, what is padding."""
    ids = torch.randint(VOCAB, (B, S))
    labels, mask = ids.clone(), torch.ones(B, S, dtype=torch.int64)
    if case == "all_labels":
        return {"input_ids": ids, "labels": labels}
    if case == "masked_prompt":
        labels[:, :8] = -100
    elif case == "multi_turn":
        labels[:, 2:6] = labels[:, 11:15] = -100
    elif case == "random_half":
        labels[torch.rand(B, S) < 0.5] = -100
    elif case == "last_four":
        labels[:, :-4] = -100
    elif case == "one_token":
        labels[:] = -100
        labels[1, 9] = 3
    elif case == "document_without_labels":
        labels[2] = -100
    elif case in ("right_padding", "padding_and_prompt"):
        for b, n in enumerate((19, 12, 1, 7)):
            mask[b, n:] = 0
        if case == "padding_and_prompt":
            labels[:, :4] = -100
    elif case == "left_padding":
        for b, n in enumerate((0, 3, 18, 7)):
            mask[b, :n] = 0
            labels[b, : n + 1] = -100  # dense models would train the first token from a padding row
    elif case == "holes":
        mask[0, 4:6] = mask[1, 0] = mask[3, 10:13] = 0
        labels[0, 4:7] = labels[1, :2] = labels[
            3, 10:14
        ] = -100  # nor does a gap predict what follows it
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


MASKS = [
    "all_labels",
    "masked_prompt",
    "multi_turn",
    "random_half",
    "last_four",
    "one_token",
    "document_without_labels",
    "right_padding",
    "padding_and_prompt",
    "left_padding",
    "holes",
]


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("chunk_size", [4, 16])
def test_masks(case, chunk_size):
    compare(make_twin("qwen3"), padded(case), chunk_size=chunk_size, head_chunk_size=chunk_size)


@pytest.mark.parametrize("case", ["all_labels", "left_padding"])
@pytest.mark.parametrize("count", [7, torch.tensor(13)])
def test_num_items_in_batch(case, count):
    inputs = padded(case) | {"num_items_in_batch": count}
    compare(make_twin(), inputs, chunk_size=5)


def test_stock_classes_are_exact_to_their_own_casts():
    inputs = packed_row([n for n in DOCUMENTS if n])
    compare(make_model().double(), inputs, tolerance=1e-6, chunk_size=7)


@pytest.mark.parametrize("form", ["position_ids", "cu_seq_lens", "both"])
def test_packed_equals_separate_documents(form):
    model = make_twin("qwen3")
    lengths = [n for n in DOCUMENTS if n]
    inputs = packed_row(lengths)
    count = int((inputs["labels"] != -100).sum())
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    loss = torch.zeros((), dtype=torch.float64)
    begin = 0
    for n in lengths:
        part = {k: v[:, begin : begin + n] for k, v in inputs.items() if k != "position_ids"}
        begin += n
        if n == 1:
            continue  # a single token predicts nothing
        one, grads = loss_and_gradients(model, **part, num_items_in_batch=count)
        loss += one
        for name, grad in grads.items():
            total[name] += grad
    if form != "position_ids":
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        inputs |= {
            "cu_seq_lens_q": cu,
            "cu_seq_lens_k": cu,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
        if form == "cu_seq_lens":
            del inputs["position_ids"]
    vs.stream(model, chunk_size=7)
    got, grads = loss_and_gradients(model, **inputs)
    assert_exact(got, loss)
    name, error = worst_gradient(grads.items(), total)
    assert error <= 1e-12, f"{name}: {error:.2e}"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_rows_predict_nothing_whatever_the_labels(side):
    """Labels are -100 at padding only; the loss is that of the rows run one by one without it."""
    model = make_twin()
    ids, mask = torch.randint(VOCAB, (B, S)), torch.ones(B, S, dtype=torch.int64)
    for b, n in enumerate((0, 3, 17, 7)):
        (mask[b, :n] if side == "left" else mask[b, S - n :]).zero_()
    labels = ids.masked_fill(mask == 0, -100)
    count = int(mask.sum()) - B
    total = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        real = ids[b, mask[b] == 1][None]
        total += model(real, labels=real, num_items_in_batch=count).loss.detach()
    got = vs.stream(model, chunk_size=5)(ids, attention_mask=mask, labels=labels).loss
    assert_exact(got, total)


def test_labels_never_cross_documents():
    """Without the collator's -100 a document's last token would be trained on the next one's
    first."""
    model = vs.stream(make_twin(), chunk_size=7)
    inputs = packed_row([5, 9, 3])
    want, _ = loss_and_gradients(model, **inputs)
    got, _ = loss_and_gradients(model, **(inputs | {"labels": inputs["input_ids"]}))
    assert_exact(got, want)


def test_gradient_accumulation():
    model = make_twin()
    streamed = vs.stream(copy.deepcopy(model), chunk_size=5)
    batches = [packed_row([5, 9]), packed_row([1, 20, 2]), padded("right_padding")]
    count = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    for m in (model, streamed):
        for batch in batches:
            m(**batch, num_items_in_batch=count, use_cache=False).loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    name, error = worst_gradient(((n, p.grad) for n, p in streamed.named_parameters()), expected)
    assert error <= 1e-12, f"{name}: {error:.2e}"


def test_padding_is_never_read():
    """NaN embeddings at padded positions change nothing, and their gradient is exactly zero."""
    model = vs.stream(make_twin(), chunk_size=6)
    inputs = padded("holes")
    embeds = model.model.embed_tokens(inputs.pop("input_ids")).detach()
    clean, grads = loss_and_gradients(model, inputs_embeds=embeds.clone(), **inputs)
    clean_grads = {n: None if g is None else g.clone() for n, g in grads.items()}
    hidden = inputs["attention_mask"] == 0
    embeds[hidden] = torch.nan
    embeds.requires_grad_()
    dirty, grads = loss_and_gradients(model, inputs_embeds=embeds, **inputs)
    assert torch.equal(clean, dirty)
    for name, grad in grads.items():
        if grad is not None:
            assert torch.equal(grad, clean_grads[name]), name
    assert (embeds.grad[hidden] == 0).all() and embeds.grad[~hidden].any()


@pytest.mark.parametrize("case", ["all_labels", "left_padding", "holes"])
def test_backbone_streams_on_its_own(case):
    model = make_twin()
    streamed = vs.stream(copy.deepcopy(model), chunk_size=5)
    inputs = padded(case)
    inputs.pop("labels")
    real = inputs.get("attention_mask", torch.ones(B, S)) != 0
    want = model.model(**inputs).last_hidden_state
    got = streamed.model(**inputs).last_hidden_state
    assert got.shape == want.shape and (got[~real] == 0).all()
    assert_exact(got[real], want[real])
    dy = torch.randn_like(want) * real[..., None]
    parameters = list(model.model.parameters())
    expected = torch.autograd.grad((want * dy).sum(), parameters)
    actual = torch.autograd.grad((got * dy).sum(), list(streamed.model.parameters()))
    for g, w in zip(actual, expected, strict=True):
        assert_exact(g, w)
    assert streamed.model(**inputs, return_dict=False)[0].shape == want.shape


def test_logits_without_labels():
    """No labels: the caller wants logits, and gets them differentiable through the streamed
    layers."""
    model = make_twin()
    streamed = vs.stream(copy.deepcopy(model), chunk_size=5)
    inputs = padded("all_labels")
    inputs.pop("labels")
    want, got = model(**inputs).logits, streamed(**inputs).logits
    assert_exact(got, want)
    (expected,) = torch.autograd.grad(want.square().sum(), model.lm_head.weight)
    (actual,) = torch.autograd.grad(got.square().sum(), streamed.lm_head.weight)
    assert_exact(actual, expected)


def test_shift_labels_are_taken_as_they_are():
    inputs = padded("right_padding")
    labels = inputs.pop("labels")
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    compare(make_twin(), inputs | {"shift_labels": shifted, "labels": labels}, chunk_size=5)


@pytest.mark.parametrize("frozen", ["embed_tokens", "layers", "lm_head", "q_proj", "k_proj"])
def test_frozen_parameters(frozen):
    model = make_twin()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    compare(model, padded("right_padding"), chunk_size=6)


def test_only_k_projections_trained():
    model = make_twin("qwen3")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj" in name)
    compare(model, padded("right_padding"), chunk_size=6)


def test_autocast():
    """Under bfloat16 autocast the recomputation runs in bfloat16 as the forward did."""
    model = make_model()
    streamed = vs.stream(copy.deepcopy(model), chunk_size=7)
    exact = make_twin_of(model)
    inputs = packed_row([n for n in DOCUMENTS if n])
    results = []
    for m in (model, streamed):
        m.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = m(**inputs, use_cache=False).loss
        loss.backward()
        results.append({n: p.grad for n, p in m.named_parameters()})
    _, reference = loss_and_gradients(exact, **inputs, use_cache=False)
    for name, grad in reference.items():
        plain, ours = (relative_error(r[name], grad) for r in results)
        assert ours <= 2 * plain + 1e-3, f"{name}: {ours:.2e} against {plain:.2e}"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bfloat16_is_as_close_as_the_dense_model(family):
    """The error-ratio rule on the loss and the worst parameter, on one document: the dense model
    knows no packing without a mask."""
    model = make_model(family).bfloat16()
    exact, streamed = make_twin_of(model), copy.deepcopy(model)
    vs.stream(streamed, chunk_size=16, head_chunk_size=16)
    ids = torch.randint(VOCAB, (1, 67))
    inputs = {"input_ids": ids, "labels": ids}
    loss, grads = loss_and_gradients(streamed, **inputs)
    plain_loss, plain_grads = loss_and_gradients(model, **inputs, use_cache=False)
    exact_loss, exact_grads = loss_and_gradients(exact, **inputs, use_cache=False)
    # A loss is one number, exact by chance at times: beside the rule it may be off by a rounding.
    error, plain_error = (relative_error(t, exact_loss) for t in (loss, plain_loss))
    assert error <= 2 * plain_error + torch.finfo(torch.bfloat16).eps / 8
    name, worst = worst_gradient(grads.items(), exact_grads)
    plain_name, plain_worst = worst_gradient(plain_grads.items(), exact_grads)
    assert worst <= 2 * plain_worst, f"{name}: {worst:.2e} against {plain_name}: {plain_worst:.2e}"


def make_twin_of(model):
    from varstream.testing import float64_twin

    return float64_twin(model)
