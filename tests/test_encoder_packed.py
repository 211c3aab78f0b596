"""Packed output of padding-free encoders, pooling of packed rows, heads that run on packed rows."""

from __future__ import annotations

import pytest
import torch
from encoder_models import (
    FIRST_KEPT,
    MASK,
    POOLED,
    PREFIXES,
    VOCAB,
    WIDTH,
    assert_gradients,
    batch,
    gradients,
    make,
    twins,
)

import varstream as vs
from varstream.encoder import padding_free, pooling
from varstream.testing import assert_error_ratio, assert_exact

EMPTY_TOO = torch.cat([MASK, torch.zeros(1, MASK.shape[1], dtype=torch.int64)])


# --- the encoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_output_packed(prefix):
    """The rows of the padded output, never unpacked; the pooler's output beside."""
    name = f"{prefix}Model"
    ours = padding_free(make(name))
    mask = FIRST_KEPT if prefix in POOLED else EMPTY_TOO
    inputs = batch(mask, name)
    padded, found = ours(**inputs), ours(**inputs, output_packed=True)
    packed = found.last_hidden_state
    assert isinstance(packed, vs.Packed) and found[0] is packed
    assert packed.values.shape == (int(mask.sum()), WIDTH)
    assert packed.cu_seqlens.diff().tolist() == mask.sum(1).tolist()
    assert torch.equal(vs.unpack(packed), padded.last_hidden_state)
    assert list(found) == list(padded)
    if prefix in POOLED:
        assert torch.equal(found.pooler_output, padded.pooler_output)
    assert isinstance(ours(**inputs, output_packed=True, return_dict=False)[0], vs.Packed)
    assert isinstance(ours(**inputs)[0], torch.Tensor)


def test_output_packed_for_every_call():
    ours = padding_free(make(), output_packed=True)
    inputs = batch(FIRST_KEPT)
    assert isinstance(ours(**inputs)[0], vs.Packed)
    assert isinstance(ours(**inputs, output_packed=False)[0], torch.Tensor)
    assert isinstance(padding_free(ours)(**inputs)[0], torch.Tensor)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_gradients_of_packed_output(prefix):
    """A loss on pooled packed rows trains as one on the padded model's."""
    name = f"{prefix}Model"
    changes = {"pooler": False} if prefix in POOLED else {}
    dense, ours = twins(name, **changes)
    inputs = batch(MASK, name)
    want = dense(**inputs)[0]
    want = (want * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)
    got = pooling.mean_pool(ours(**inputs, output_packed=True)[0])
    assert_exact(got, want)
    found = gradients(ours, got.sin().sum())
    assert_gradients(found, gradients(dense, want.sin().sum()))


def test_what_output_packed_is_refused_for():
    with pytest.raises(TypeError, match="output_packed must be a bool, got int"):
        padding_free(make(), output_packed=1)
    with pytest.raises(TypeError, match="output_packed must be a bool, got str"):
        padding_free(make())(**batch(FIRST_KEPT), output_packed="yes")
    for suffix in ("SequenceClassification", "MultipleChoice", "QuestionAnswering"):
        model = make(f"BertFor{suffix}")
        message = f"BertFor{suffix} can't return output_packed: .* its encoder .model.bert."
        with pytest.raises(vs.UnsupportedModelError, match=message):
            padding_free(model, output_packed=True)
        assert not any("forward" in module.__dict__ for module in model.modules())
        with pytest.raises(vs.UnsupportedModelError, match=message):
            padding_free(model)(**batch(FIRST_KEPT), output_packed=True)


# --- pooling --------------------------------------------------------------------------------------


def packed_rows(dtype=torch.float64, mask=EMPTY_TOO, **options):
    x = torch.randn(*mask.shape, 5, dtype=torch.float64).to(dtype).requires_grad_()
    return x, vs.pack(x, mask, **options)


def dense_pools(x, mask):
    real = (mask != 0)[..., None]
    some = real.any(1)
    first = x[torch.arange(len(x)), mask.argmax(1)] * some
    mean = (x * real).sum(1) / real.sum(1).clamp(min=1)
    most = x.masked_fill(~real, -torch.inf).amax(1).where(some, 0.0)
    return {"cls_pool": first, "mean_pool": mean, "max_pool": most}


@pytest.mark.parametrize("options", [{}, {"max_tokens": 60, "max_seqlen": 11}], ids=["", "tail"])
@pytest.mark.parametrize("name", pooling.__all__)
def test_pooling(name, options):
    """Empty sequences give 0, and rows beyond the last sequence reach nothing."""
    x, packed = packed_rows(**options)
    if options:
        packed = packed._replace(
            values=packed.values.where(packed.indices[:, None] >= 0, torch.nan)
        )
    want = dense_pools(x, EMPTY_TOO)[name]
    got = getattr(pooling, name)(packed)
    assert got.shape == (len(EMPTY_TOO), 5)
    assert_exact(got, want)
    weight = torch.randn_like(want)
    found, expected = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want))
    assert_exact(found, expected)


@pytest.mark.parametrize("name", pooling.__all__)
def test_pooling_nothing(name):
    for mask in (torch.zeros(3, 4), torch.zeros(0, 4), torch.zeros(2, 0)):
        x, packed = packed_rows(mask=mask)
        got = getattr(pooling, name)(packed)
        assert got.shape == (len(mask), 5) and not got.any()
        got.sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mean_is_summed_in_float32(dtype):
    mask = torch.ones(2, 3000)
    x, packed = packed_rows(dtype, mask)
    got = pooling.mean_pool(packed)
    assert got.dtype == dtype
    exact = x.detach().double().mean(1)
    assert_error_ratio(got, exact.to(dtype), exact, ratio=1.01)


def test_maxima_share_their_gradient():
    x = torch.zeros(1, 4, 1, dtype=torch.float64, requires_grad=True)
    pooling.max_pool(vs.pack(x, torch.ones(1, 4))).sum().backward()
    assert torch.equal(x.grad, torch.full((1, 4, 1), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("name", pooling.__all__)
def test_pooling_errors(name):
    pool = getattr(pooling, name)
    _, packed = packed_rows()
    with pytest.raises(TypeError, match="packed must be a varstream.Packed, got Tensor"):
        pool(packed.values)
    with pytest.raises(ValueError, match=r"packed.values must have 2 dimensions \(total, d\)"):
        pool(packed._replace(values=packed.values[:, 0]))
    with pytest.raises(ValueError, match="packed.values must have dtype float64"):
        pool(packed._replace(values=packed.indices[:, None]))


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_heads_run_on_rows(prefix):
    """Position by position on real tokens; a classifier on one row of each sequence."""
    seen = []

    def watch(module, args, kwargs):
        seen.append(next(iter(args or kwargs.values())).shape[:-1])

    for suffix in ("MaskedLM", "TokenClassification", "SequenceClassification"):
        name = f"{prefix}For{suffix}"
        model = padding_free(make(name))
        inputs = batch(FIRST_KEPT, name)
        last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        last = [m for m in last if m not in set(model.base_model.modules())][-1]
        handle = last.register_forward_pre_hook(watch, with_kwargs=True)
        logits = model(**inputs).logits
        handle.remove()
        rows = (len(FIRST_KEPT),) if suffix.startswith("Seq") else (1, int(FIRST_KEPT.sum()))
        assert [tuple(shape) for shape in seen] == [rows], name
        seen.clear()
        if logits.dim() == 3:
            assert (logits[FIRST_KEPT == 0] == 0).all()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_logits_of_real_tokens_only(prefix):
    name = f"{prefix}ForMaskedLM"
    model = padding_free(make(name))
    inputs = batch(MASK, name)
    inputs["labels"] = inputs["input_ids"].masked_fill(MASK == 0, -100)
    padded, found = model(**inputs), model(**inputs, output_packed=True)
    assert found.logits.values.shape == (int(MASK.sum()), VOCAB)
    assert torch.equal(vs.unpack(found.logits), padded.logits)
    assert torch.equal(found.loss, padded.loss)
    pair = model(**inputs, output_packed=True, return_dict=False)
    assert torch.equal(pair[1].values, found.logits.values)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_hooks_on_the_encoder_see_padded_output(name):
    model = padding_free(make(name))
    inputs = batch(FIRST_KEPT)
    want, seen = model(**inputs).logits, []
    model.bert.register_forward_hook(lambda m, args, out: seen.append(out[0].shape))
    got = model(**inputs).logits
    assert seen == [(*FIRST_KEPT.shape, WIDTH)]
    real = FIRST_KEPT != 0 if want.dim() == 3 else ...
    assert_exact(got[real], want[real])


def test_an_encoder_alone_is_its_own_again_after_a_head_failed():
    model = padding_free(make("BertForMaskedLM"))
    inputs = batch(FIRST_KEPT)
    with pytest.raises(ValueError, match="output_attentions=True is not available"):
        model(**inputs, output_attentions=True)
    assert model.bert(**inputs)[0].shape == (*FIRST_KEPT.shape, WIDTH)


def test_labels_of_another_shape():
    """The stock loss flattens them; packed output has no place for that."""
    model = padding_free(make("BertForMaskedLM"))
    inputs = batch(FIRST_KEPT)
    labels = inputs["input_ids"].masked_fill(FIRST_KEPT == 0, -100)
    want = model(**inputs, labels=labels).loss
    assert_exact(model(**inputs, labels=labels.flatten()).loss, want)
    with pytest.raises(ValueError, match=r"labels must have shape \(4, 11\), got \(44,\)"):
        model(**inputs, labels=labels.flatten(), output_packed=True)


def test_batches_without_a_token():
    inputs = batch(torch.zeros(2, 4, dtype=torch.int64))
    for prefix in PREFIXES:
        given = {n: v for n, v in inputs.items() if n in batch(MASK, prefix)}
        for suffix in ("MaskedLM", "SequenceClassification"):
            model = padding_free(make(f"{prefix}For{suffix}"))
            logits = model(**given).logits
            assert logits.shape[0] == 2 and logits.isfinite().all()
            logits.sum().backward()
