"""The ByteTransformer face: one layer against a plain composition, its masks and refusals."""

from __future__ import annotations

import copy
import io
from inspect import signature

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, softmax

from varstream.integrations.byte_transformer import BertTransformer, bert_transformer
from varstream.testing import assert_error_ratio, assert_exact

HEADS, SIZE = 3, 8
H, F = HEADS * SIZE, 4 * HEADS * SIZE
# Real tokens: a prefix, all, holes, none, one at the end.
TOKENS = torch.tensor(
    [[1, 1, 1, 1, 0, 0, 0], [1] * 7, [0, 1, 0, 1, 1, 0, 0], [0] * 7, [0, 0, 0, 0, 0, 0, 1]]
)
SHAPES = {
    "qkv_kernel": (H, 3 * H),
    "qkv_bias": (3 * H,),
    "attr_output_kernel": (H, H),
    "attr_output_bias": (H,),
    "attr_output_layernorm_gamma": (H,),
    "attr_output_layernorm_beta": (H,),
    "inter_kernel": (H, F),
    "inter_bias": (F,),
    "output_kernel": (F, H),
    "output_bias": (H,),
    "output_layernorm_gamma": (H,),
    "output_layernorm_beta": (H,),
}


def every_row(tokens=TOKENS):
    """(B, S, S): each row of a sequence marks its real tokens, as ByteTransformer's own test."""
    return tokens[:, None].expand(-1, tokens.shape[1], -1).double()


def outer(tokens=TOKENS):
    return (tokens[:, None] * tokens[:, :, None]).double()


def weights(dtype=torch.float64):
    return {
        name: (torch.randn(shape, dtype=torch.float64) * 0.3).to(dtype).requires_grad_()
        for name, shape in SHAPES.items()
    }


def sequences(dtype=torch.float64, tokens=TOKENS):
    return torch.randn(*tokens.shape, H, dtype=torch.float64).to(dtype).requires_grad_()


def plain(w, x, mask):
    """All positions, (S, S) scores; a row of the mask that is all 0 attends to nothing."""
    q, k, v = (
        part.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
        for part in (x @ w["qkv_kernel"] + w["qkv_bias"]).chunk(3, -1)
    )
    hidden = (mask == 0)[:, None]
    scores = (q @ k.transpose(-2, -1) / SIZE**0.5).masked_fill(hidden, -1e4)
    probs = softmax(scores, -1).masked_fill(hidden, 0.0)
    h = (probs @ v).transpose(1, 2).flatten(2)
    x = norm(w, "attr_output", h @ w["attr_output_kernel"] + w["attr_output_bias"] + x)
    h = gelu(x @ w["inter_kernel"] + w["inter_bias"], approximate="tanh")
    return norm(w, "output", h @ w["output_kernel"] + w["output_bias"] + x)


def norm(w, name, x):
    gamma, beta = w[f"{name}_layernorm_gamma"], w[f"{name}_layernorm_beta"]
    if gamma.dtype == x.dtype:
        return layer_norm(x, (H,), gamma, beta, 1e-6)
    return layer_norm(x.float(), (H,), gamma, beta, 1e-6).to(x.dtype)


def ours(w, x, mask, *options):
    return bert_transformer(HEADS, SIZE, *w.values(), x, mask, *options)


def assert_same(got, want, leaves, upstream):
    assert_exact(got, want)
    found, expected = (torch.autograd.grad(y, leaves, upstream) for y in (got, want))
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_exact(a, b, 1e-12, str(i))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("masks", [every_row, outer])
def test_real_tokens_equal_the_plain_layer(masks, fused):
    w, x, mask = weights(), sequences(), masks()
    got = ours(w, x, mask, True, fused)
    real = TOKENS[..., None].double()
    assert not got[TOKENS == 0].any()
    assert_same(got, plain(w, x, mask) * real, [x, *w.values()], torch.randn_like(got))


@pytest.mark.parametrize("masks", [every_row, outer])
def test_every_position_equals_the_plain_layer(masks):
    w, x, mask = weights(), sequences(), masks()
    got = ours(w, x, mask, False)
    assert got[TOKENS == 0].abs().min() > 0
    assert_same(got, plain(w, x, mask), [x, *w.values()], torch.randn_like(got))


def test_padding_is_never_read():
    w, x = weights(), sequences()
    want = ours(w, x, every_row())
    with torch.no_grad():
        x[TOKENS == 0] = torch.nan
    assert torch.equal(ours(w, x, every_row()), want)
    got = ours(w, x, every_row(), False)
    assert_exact(got[TOKENS != 0], want[TOKENS != 0])
    assert got[TOKENS == 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_dtypes(dtype):
    w, x = weights(), sequences()
    assert torch.equal(ours(w, x, every_row().to(dtype)), ours(w, x, every_row()))


def test_no_rows_and_no_columns():
    w = weights()
    for batch, seqlen in ((0, 5), (2, 0)):
        x = torch.randn(batch, seqlen, H, dtype=torch.float64)
        for remove in (True, False):
            got = ours(w, x, torch.ones(batch, seqlen, seqlen), remove)
            assert got.shape == x.shape


def test_any_feed_forward_width():
    w, x = weights(), sequences()
    w |= {"inter_kernel": w["inter_kernel"][:, :10], "inter_bias": w["inter_bias"][:10]}
    w["output_kernel"] = w["output_kernel"][:10]
    assert_exact(ours(w, x, every_row(), False), plain(w, x, every_row()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_norms", [False, True])
def test_low_precision(dtype, wide_norms):
    w, x = weights(dtype), sequences(dtype)
    if wide_norms:  # ByteTransformer takes float32 norms in half layers
        w |= {n: torch.randn(H).requires_grad_() for n in w if "layernorm" in n}
    exact = {name: value.detach().double().requires_grad_() for name, value in w.items()}
    wide_x = x.detach().double().requires_grad_()
    mask = every_row()
    got, common, want = ours(w, x, mask, False), plain(w, x, mask), plain(exact, wide_x, mask)
    assert got.dtype == dtype
    assert_error_ratio(got, common, want)
    up = torch.randn_like(got)
    pairs = zip(
        torch.autograd.grad(got, [x, *w.values()], up),
        torch.autograd.grad(common, [x, *w.values()], up),
        torch.autograd.grad(want, [wide_x, *exact.values()], up.double()),
        (x, *w.values()),
        strict=True,
    )
    for found, plainly, exactly, leaf in pairs:
        assert found.dtype == leaf.dtype
        assert_error_ratio(found, plainly, exactly)


def test_autocast():
    w, x = weights(torch.float32), sequences(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(w, x, every_row(), False)
    assert got.dtype == torch.float32
    assert_exact(got, plain(w, x, every_row()), 2e-2)
    got.sum().backward()
    assert all(t.grad is not None for t in w.values())


def test_argument_order():
    names = list(signature(bert_transformer).parameters)
    tail = ["input", "attr_mask", "is_remove_padding", "use_fused_attention"]
    assert names == ["head_num", "head_size", *SHAPES, *tail]


# --- the class ------------------------------------------------------------------------------------


def test_class_holds_the_weights():
    w, x, mask = weights(), sequences(), every_row()
    by_position = BertTransformer(HEADS, SIZE, *w.values())
    by_name = BertTransformer(HEADS, SIZE, **w)
    assert [name for name, _ in by_position.named_parameters()] == list(SHAPES)
    assert torch.equal(by_position(x, mask), ours(w, x, mask))
    assert torch.equal(by_name.forwardv2(x, mask, False, True), ours(w, x, mask, False))
    by_name(x, mask).sum().backward()
    assert all(p.grad is not None for p in by_name.parameters())
    own = torch.nn.Parameter(torch.zeros(3 * H, dtype=torch.float64), requires_grad=False)
    assert BertTransformer(HEADS, SIZE, **w | {"qkv_bias": own}).qkv_bias is own


def test_class_is_copied_and_stored():
    w, x, mask = weights(), sequences(), every_row()
    layer = BertTransformer(HEADS, SIZE, **w)
    want = layer(x, mask)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x, mask), want)
    assert torch.equal(copy.deepcopy(layer)(x, mask), want)
    other = BertTransformer(HEADS, SIZE, **weights())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, mask), want)


# --- refusals -------------------------------------------------------------------------------------


def causal():
    return torch.ones(5, 7, 7).tril()


def stray_padding():
    mask = outer()
    mask[0, 5, 5] = 1  # a padded query that sees itself, so that its softmax has a term
    return mask


def a_query_more():
    mask = outer()
    mask[2, 3, 1] = 0
    return mask


def other_keys():
    mask = every_row().clone()
    mask[0, 5, 2] = 0
    return mask


MASKS = {
    "causal": (causal, "row 0 of sequence 0"),
    "padding": (stray_padding, "row 0 of sequence 0"),
    "one key less": (a_query_more, "row 3 of sequence 2"),
    "padding sees other keys": (other_keys, "row 5 of sequence 0"),
    "additive": (lambda: -10000.0 * (1 - every_row()), "attr_mask of dtype .* must hold 0 and 1"),
    "shape": (lambda: TOKENS.double(), r"attr_mask must have 3 dimensions \(B, S, S\)"),
    "columns": (lambda: every_row()[..., :-1], "attr_mask must have size 7 in dimension 2"),
}


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_masks_that_are_refused(name, remove):
    make, message = MASKS[name]
    with pytest.raises(ValueError, match=message):
        ours(weights(), sequences(), make(), remove)


@pytest.mark.parametrize("name", SHAPES)
def test_weights_that_are_refused(name):
    w, x, mask = weights(), sequences(), every_row()
    with pytest.raises(
        ValueError, match=rf"{name.replace('inter_bias', 'inter_kernel')} must have size"
    ):
        ours(w | {name: torch.zeros(*SHAPES[name][:-1], 5, dtype=torch.float64)}, x, mask)
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
        ours(w | {name: [1.0]}, x, mask)
    other = torch.bfloat16 if "layernorm" in name else torch.float32
    with pytest.raises(ValueError, match=f"{name} must have the dtype of input"):
        ours(w | {name: w[name].to(other)}, x, mask)


def test_arguments_that_are_refused():
    w, x, mask = weights(), sequences(), every_row()
    with pytest.raises(ValueError, match=r"input must have 3 dimensions \(B, S, H\)"):
        ours(w, x[0], mask)
    with pytest.raises(ValueError, match="input must have size 24 in dimension 2"):
        ours(w, x[..., :-1], mask)
    with pytest.raises(ValueError, match="head_num must be >= 1, got 0"):
        bert_transformer(0, SIZE, *w.values(), x, mask)
    with pytest.raises(TypeError, match="head_size must be an int, got float"):
        bert_transformer(HEADS, 8.0, *w.values(), x, mask)
    with pytest.raises(TypeError, match="is_remove_padding must be a bool, got int"):
        ours(w, x, mask, 1)
    with pytest.raises(TypeError, match="use_fused_attention must be a bool, got str"):
        ours(w, x, mask, True, "yes")
    with pytest.raises(TypeError, match="weights must be the twelve qkv_kernel, .* got 2 by"):
        BertTransformer(HEADS, SIZE, w["qkv_kernel"], w["qkv_bias"])
    with pytest.raises(ValueError, match="qkv_kernel must have size 24 in dimension 0"):
        BertTransformer(HEADS, SIZE, **w | {"qkv_kernel": w["qkv_kernel"].t()})
